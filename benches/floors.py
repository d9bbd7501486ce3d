"""What the machine can do at best: matrix products and memory."""

import math
import time

import torch

from gptlib.common import UserError
from gptlib.training.gpu_facts import peak_flops

SHAPES = ((2048, 768, 3072), (2048, 3072, 768), (4096, 4096, 4096))


def matrix_peak(device, dtype, shapes=SHAPES):
    """FLOP/s of the fastest of a few matrix products. UserError if one brings no numbers."""
    best = 0.0
    for m, k, n in shapes:
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(n, k, device=device).to(dtype)
        repeat = 200 if device.type == "cuda" else 1  # one takes a second on a CPU
        for _ in range(4):
            t0 = time.perf_counter()
            for _ in range(repeat):
                c = a @ b.t()
            total = c.float().sum().item()  # waits for the device
            best = max(best, repeat * 2 * m * k * n / (time.perf_counter() - t0))
            if not math.isfinite(total):
                raise UserError(f"a matrix product on {device} brought no numbers")
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


def peak_rate(device, dtype):
    """The FLOP/s that MFU counts: the datasheet's if it is known, else as measured."""
    return peak_flops(device) or matrix_peak(device, dtype)
