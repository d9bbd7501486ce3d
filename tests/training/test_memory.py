"""The estimate of memory beside what a step really takes, and the search for --batch_size 0.

    python -m pytest tests/training/test_memory.py

The estimate is compared with the tensors of a real step, and with the peak of fresh processes on a
CPU. No time is measured.
"""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, read_log

from gptlib.common import UserError
from gptlib.distributed import World
from gptlib.runtime import resolve_dtype
from gptlib.training import memory
from gptlib.training.memory import (checkpoint_bytes, estimate_memory, find_batch_size,
                                    memory_errors_told, model_sizes)
from gptlib.training.parallel import Layout
from gptlib.training.presets import PRESETS
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizers, train

GIB = 2**30
EAGER = Layout(compile=False)


def model_of(n_layer=4, n_embd=64, n_head=4, block_size=32, vocab_size=50304):
    return GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd))


def sizes_of(**shape):
    with torch.device("meta"):
        return model_sizes(model_of(**shape))


def preset_sizes(name):
    shape = {key: PRESETS[name][key] for key in ("n_layer", "n_embd", "n_head", "block_size")}
    return sizes_of(**shape)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_is_what_the_tensors_take(optimizer):
    """Guards against a part of the model or of the optimizer's state that is left out, or counted
    twice (the tie)."""
    model = model_of()
    optimizers = configure_optimizers(model, TrainConfig(optimizer=optimizer), torch.device("cpu"))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for one in optimizers:
        one.step()
    state = 0
    for one in optimizers:
        tensors = [t for values in one.state.values() for t in values.values()]
        state += sum(t.nbytes for t in tensors if torch.is_tensor(t) and t.dim())
    weights = sum(p.nbytes for p in model.parameters())
    sizes = model_sizes(model)
    parts = estimate_memory(sizes, EAGER, optimizer, 128, 4, bits=32).parts
    assert parts["weights"] == weights
    assert parts["gradients"] == weights
    assert parts["optimizer"] == state
    assert checkpoint_bytes(sizes, optimizer) == weights + state


