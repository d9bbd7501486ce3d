"""Where a program runs: devices, precision, compilers, the allocator's memory, random state."""

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gptlib.common import UserError, first_line, private_folder, warn

# -----------------------------------------------------------------------------
# devices and precision


def resolve_device(name="auto", local_rank=None):
    """The torch.device for auto, cpu, cuda, cuda:N or mps.

    local_rank: one of several processes of torchrun; cuda is then the GPU of that number. Raises
    UserError for another name, for a device that this machine does not have, and for cuda:N if
    there are several processes: all of them would compute on that GPU.
    """
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and local_rank is None:
            name = "mps"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}: expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local_rank or 0)
        elif local_rank is not None:
            raise UserError(f"--device {device} names one GPU for all processes of torchrun: give "
                            "cuda, so that each has its own; CUDA_VISIBLE_DEVICES chooses among "
                            "them")
        count = torch.cuda.device_count()
        if device.index >= count:
            raise UserError(f"--device {device} is not there: this machine has {count} CUDA "
                            "devices")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps is not there: this machine or this build of torch has no "
                        "Metal")
    return device


def resolve_dtype(name, device):
    """The torch.dtype of autocast. auto is bfloat16 if the hardware has it, float16 on older GPUs,
    else float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == "cpu":
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return torch.bfloat16
    return torch.float32


def prepare_device(device, deterministic=False, keep_memory=True):
    """Set up the process: its current GPU, the precision of float32 products, determinism, memory.

    On a CPU training is always deterministic: compiled code would add up the embedding's
    gradients in any order. On CUDA it is if `deterministic` is set, and then strictly (torch
    raises an error for a kernel that is not: with a warning alone, flash attention keeps its
    faster backward pass) and without TF32.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # TF32 for the products that autocast leaves in float32
        torch.set_float32_matmul_precision("highest" if deterministic else "high")
    set_malloc(device, keep_memory)
    if deterministic or device.type == "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if device.type == "cuda":
            torch.use_deterministic_algorithms(True)
        else:  # use_deterministic_algorithms would import the compiler, which takes a second
            torch.set_deterministic_debug_mode("warn")
        torch.utils.deterministic.fill_uninitialized_memory = False


def prepare_attention(device, dtype, block_size):
    """On a CPU, let attention over short contexts in bfloat16 multiply whole matrices of scores.

    This holds for the whole process, until the next call. torch's flash attention is made for long
    contexts: without it a step of the demo takes an eighth less time. The scores are rounded to
    bfloat16 before the softmax, and take memory.
    """
    if device.type != "cpu":
        return
    is_short = dtype == resolve_dtype("auto", device) == torch.bfloat16 and block_size <= 128
    torch.backends.cuda.enable_flash_sdp(not is_short)  # in spite of its name, for a CPU as well
    # keep the scores in bfloat16 instead of converting them to float32 and back
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(is_short)


@contextlib.contextmanager
def nondeterministic_algorithms():
    """A context that allows any kernel: drawing samples needs a cumulative sum, for which CUDA has
    no deterministic kernel.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@contextlib.contextmanager
def without_cudnn_attention(device):
    """Keep attention from using cuDNN while shapes vary; on anything but CUDA this does nothing.

    cuDNN is the fastest for training, whose shapes stay the same for the whole run. But it makes an
    execution plan for each new shape, and prompts, growing caches and HellaSwag's batches nearly
    always have one. The other backends that are enabled stay so (torch.nn.attention.sdpa_kernel).
    """
    if torch.device(device).type != "cuda":
        yield
        return
    is_enabled = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    backends = [backend for backend, enabled in is_enabled.items() if enabled]
    with sdpa_kernel(backends or [SDPBackend.MATH]):
        yield


def device_name(device):
    """The device's name in the log: the GPU's, or "cpu", "mps"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def set_malloc(device, keep):
    """On a CPU, have glibc's malloc keep freed memory for reuse, or give it back at once.

    A training step reuses gigabytes, and fresh pages cost a sixth of its time. A sharded model
    gathers and frees its blocks all the time, in tensors of many sizes: kept memory then has holes
    that none of them fits into, and the process grows to twice what its tensors take.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if not mallopt:
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
    if keep:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
    else:
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 1 << 20)
        mallopt(M_TRIM_THRESHOLD, 1 << 20)


def use_one_thread_if_small(model):
    """Compute with one thread if a step of the model ends before a second one has started."""
    if sum(p.numel() for p in model.parameters()) < 10**7:
        torch.set_num_threads(1)


def compile_model(model, device, **options):
    """The compiled model; if a trial shows that no compiler works, a warning and the model itself.

    options: of torch.compile.
    """
    # as soon as an optimizer is made, torch writes the name of its own folder into the variable
    torchs_own = os.path.join(tempfile.gettempdir(), "torchinductor_")
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", torchs_own).startswith(torchs_own):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = private_folder("inductor")
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as e:  # a missing gcc, Triton or OpenMP, each with an exception of its own
        warn(f"torch.compile does not work here, going on without ({first_line(e)})")
        return model
    return torch.compile(model, **options)


class skip_init(TorchFunctionMode):
    """A context that makes modules without random initial weights, since the weights are loaded
    next.

    Drawing the weights of GPT-2 XL takes longer than loading them.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


# -----------------------------------------------------------------------------
# random state


def get_rng(device):
    """The state of torch's random generators, of the CPU and of the device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng(device, state):
    """Restore what get_rng returned, as far as this device has such a generator."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextlib.contextmanager
def preserved_rng(device):
    """A context after which torch's random generators are as they were before it."""
    state = get_rng(device)
    try:
        yield
    finally:
        set_rng(device, state)


# -----------------------------------------------------------------------------
# provenance


def git_commit():
    """The commit of this checkout; outside one, GIT_COMMIT of the environment, or None."""
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True,
                              text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT") or None
    return done.stdout.strip()
