"""What the machine can do at best: matrix products and memory."""

import time

import torch

from benches.turns import dtype_name
from gptlib.common import log
from gptlib.runtime import device_name, resolve_device, resolve_dtype
from gptlib.training.gpu_facts import peak_flops


def matrix_peak(device, dtype):
    """FLOP/s of the fastest of a few matrix products."""
    best = 0.0
    for m, k, n in ((2048, 768, 3072), (2048, 3072, 768), (4096, 4096, 4096)):
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(n, k, device=device).to(dtype)
        repeat = 200 if device.type == "cuda" else 3
        for _ in range(4):
            t0 = time.perf_counter()
            for _ in range(repeat):
                c = a @ b.t()
            c.sum().item()  # waits for the device
            best = max(best, repeat * 2 * m * k * n / (time.perf_counter() - t0))
    return best


def memory_bandwidth(device):
    """Bytes per second at which a tensor larger than any cache is read."""
    x = torch.zeros(2**27, device=device)
    x.max().item()
    best = 0.0
    for _ in range(5):
        t0 = time.perf_counter()
        x.max().item()
        best = max(best, x.numel() * 4 / (time.perf_counter() - t0))
    return best


def datasheet_peak(device):
    """(name, bf16 FLOP/s by the maker's datasheet) of a device; None if that is not known."""
    flops = peak_flops(device)
    return (device_name(device), flops) if flops else None


def peak_rate(device, dtype):
    """The FLOP/s that MFU counts: the datasheet's if it is known, else as measured."""
    return peak_flops(device) or matrix_peak(device, dtype)


def bench_floors(args):
    """The machine's limits: matrix products, memory, the datasheet."""
    device = resolve_device(args.device)
    floors = {}
    for dtype in {resolve_dtype("auto", device), torch.float32}:
        peak = matrix_peak(device, dtype)
        floors[f"matrix product, {dtype_name(dtype)}, TFLOP/s"] = peak / 1e12
    floors["memory read, GB/s"] = memory_bandwidth(device) / 1e9
    datasheet = datasheet_peak(device)
    if datasheet:
        name, flops = datasheet
        floors[f"datasheet of {name}, bf16 TFLOP/s"] = flops / 1e12
    log("\nfloors")
    for name, value in floors.items():
        log(f"  {name:48} {value:10.2f}")
    return floors