def saved_bytes(shape, sequences, bits):
    """Bytes that the graph of a real forward pass keeps, weights not counted."""
    model = model_of(**shape)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    idx = torch.zeros(sequences, shape["block_size"], dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bits == 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model(idx, idx, return_logits=False)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("bits", [16, 32])
def test_activations_of_a_block_are_counted(bits):
    """Guards against a change of the model by which a block keeps other bytes than the estimate
    counts."""
    shape = dict(n_embd=256, block_size=256, n_head=4)
    few, more = dict(n_layer=1, **shape), dict(n_layer=3, **shape)
    really = saved_bytes(more, 8, bits) - saved_bytes(few, 8, bits)
    parts = [estimate_memory(sizes_of(**s), EAGER, "adamw", 8 * 256, 8, bits=bits).parts
             for s in (few, more)]
    names = ("activations", "16-bit weights")
    expected = sum(parts[1][name] - parts[0][name] for name in names)
    assert abs(expected / really - 1) < 0.02, f"expected {expected:,}, found {really:,}"


# Two steps in a process of its own. Steps of a tiny model come first, so that what Python and torch
# load is not counted as memory of the step.
PEAK = """
import json, sys
from pathlib import Path
import torch
from gptlib.training.optim import skip_if_not_finite
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizers

def status(name):
    text = Path("/proc/self/status").read_text()
    return int(text.split(name + ":")[1].split()[0]) * 1024

def steps(config, optimizer, batch_size, micro_steps):
    model = GPT(config)
    optimizers = configure_optimizers(model, TrainConfig(optimizer=optimizer), torch.device("cpu"))
    x, y = torch.randint(config.vocab_size, (2, batch_size, config.block_size))
    for _ in range(2):
        for _ in range(micro_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=bits == 16):
                _, loss = model(x, y, return_logits=False)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in optimizers:
            skip_if_not_finite(one, norm)
            one.step()
            one.zero_grad()

shape, optimizer, batch_size, micro_steps, bits = json.loads(sys.argv[1])
steps(GPTConfig(shape["block_size"], 64, 1, 1, 8), optimizer, batch_size, 1)
before = status("VmRSS")
steps(GPTConfig(**shape), optimizer, batch_size, micro_steps)
print(json.dumps([before, status("VmHWM")]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("shape, optimizer, batch_size, micro_steps", [
    # weights, gradients and optimizer; activations; logits
    (dict(n_layer=8, n_embd=768, n_head=12, block_size=64, vocab_size=32768), "adamw", 1, 1),
    (dict(n_layer=8, n_embd=768, n_head=12, block_size=64, vocab_size=2048), "muon", 1, 2),
    (dict(n_layer=8, n_embd=256, n_head=4, block_size=256, vocab_size=1024), "adamw", 24, 1),
    (dict(n_layer=2, n_embd=256, n_head=4, block_size=256, vocab_size=50304), "muon", 6, 2),
], ids=["state", "state, Muon", "activations", "logits, Muon"])
def test_peak_of_a_fresh_process(shape, optimizer, batch_size, micro_steps):
    """Guards against a plan that says that a run fits which then is killed, or that sends people to
    a larger machine. In the precision that this CPU has: bfloat16 in emulation takes minutes."""
    bits = torch.finfo(resolve_dtype("auto", torch.device("cpu"))).bits
    request = json.dumps([shape, optimizer, batch_size, micro_steps, bits])
    done = subprocess.run([sys.executable, "-c", PEAK, request], cwd=ROOT,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    before, peak = json.loads(done.stdout)
    tokens = batch_size * shape["block_size"] * micro_steps
    planned = estimate_memory(sizes_of(**shape), EAGER, optimizer, tokens, batch_size,
                              bits=bits).peak
    expected = before + planned
    assert abs(expected / peak - 1) < 0.15, f"expected {expected / GIB:.3f}, found {peak / GIB:.3f}"


def test_a_compiled_step_on_an_h100():
    """Guards against an estimate for a GPU that nothing was compared with: 28.9 GiB were measured
    at micro-batches of 64 x 1024 of GPT-2 (124M), four a step, torch 2.11."""
    planned = estimate_memory(preset_sizes("gpt2"), Layout(), "adamw", 4 * 2**16, 64).peak
    assert planned / GIB == pytest.approx(28.9, rel=0.1)


def test_ddp_keeps_gradients_beside_its_buckets():
    """Guards against a plan by which GPT-2 XL fits on eight GPUs that then run out of memory:
    under DDP the gradients of all micro-batches but the last add up beside the buckets."""
    sizes = preset_sizes("gpt2-xl")

    def peak(ranks, tokens):
        return estimate_memory(sizes, Layout(), "adamw", tokens, 8, ranks).peak

    one_micro_batch = 8 * 1024
    more = peak(8, 2 * 8 * one_micro_batch) - peak(1, 2 * one_micro_batch)
    assert more == 4 * sizes.total
    assert peak(8, 8 * one_micro_batch) < peak(8, 2 * 8 * one_micro_batch)


def test_sharding_divides_the_state():
    """Guards against a --shard that is planned as if every GPU held a whole model, or as if nothing
    were gathered."""
    sizes = preset_sizes("gpt3-6.7b")
    once = 8 * 2 * sizes.block_size  # one micro-batch of two sequences on each of eight

    def parts(tokens, **layout):
        return estimate_memory(sizes, Layout(**layout), "adamw", tokens, 2, 8).parts

    plain, sharded = parts(once), parts(once, shard=True)
    for name in ("weights", "gradients", "optimizer"):
        assert sharded[name] == plain[name] // 8
    assert sharded["buckets"] > 4 * (sizes.root + sizes.block)
    # the gradients of two micro-batches add up whole
    assert parts(2 * once, shard=True)["gradients"] == plain["gradients"]
    each = parts(2 * once, shard=True, reduce_each=True)
    assert each["gradients"] == plain["gradients"] // 8
    two_copies = parts(2 * once, shard=True, shard_ranks=4)
    assert two_copies["weights"] == plain["weights"] // 4


def test_recomputed_blocks_keep_their_input():
    """Guards against a --recompute that is planned with the activations of all blocks."""
    sizes = preset_sizes("gpt2-xl")
    tokens = 8 * sizes.block_size

    def activations(every):
        layout = Layout(recompute_every=every)
        return estimate_memory(sizes, layout, "adamw", tokens, 8).parts["activations"]

    a_block, an_input = 36 * 1600 * tokens, 4 * 1600 * tokens
    assert activations(0) - activations(1) == 48 * (a_block - an_input)
    assert activations(0) - activations(2) == 24 * (a_block - an_input)


# -----------------------------------------------------------------------------
# --batch_size 0


class Accelerator:
    """A device that raises memory errors, as a GPU does; its tensors are on the CPU."""
    type = "accelerator"


@pytest.fixture
def accelerator(monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    return Accelerator()


class LimitedModel(GPT):
    """A GPT with dropout that runs out of memory above `limit` sequences."""

    def __init__(self, limit, message="CUDA out of memory"):
        super().__init__(GPTConfig(16, 64, 1, 1, 8, dropout=0.5))
        self.limit, self.message, self.tried = limit, message, []

    def forward(self, idx, targets):
        self.tried.append(len(idx))
        result = super().forward(idx, targets)
        if len(idx) > self.limit:
            raise RuntimeError(self.message)
        return result


def search(model, device):
    return find_batch_size(model, 16 * 8, device, contextlib.nullcontext(), World())


def test_the_search_leaves_the_random_state_as_it_was(accelerator):
    """Guards against a trial step that draws dropout: a resumed run would no longer equal the
    uninterrupted one."""
    model = LimitedModel(limit=2)
    before = torch.get_rng_state()
    assert search(model, accelerator) == 2
    assert model.tried == [8, 4, 2]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_search_leaves_no_gradients(accelerator):
    """Guards against gradients of a trial step that are added to those of the first real one."""
    model = LimitedModel(limit=2)
    search(model, accelerator)
    assert {p.grad for p in model.parameters()} == {None}


@pytest.mark.parametrize("size, copies", [(1, 2), (2, 3)])
def test_the_search_leaves_room_for_what_comes_later(accelerator, monkeypatch, size, copies):
    """Guards against a batch that fits, and then AdamW's moments and DDP's buckets do not; and
    against NCCL, which finds no memory beside what torch keeps of the trials."""
    held, tried_before = [], []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda p: held.append(p.numel()) or empty_like(p))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: tried_before.append(len(model.tried)))
    monkeypatch.setattr(memory, "preserved_rng", contextlib.nullcontext)
    monkeypatch.setattr(memory, "smallest_of_all", lambda batch_size, world: batch_size)
    monkeypatch.setattr(accelerator, "type", "cuda")
    model = LimitedModel(limit=2)
    find_batch_size(model, size * 16 * 8, accelerator, contextlib.nullcontext(), World(size=size))
    assert model.tried == [8, 4, 2]
    assert sum(held) == 3 * copies * sum(p.numel() for p in model.parameters())
    assert tried_before == [3]


def test_another_error_is_not_taken_for_lack_of_memory(accelerator):
    """Guards against a bug in the model that is hidden, so that the search ends at one sequence."""
    with pytest.raises(RuntimeError, match="device-side assert"):
        search(LimitedModel(limit=2, message="device-side assert"), accelerator)


@pytest.mark.parametrize("message", [
    "MPS backend out of memory (MPS allocated: 6.1 GB, max allowed: 6.8 GB)",
    "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory: you tried "
    "to allocate 3221225472 bytes."])
def test_lack_of_memory_is_told_in_a_line_on_any_device(message):
    """Guards against a page of traceback on an Apple GPU, or on Windows, for a batch that is too
    large."""
    with pytest.raises(UserError, match="out of memory at --batch_size 64: try half of it"):
        with memory_errors_told(64):
            raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="device-side assert"):
        with memory_errors_told(64):
            raise RuntimeError("device-side assert")


def test_batch_size_0_changes_nothing_but_the_batches(tmp_path, data_root):
    """Guards against a search that changes losses, or finds more sequences than a step has."""
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
