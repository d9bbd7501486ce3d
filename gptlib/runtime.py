"""Where a program runs: processes, devices, precision, compilers, random state."""

import contextlib
import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from gptlib.common import UserError, first_line, warn


@dataclass(frozen=True)
class World:
    """This process among those of torchrun; alone by default."""
    rank: int = 0
    local_rank: int = 0
    size: int = 1


@contextlib.contextmanager
def distributed():
    """Join the processes that torchrun started, if it did, and leave them at the end."""
    if "RANK" not in os.environ:
        yield World()
        return
    world = World(*(int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    # NCCL for what lives on a GPU; gloo for the rest, such as the state that rank 0 reads and hands round
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield world
    dist.destroy_process_group()  # not after an error: the others may be waiting in a collective


def resolve_device(name="auto", local_rank=None):
    """The torch.device for auto, cpu, cuda, cuda:N or mps; under torchrun cuda is the one of the local rank."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps and local_rank is None else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}: expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local_rank or 0)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps is not there: this machine or this build of torch has no Metal")
    return device


def resolve_dtype(name, device):
    """The torch.dtype of autocast; auto: bfloat16 where the hardware has it, float16 on older GPUs, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def keep_freed_memory(device):
    """On a CPU have glibc's malloc keep what is freed: a step reuses gigabytes, and fresh pages cost a sixth of its time."""
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


def compile_model(model, device, **options):
    """torch.compile(model, **options), or the model itself with a warning where a trial shows that no compiler works."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as e:  # a missing gcc, Triton or OpenMP, each with an exception of its own
        warn(f"torch.compile does not work here, going on without ({first_line(e)})")
        return model
    return torch.compile(model, **options)


class skip_init(TorchFunctionMode):
    """Leaves out the random initial weights of modules made in its context: drawing GPT-2 XL's takes longer than loading."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **(kwargs or {}))


def get_rng(device):
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_rng(device, state):
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state[device.type])


def git_commit():
    """The commit of this checkout, or None outside of one."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


PEAK_TFLOPS = {  # dense bf16 (float16 where there is none), from the makers' datasheets
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "A10": 125,
    "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65,
}
