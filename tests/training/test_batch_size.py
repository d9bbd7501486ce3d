"""The search for the largest micro-batch, --batch_size 0.

    python -m pytest tests/training/test_batch_size.py
"""

import contextlib
import json

import pytest
import torch
from conftest import TINY, read_log

from gptlib.training.batch_size import find_batch_size, memory_errors_told
from gptlib.common import UserError
from gptlib.distributed import World
from train_gpt2 import GPT, GPTConfig, TrainConfig, train


class Accelerator:
    """A device that has memory errors to catch, as a GPU; its tensors are on the CPU."""
    type = "accelerator"


@pytest.fixture
def accelerator(monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    return Accelerator()


class LimitedModel(torch.nn.Module):
    """A GPT with dropout that runs out of memory above `limit` sequences."""

    def __init__(self, limit, message="CUDA out of memory"):
        super().__init__()
        self.gpt = GPT(GPTConfig(16, 64, 1, 1, 8, dropout=0.5))
        self.limit, self.message, self.tried = limit, message, []

    def forward(self, idx, targets):
        self.tried.append(len(idx))
        result = self.gpt(idx, targets)
        if len(idx) > self.limit:
            raise RuntimeError(self.message)
        return result


def search(model, device):
    return find_batch_size(model, 16, 16 * 8, device, contextlib.nullcontext(), World())


def test_the_search_leaves_the_random_state_as_it_was(accelerator):
    """A trial step draws dropout, and a resumed run no longer equals the uninterrupted one."""
    model = LimitedModel(limit=2)
    before = torch.get_rng_state()
    assert search(model, accelerator) == 2
    assert model.tried == [8, 4, 2]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_search_leaves_no_gradients(accelerator):
    """Gradients of a trial step are added to those of the first real one."""
    model = LimitedModel(limit=2)
    search(model, accelerator)
    assert {p.grad for p in model.parameters()} == {None}


def test_another_error_is_not_taken_for_lack_of_memory(accelerator):
    """A bug in the model is hidden, and the search ends at one sequence."""
    with pytest.raises(RuntimeError, match="device-side assert"):
        search(LimitedModel(limit=2, message="device-side assert"), accelerator)


@pytest.mark.parametrize("message", [
    "MPS backend out of memory (MPS allocated: 6.1 GB, max allowed: 6.8 GB)",
    "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory: you tried "
    "to allocate 3221225472 bytes."])
def test_lack_of_memory_is_told_in_a_line_on_any_device(message):
    """On an Apple GPU, and on Windows, a batch that is too large ends in a page of traceback."""
    with pytest.raises(UserError, match="out of memory at --batch_size 64: try half of it"):
        with memory_errors_told(64):
            raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="device-side assert"):
        with memory_errors_told(64):
            raise RuntimeError("device-side assert")


def test_batch_size_0_changes_nothing_but_the_batches(tmp_path, data_root):
    """The search changes losses, or finds more sequences than a step has."""
    for batch_size in (0, 4):
        settings = {**TINY, "batch_size": batch_size, "max_steps": 5}
        train(TrainConfig(**settings, data_root=str(data_root),
                          log_dir=str(tmp_path / f"log{batch_size}")))
    first_record = (tmp_path / "log0" / "log.jsonl").read_text().splitlines()[0]
    # 256 tokens a step are eight sequences of 32: more are never needed
    assert json.loads(first_record)["batch_size"] == 8
    ours, theirs = (list(map(float, read_log(tmp_path / f"log{b}")["train"].values()))
                    for b in (0, 4))
    assert ours == pytest.approx(theirs, abs=2e-5)
