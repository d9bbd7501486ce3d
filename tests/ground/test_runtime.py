"""Processes, devices, precision and signals.

    python -m pytest tests/ground/test_runtime.py
"""

import os
import signal
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gptlib import runtime
from gptlib.distributed import StopSignal, join
from gptlib.runtime import nondeterministic_algorithms, prepare_attention, prepare_device


def handlers():
    return [signal.getsignal(number) for number in StopSignal.SIGNALS]


def test_handlers_are_restored_after_an_error():
    """A failed run leaves its signal handlers behind, and Ctrl-C no longer ends the program."""
    before = handlers()
    with pytest.raises(ZeroDivisionError):
        with StopSignal():
            assert handlers() != before
            raise ZeroDivisionError
    assert handlers() == before


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_the_first_signal_is_remembered_only(number):
    """A signal ends the process before the step is saved, or the second one does not end it."""
    before = handlers()
    with StopSignal() as stop_signal:
        assert not stop_signal.received
        os.kill(os.getpid(), number)
        assert stop_signal.received
        assert handlers() == [signal.SIG_DFL, signal.SIG_DFL]
    assert handlers() == before


@pytest.fixture
def settings_of_torch(monkeypatch):
    """What prepare_device sets, recorded instead of done: {setting: value}."""
    found = {}

    def set_deterministic(enabled, warn_only=False):
        found.update(enabled=enabled, warn_only=warn_only)

    def set_precision(precision):
        found["precision"] = precision

    def set_device(device):
        found["device"] = device

    monkeypatch.setattr(torch, "use_deterministic_algorithms", set_deterministic)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_precision)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # removed or restored at the end
    return found


def test_deterministic_on_cuda_is_strict_and_without_tf32(settings_of_torch):
    """With a warning alone flash attention keeps its backward pass that is not deterministic."""
    device = torch.device("cuda", 3)
    prepare_device(device, deterministic=True)
    assert settings_of_torch == dict(enabled=True, warn_only=False, precision="highest",
                                     device=device)


def test_cuda_is_fast_unless_determinism_is_asked_for(settings_of_torch):
    """Every run on CUDA pays for the determinism that only --deterministic asks for."""
    device = torch.device("cuda", 3)
    prepare_device(device)
    assert settings_of_torch == dict(precision="high", device=device)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_cpu_is_deterministic_with_warnings(settings_of_torch, deterministic):
    """A CPU run ends with an error at a kernel that only CUDA has in a deterministic form."""
    prepare_device(torch.device("cpu"), deterministic)
    assert settings_of_torch == dict(enabled=True, warn_only=True)


@pytest.mark.parametrize("dtype, block_size, has_bfloat16, is_flash", [
    (torch.bfloat16, 128, True, False), (torch.bfloat16, 128, False, True),
    (torch.bfloat16, 256, True, True), (torch.float32, 128, True, True)])
def test_attention_of_short_contexts_multiplies_matrices(monkeypatch, dtype, block_size,
                                                         has_bfloat16, is_flash):
    """Guards against steps of the demo that take an eighth longer, against the memory of whole
    score matrices where contexts are long, and against products that a CPU has no instructions
    for."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, block_size, 16, generator=generator) for _ in range(3))
    kernels = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kernels.append(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    try:
        prepare_attention(cpu, dtype, block_size)
        with Record():
            y = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype),
                                               is_causal=True)
    finally:
        prepare_attention(cpu, torch.float32, 1024)
    assert ("_scaled_dot_product_flash_attention_for_cpu" in kernels) == is_flash
    scores = (q @ k.mT / 4).masked_fill(torch.ones(block_size, block_size).triu(1) > 0, -torch.inf)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(y.float(), scores.softmax(-1) @ v, rtol=0, atol=tolerance)


@pytest.mark.parametrize("enabled,warn_only", [(True, False), (True, True), (False, False)])
def test_sampling_restores_determinism_after_an_error(enabled, warn_only):
    """Samples that fail leave the rest of the run without determinism, or only with warnings."""
    def mode():
        return (torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled())

    before = mode()
    try:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        with pytest.raises(ZeroDivisionError):
            with nondeterministic_algorithms():
                assert mode()[0] is False
                raise ZeroDivisionError
        assert mode() == (enabled, warn_only)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("has_cuda,backend", [(False, "gloo"), (True, "cpu:gloo,cuda:nccl")])
def test_the_process_group_has_an_explicit_timeout(monkeypatch, has_cuda, backend):
    """gloo's default of half an hour keeps GPUs waiting that long for a rank that has died."""
    calls = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kw: calls.append((args, kw)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    with join() as world:
        assert world == runtime.World(rank=5, local_rank=1, size=8)
    assert calls == [((backend,), dict(timeout=timedelta(minutes=10)))]
