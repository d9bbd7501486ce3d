"""What tests/training/test_sharded.py checks inside of several processes, in one torchrun.

    torchrun --standalone --nproc_per_node=3 tests/sharded_checks.py OUT CHECK...

Each rank writes {check: "ok", or why it failed} to OUT/RANK.json.
"""

import ctypes
import errno
import functools
import gc
import json
import os
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import conftest  # noqa: F401 - it puts the repository on the path
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from byte_model import make_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gptlib.checkpoints import sharded_tensors
from gptlib.training import optim as muon, parallel
from gptlib.checkpoints.formats import load_checkpoint
from gptlib.common import UserError
from gptlib.data.tokenizer import export_tokenizer
from gptlib.training.memory import estimate_memory, model_sizes, planned_batch_size
from gptlib.training.optim import Muon
from gptlib.training.parallel import Layout, create_on, train_with
from gptlib.distributed import map_leaves, whole
from gptlib.checkpoints.saver import Saver, list_checkpoints
from gptlib.checkpoints.start import load_start
from gptlib.distributed import COLLECTIVE_TIMEOUT, join
from stepping import take_step
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizers

SHAPES = [(64, 32), (32, 64), (5, 7), (2, 9), (64, 32), (1, 3)]  # some with fewer rows than ranks
OPTIONS = dict(lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
CPU = torch.device("cpu")


def expect(condition, text):
    if not condition:
        raise AssertionError(text)


def steps_of_muon(optimizer, params, place):
    """Three steps on the same gradients on every rank; returns the whole weights and momenta."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p, shape in zip(params, SHAPES, strict=True):
            p.grad = place(torch.randn(shape, generator=generator))
        optimizer.step()
    optimizer.state_dict()  # sends each momentum from its owner to the other ranks
    momenta = [optimizer.state[p]["momentum_buffer"] for p in params]
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in [*params, *momenta]]


def make_params(place):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(place(torch.randn(shape, generator=generator))) for shape in SHAPES]


def check_muon(world, place, **options):
    """Whatever the layout, the weights equal those of one process exactly.

    tests/training/test_muon.py compares one process with torch.optim.Muon.
    """
    alone = make_params(torch.clone)
    expected = steps_of_muon(Muon(alone, **OPTIONS), alone, torch.clone)
    ours = make_params(place)
    found = steps_of_muon(Muon(ours, world, **OPTIONS), ours, place)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        expect(torch.equal(a, b), f"tensor {number} differs by {(a - b).abs().max()}")


def muon_replicated(world, folder):
    check_muon(world, torch.clone)


def muon_sharded(world, folder):
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("shard",))
    check_muon(world, lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))


def muon_in_parts(world, folder):
    """The same where sharded matrices are updated some after the others."""
    exchange, limit = muon.RowExchange, muon.MUON_ELEMENTS_AT_ONCE
    elements = []

    def recorded(params, group):
        elements.append(sum(p.numel() for p in params) // world.size)
        return exchange(params, group)

    muon.RowExchange, muon.MUON_ELEMENTS_AT_ONCE = recorded, 1400
    try:
        muon_sharded(world, folder)
    finally:
        muon.RowExchange, muon.MUON_ELEMENTS_AT_ONCE = exchange, limit
    # of 2048, 2048, 35, 18, 2048 and 3 elements over three ranks, in each of the three steps
    expected = [(2048 + 2048 + 35 + 18) // 3, (2048 + 3) // 3]
    expect(elements == expected * 3, f"{elements}, expected {expected} in each step")


def model_of(world, seed=3, **sizes):
    cfg = TrainConfig(shard=True, compile=False, optimizer="muon")
    tiny = dict(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=10)
    config = GPTConfig(**{**tiny, **sizes})
    torch.manual_seed(seed)
    return create_on(CPU, cfg.layout(), world, lambda: GPT(config)), cfg, config


def initial_weights(world, folder):
    """A sharded model begins with the weights of an unsharded one of the same seed."""
    model, _, config = model_of(world)
    state = {name: p.full_tensor() for name, p in model.state_dict().items()}
    torch.manual_seed(3)
    for name, expected in GPT(config).state_dict().items():
        expect(torch.equal(state[name], expected), name)


def blocks_give_their_weights_back(world, folder):
    """After the forward pass of a training step each rank has its rows alone again, but for what
    lies outside of the blocks, which the backward pass needs first."""
    model, cfg, config = model_of(world)
    train_with(model, cfg.layout(), CPU, world)
    idx = torch.zeros(1, config.block_size, dtype=torch.int64)
    _, loss = model(idx, idx, return_logits=False)
    names = [n for n, p in model.transformer.h.named_parameters() if not isinstance(p, DTensor)]
    expect(names == [], f"whole: {names}")
    loss.backward()


def compiled_blocks(world, folder):
    """Compiled blocks train as uncompiled ones do, with and without recomputation, and one graph
    serves all of them: where sharding breaks it, each block compiles anew in each step."""
    compile, graphs = torch.compile, []

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for recompute in (False, True):
        torch.compile = functools.partial(compile, backend=record)
        try:
            compiled = three_losses(world, compile=True, recompute=recompute)
        finally:
            torch.compile = compile
        torch.compiler.reset()
        expected = three_losses(world, compile=False, recompute=recompute)
        expect(compiled == expected, f"losses {compiled}, expected {expected}")
        of_blocks = [graph for graph in graphs if "c_fc" in graph.code]
        expect(len(of_blocks) == 1, f"{len(of_blocks)} graphs of blocks, expected 1")
        graphs.clear()


def three_losses(world, **flags):
    """This rank's losses of three steps of two micro-batches each."""
    cfg = TrainConfig(shard=True, total_batch_size=64 * world.size, **flags)
    config = GPTConfig(16, 61, 3, 2, 16)
    torch.manual_seed(5)
    model = create_on(CPU, cfg.layout(), world, lambda: GPT(config))
    optimizers = configure_optimizers(model, cfg, CPU, world)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    x, y = torch.randint(61, (2, 2, 16), generator=torch.Generator().manual_seed(world.rank))
    losses = []
    for _ in range(3):
        loss, _ = take_step(train_with(model, cfg.layout(), CPU, world), [(x, y, 32)] * 2,
                            optimizers, scaler, torch.autocast("cpu", enabled=False), 1e-2, cfg,
                            world)
        losses.append(loss.item())
    return losses


def one_batch_size(world, folder):
    """--batch_size 0 of a sharded model: what the rank with the least memory can run, on all."""
    model, _, _ = model_of(world)
    run = model_sizes(model), Layout(shard=True, compile=False), "muon", 16 * 16 * world.size
    needed = {n: estimate_memory(*run, n, world.size, bits=32).peak for n in (1, 4, 8, 16)}
    budget = needed[8] - 1 if world.rank == 1 else 2 * needed[16]
    found = planned_batch_size(*run, budget, 32, world)
    expect(found == 4, f"{found} with {budget} bytes, expected 4: {needed}")
    expect(planned_batch_size(*run, 2 * needed[16], 32, world) == 16, "more than is needed")
    expect(planned_batch_size(*run, 0, 32, world) == 1, "less than one")


def state_of(model, optimizers, config, step):
    return dict(model=model.state_dict(keep_vars=True), config=vars(config), step=step,
                optimizer=[optimizer.state_dict() for optimizer in optimizers], scaler={},
                train_config={}, position=0, rng=[], tokenizer={"name": "gpt2"}, val_loss=None,
                val_step=None)


def one_step(model, optimizers):
    """Gradients of ones, so that the optimizers have a state."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def full_disk(world, folder):
    """One rank without room ends the save on all of them with one line, and spoils nothing."""
    model, cfg, config = model_of(world)
    optimizers = configure_optimizers(model, cfg, CPU, world)
    one_step(model, optimizers)
    saver = Saver(folder, 5, world, as_directory=True)
    saver.save(state_of(model, optimizers, config, 1), wait=True)

    fsync = os.fsync

    def no_room(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = no_room if world.rank == 1 else fsync
    error = None
    try:
        saver.save(state_of(model, optimizers, config, 2))  # a warning
        saver.writing.result()
        saver.save(state_of(model, optimizers, config, 2), wait=True)
    except UserError as raised:
        error = str(raised)
    finally:
        os.fsync = fsync
    expect(error, "no error was raised")
    expect("process 1: No space left on device" in error, error)
    expect("\n" not in error, error)
    dist.barrier()
    expect([path.name for path in list_checkpoints(folder)] == ["model_00001.pt"],
           sorted(os.listdir(folder)))
    expect(not list(folder.glob("*.tmp")), "the half directory is still there")
    expect(load_checkpoint(folder / "latest_checkpoint.pt")["step"] == 1, "the first is damaged")

    # the next ones are saved again, also in place of one of the same name
    saver = Saver(folder, 5, world, as_directory=True)
    saver.save(state_of(model, optimizers, config, 1), wait=True)
    saver.save(state_of(model, optimizers, config, 3))
    saver.__exit__()
    dist.barrier()
    expect(len(list_checkpoints(folder)) == 2, sorted(os.listdir(folder)))


def separate_disks(world, folder):
    """Hosts that share no disk: a checkpoint of which each has a part, under the name of a whole
    one. It is refused at the start, and where the start did not notice, when it is complete."""
    own = folder / str(world.rank)
    own.mkdir()
    expect_error(lambda: Saver(own, 5, world, as_directory=True),
                 "put --log_dir on a disk that all hosts share")
    Saver(folder, 5, world, as_directory=True)
    expect(not list(folder.glob(".shared*")), "the probe is still there")

    model, cfg, config = model_of(world)
    writer = sharded_tensors.DirectoryWriter(
        own / "model_00001.pt", state_of(model, [], config, 1), dist.new_group(backend="gloo"))
    expect_error(lambda: writer.finish(lambda: None), "of another process is not in")
    expect(not list_checkpoints(own), "a part has the name of a whole one")


def copies_wait_as_the_world_does(world, folder):
    """A rank that is gone and is waited for by gloo's half hour, since it holds another copy."""
    groups = parallel.shard_mesh(CPU, world, 1).get_all_groups()
    times = {group._get_backend(CPU).options._timeout for group in groups}
    expect(times == {COLLECTIVE_TIMEOUT}, times)


def expect_error(function, text):
    try:
        function()
    except UserError as error:
        expect(text in str(error), str(error))
        return
    raise AssertionError(f"no error about: {text}")


def training_goes_on(world, folder):
    """What is saved are the tensors at the time of the call, not when they reach the disk."""
    model, cfg, config = model_of(world)
    optimizers = configure_optimizers(model, cfg, CPU, world)
    one_step(model, optimizers)
    expected = whole_state(model, optimizers)
    changed = threading.Event()
    write_data = dcp.FileSystemWriter.write_data

    def slow(self, plan, planner):
        changed.wait(60)
        return write_data(self, plan, planner)

    dcp.FileSystemWriter.write_data = slow
    with Saver(folder, 5, world, as_directory=True) as saver:
        saver.save(state_of(model, optimizers, config, 1))
        one_step(model, optimizers)
        changed.set()
    dcp.FileSystemWriter.write_data = write_data
    dist.barrier()
    saved = load_checkpoint(folder / "model_00001.pt")
    found = [saved["model"], *(optimizer["state"] for optimizer in saved["optimizer"])]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def whole_state(model, optimizers):
    """Copies of the whole weights and of the state of each optimizer."""
    nests = [model.state_dict(), *(optimizer.state_dict()["state"] for optimizer in optimizers)]
    return [map_leaves(nest, lambda tensor: whole(tensor).clone()) for nest in nests]


def die_while_saving(world, folder):
    """Rank 1 is gone in the middle of the second save."""
    model, cfg, config = model_of(world)
    optimizers = configure_optimizers(model, cfg, CPU, world)
    one_step(model, optimizers)
    saver = Saver(folder, 1, world, as_directory=True)
    saver.save(state_of(model, optimizers, config, 1), wait=True)
    if world.rank == 1:
        sharded_tensors.checksum = lambda path: os._exit(9)
    saver.save(state_of(model, optimizers, config, 2), wait=True)


class PeakMemory:
    """The most bytes that this process has allocated inside of the context, beyond `before`, or
    what there was when it began; pages of mapped files do not count."""

    def __init__(self, before=None):
        self.before = before

    def __enter__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.peak = anonymous_memory()
        self.before = self.before or self.peak
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.running = False
        self.thread.join()
        self.peak = max(self.peak, anonymous_memory()) - self.before

    def watch(self):
        while self.running:
            self.peak = max(self.peak, anonymous_memory())
            time.sleep(0.002)


def anonymous_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def memory_of_a_start(world, folder):
    """From a file and from a directory, a rank takes little more memory than its share needs."""
    before = anonymous_memory()  # what the model that is saved leaves behind counts too
    sizes = dict(n_layer=6, n_embd=512, n_head=8)
    model, cfg, config = model_of(world, **sizes)
    n = sum(p.numel() for p in model.parameters())
    cfg.optimizer = "adamw"
    optimizers = configure_optimizers(model, cfg, CPU, world)
    one_step(model, optimizers)
    # Weights and two moments in float32. A rank that reads all of it has four shares: those of the
    # three ranks, and its own beside.
    share = 12 * n / world.size
    for step, as_directory in ((1, False), (2, True)):
        with (PeakMemory() as memory,
              Saver(folder, 0, world, as_directory) as saver):
            saver.save(state_of(model, optimizers, config, step), wait=True)
    found = memory.peak / share
    expect(found < 0.5, f"a directory that training waits for is copied first: {found:.2f} shares")
    del model, optimizers
    dist.barrier()
    for step in (1, 2):
        path = str(folder / f"model_{step:05d}.pt")
        with PeakMemory(before) as memory:
            started = start_from(path, cfg, world)
        found = memory.peak / share
        print(f"rank {world.rank}: a start from {path} takes {found:.2f} shares", file=sys.stderr)
        expect(0.9 < found < 3, f"{path}: {memory.peak / 2**20:.0f} MiB, {found:.2f} shares")
        del started


def start_from(path, cfg, world):
    """What train() makes of a checkpoint: the model and the optimizers."""
    flags = dict(resume=True, checkpoint_path=path, shard=True)
    start = load_start(flags, world, known=())
    model = create_on(CPU, cfg.layout(), world, lambda: GPT.from_checkpoint(start.checkpoint),
                      start.directory)
    optimizers = configure_optimizers(model, cfg, CPU, world)
    start.restore(optimizers, None, CPU, world.rank)
    return start, model, optimizers


def memory_of_hugging_face(world, folder):
    """From one file of Hugging Face's and from several, a rank takes the memory of its share."""
    if world.rank == 0:
        write_hugging_face(folder / "tiny", "1GB", n_embd=12)
        write_hugging_face(folder / "one", "1GB", n_embd=768)
        write_hugging_face(folder / "several", "50MB", n_embd=768)
    dist.barrier()
    start_from_hugging_face(folder / "tiny", world)  # loads transformers
    for name, files in (("one", 1), ("several", 4)):
        expect(len(list(folder.glob(f"{name}/*.safetensors"))) == files, os.listdir(folder / name))
        with PeakMemory() as memory:
            model = start_from_hugging_face(folder / name, world)
        # A rank that reads all of it has four shares: those of the three ranks, and its own.
        share = 4 * sum(p.numel() for p in model.parameters()) / world.size
        found = memory.peak / share
        print(f"rank {world.rank}: {name} takes {found:.2f} shares", file=sys.stderr)
        expect(0.9 < found < 1.5, f"{name}: {memory.peak / 2**20:.0f} MiB, {found:.2f} shares")
        del model


def write_hugging_face(path, max_shard_size, n_embd):
    from transformers import GPT2Config, GPT2LMHeadModel
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=16, n_layer=6, n_embd=n_embd))
    hf.save_pretrained(path, max_shard_size=max_shard_size)
    export_tokenizer(make_tokenizer(), path, 16)


def start_from_hugging_face(path, world):
    start = load_start(dict(init_from=str(path), shard=True), world, known=())
    cfg = TrainConfig(shard=True, compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return create_on(CPU, cfg.layout(), world, lambda: GPT.from_checkpoint(start.checkpoint))


def run_checks(out, names):
    results = {}
    with join() as world:
        for name in names:
            folder = Path(out) / name
            folder.mkdir(exist_ok=True)
            try:
                globals()[name](world, folder)
                results[name] = "ok"
            except Exception:
                results[name] = traceback.format_exc()
                break  # the ranks are no longer in step
        Path(out, f"{world.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_checks(sys.argv[1], sys.argv[2:])
