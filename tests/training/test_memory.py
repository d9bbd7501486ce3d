"""The estimate of memory beside what a step really takes, and the search for --batch_size 0.

    python -m pytest tests/training/test_memory.py

The estimate is compared with the tensors of a real step, as many as torch's profiler records.
"""

import contextlib
import json

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, read_log
from stepping import peak_of_tensors, take_step
from torch.testing._internal.distributed.fake_pg import FakeStore

from gptlib.common import UserError
from gptlib.distributed import World
from gptlib.training import memory, optim
from gptlib.training.memory import (checkpoint_bytes, estimate_memory, find_batch_size,
                                    memory_errors_told, model_sizes)
from gptlib.training.parallel import Layout, create_on, train_with
from gptlib.training.presets import PRESETS
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizers, train

GIB = 2**30
EAGER = Layout(compile=False)
CPU = torch.device("cpu")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


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
    shape = dict(n_embd=64, block_size=64, n_head=4, vocab_size=256)
    few, more = dict(n_layer=1, **shape), dict(n_layer=3, **shape)
    really = saved_bytes(more, 8, bits) - saved_bytes(few, 8, bits)
    parts = [estimate_memory(sizes_of(**s), EAGER, "adamw", 8 * 64, 8, bits=bits).parts
             for s in (few, more)]
    names = ("activations", "16-bit weights")
    expected = sum(parts[1][name] - parts[0][name] for name in names)
    assert abs(expected / really - 1) < 0.02, f"expected {expected:,}, found {really:,}"


def peak_of_two_steps(layout, shape, optimizer, batch_size, micro_steps, bits, world, folder):
    """The most bytes of tensors at once, on this rank."""
    def two_steps():
        model = create_on(CPU, layout, world, lambda: model_of(**shape))
        optimizers = configure_optimizers(model, TrainConfig(optimizer=optimizer), CPU, world)
        x, y = torch.randint(model.config.vocab_size, (2, batch_size, model.config.block_size))
        trained = train_with(model, layout, CPU, world)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bits == 16,
                                  cache_enabled=not layout.shard)
        batches = [(x, y, x.numel())] * micro_steps
        cfg = TrainConfig(total_batch_size=x.numel() * micro_steps * world.size)
        for _ in range(2):
            take_step(trained, batches, optimizers, NO_SCALER, autocast, 1e-4, cfg, world)
    return peak_of_tensors(two_steps, folder)


@pytest.fixture
def muons_precision(monkeypatch):
    """Muon iterates in the precision of the hardware, whatever autocast does."""
    def change(bits):
        precision = torch.bfloat16 if bits == 16 else torch.float32
        monkeypatch.setattr(optim, "resolve_dtype", lambda name, device: precision)
    return change


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("shape, optimizer, batch_size, micro_steps", [
    (dict(n_embd=256, vocab_size=8192), "adamw", 1, 1),
    (dict(n_embd=128, vocab_size=128), "muon", 1, 2),
    (dict(n_layer=8, block_size=128, vocab_size=256), "adamw", 12, 1),
    (dict(n_layer=2, block_size=64, vocab_size=16384), "muon", 6, 2),
], ids=["state", "state, Muon", "activations", "logits, Muon"])  # what takes most
def test_the_peak_of_a_step_is_planned(shape, optimizer, batch_size, micro_steps, bits, tmp_path,
                                       muons_precision):
    """Guards against a plan that says that a run fits which then is out of memory, or that sends
    people to a larger machine."""
    muons_precision(bits)
    found = peak_of_two_steps(EAGER, shape, optimizer, batch_size, micro_steps, bits, World(),
                              tmp_path)
    sizes = sizes_of(**shape)
    tokens = batch_size * sizes.block_size * micro_steps
    planned = estimate_memory(sizes, EAGER, optimizer, tokens, batch_size, bits=bits).peak
    assert 0.9 < planned / found < 1.2, f"planned {planned:,}, found {found:,}"


@pytest.fixture
def one_of_two():
    """The World of one process whose other rank does not exist: what it receives is never written.

    Real exchanges free tensors on threads of their own, which no record shows.
    """
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield World(0, 0, 2)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Set timeout is now only supported")
@pytest.mark.parametrize("shape, optimizer, batch_size, micro_steps, recompute_every", [
    (dict(n_layer=6, n_embd=96, vocab_size=16384), "muon", 1, 1, 1),
    (dict(n_layer=16, n_embd=96, vocab_size=256), "adamw", 1, 1, 1),
    (dict(n_layer=6, n_embd=128, vocab_size=256), "adamw", 1, 2, 0),
    (dict(n_layer=8, block_size=128, vocab_size=256), "adamw", 12, 1, 0),
], ids=["embedding", "weights", "gradients", "activations"])  # what takes most
def test_the_peak_of_a_sharded_step_is_planned(shape, optimizer, batch_size, micro_steps,
                                               recompute_every, tmp_path, muons_precision,
                                               one_of_two):
    """Guards against a plan that says that a sharded run fits which then is out of memory, by
    weights or gradients that stay whole."""
    muons_precision(16)
    layout = Layout(shard=True, recompute_every=recompute_every, compile=False)
    found = peak_of_two_steps(layout, shape, optimizer, batch_size, micro_steps, 16, one_of_two,
                              tmp_path)
    sizes = sizes_of(**shape)
    tokens = batch_size * sizes.block_size * micro_steps * 2
    planned = estimate_memory(sizes, layout, optimizer, tokens, batch_size, 2).peak
    assert 0.9 < planned / found < 1.2, f"planned {planned:,}, found {found:,}"


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
