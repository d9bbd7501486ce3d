"""Every path that a GPU takes, against float32 on the CPU. Under five minutes on one GPU.

    python -m pytest -m gpu                             # on a machine with a CUDA GPU
    GPU_TESTS_ON=cpu python -m pytest tests/test_gpu.py  # a rehearsal: the same code on a CPU
"""

import contextlib
import copy
import functools
import json
import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import serving_helpers as serving
import torch
from conftest import (ROOT, TINY, english, environment, flags, read_log, run, write_dataset)
from test_scoring import BYTES, flat, made_examples, tokens_of
from test_scoring import make_model as make_scored_model
from test_optim import NoHostWait

import train_gpt2
from gptlib.training import memory, scoring
from gptlib.inference.engine import Engine
from gptlib.data.loader import TokenLoader
from gptlib.runtime import resolve_device
from gptlib.distributed import World
from gptlib.training.console import Console
from gptlib.training.evaluation import Evaluator
from stepping import take_step
from inference import generate_text
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizers, train

pytestmark = pytest.mark.gpu
REHEARSAL = os.environ.get("GPU_TESTS_ON") == "cpu"
N_STEPS = 20 if REHEARSAL else 50
TRAINING = {**TINY, "n_embd": 128, "block_size": 128, "total_batch_size": 4096, "batch_size": 16,
            "max_steps": N_STEPS, "max_lr": 2e-3, "warmup_steps": 10, "eval_interval": N_STEPS,
            "val_tokens": 10000, "num_samples": 0, "checkpoint_interval": 1000}
if REHEARSAL:
    TRAINING |= dict(n_embd=32, block_size=32, total_batch_size=512, batch_size=8)

model, home = serving.model, serving.home


@pytest.fixture(scope="module")
def device():
    """The GPU; in a rehearsal the CPU."""
    if REHEARSAL:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU; GPU_TESTS_ON=cpu rehearses these tests on a CPU")
    # --deterministic needs it, from the first product of the process on
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True, scope="module")
def quick_compiler():
    """In a rehearsal graphs are traced and then run as they are: compiling C++ takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        if REHEARSAL:
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset that a run of 50 steps does not read to its end twice."""
    train, val = english(150_000 if REHEARSAL else 250_000, 1), english(12_000, 2)
    return write_dataset(tmp_path_factory.mktemp("gpu") / "data", [train], [val])


@pytest.fixture(autouse=True)
def settings_of_torch():
    """What prepare_device sets for the whole process is as before, for the next test."""
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def records_of(log_dir, kind="train"):
    lines = (log_dir / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses_of(log_dir):
    return [record["loss"] for record in records_of(log_dir)]


# -----------------------------------------------------------------------------
# training beside float32 on the CPU


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    """A function optimizer -> (losses of the steps, validation loss), in float32 on the CPU."""
    known = {}

    def expected(optimizer):
        if optimizer not in known:
            log_dir = tmp_path_factory.mktemp(optimizer) / "log"
            cfg = TrainConfig(**{**TRAINING, "optimizer": optimizer}, data_root=str(data),
                              log_dir=str(log_dir))
            val_loss = train(cfg)
            known[optimizer] = losses_of(log_dir), val_loss
        return known[optimizer]

    return expected


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype, tolerance", [
    ("float32", 0.01), ("bfloat16", 0.05), ("float16", 0.02)])
def test_50_steps_follow_float32_on_the_cpu(device, data, expected, tmp_path, dtype, tolerance,
                                            compiled, optimizer):
    """Guards against a kernel, a graph or a scaler that trains, but not the same model."""
    if dtype == "float32" and compiled:
        pytest.skip("time: bfloat16 and float16 are compiled")
    settings = {**TRAINING, "device": str(device), "dtype": dtype, "compile": compiled,
                "optimizer": optimizer}
    val_loss = train(TrainConfig(**settings, data_root=str(data), log_dir=str(tmp_path / "log")))
    losses, (expected_losses, expected_val_loss) = losses_of(tmp_path / "log"), expected(optimizer)
    assert len(losses) == N_STEPS
    assert expected_losses[-1] < expected_losses[0] - 1, "the reference learns nothing"
    worst = max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True))
    assert worst < tolerance, (losses, expected_losses)
    assert val_loss == pytest.approx(expected_val_loss, abs=tolerance)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_never_makes_the_host_wait(device, optimizer, dtype):
    """Guards against a read between forward pass and update, for which the GPU would idle."""
    cfg = TrainConfig(**{**TRAINING, "optimizer": optimizer})
    trained, take = make_step(cfg, device, dtype)
    take()  # allocates, and makes the optimizers' state
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
    try:
        with no_host_wait(device, optimizer):
            loss, norm = take()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(loss.item() + norm.item())


def no_host_wait(device, optimizer):
    """On a CPU, where torch's Muon may read: the guard of the tests that run without a GPU."""
    if device.type == "cuda" or optimizer == "muon":
        return contextlib.nullcontext()
    return NoHostWait()


def make_step(cfg, device, dtype):
    """A model, and a function that takes a step of two micro-batches with it."""
    torch.manual_seed(1)
    trained = GPT(GPTConfig(cfg.block_size, 320, 2, 2, cfg.n_embd)).to(device)
    optimizers = configure_optimizers(trained, cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    x, y = torch.randint(257, (2, 16, cfg.block_size), device=device)
    n = cfg.total_batch_size // 2
    autocast = torch.autocast(device.type, dtype)

    def take():
        return take_step(trained, [(x, y, n), (y, x, n)], optimizers, scaler, autocast, 1e-3, cfg)

    return trained, take


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("n_before", [0, 2])
def test_a_bad_step_is_skipped_on_the_device(device, optimizer, n_before):
    """Guards against weights of NaN, and against a step after it that is not as without it."""
    cfg = TrainConfig(**{**TRAINING, "optimizer": optimizer})
    states = []
    for is_disturbed in (False, True):
        trained, take = make_step(cfg, device, torch.bfloat16)
        for _ in range(n_before):
            take()
        if is_disturbed:
            handle = trained.lm_head.weight.register_hook(lambda grad: grad * math.nan)
            assert not take()[1].isfinite()
            handle.remove()
        take()
        states.append(copy.deepcopy(trained.state_dict()))
    torch.testing.assert_close(*states, rtol=0, atol=1e-6)


class Lines(Console):
    """Keeps what it would report."""

    def __init__(self, device):
        super().__init__(None, device, World(), 20, 1, 1, late=True)
        self.lines = []

    def _report(self, step, loss, lr, norm, seconds):
        self.lines.append((step, loss, norm, seconds))


def test_the_log_reads_each_step_late_and_whole(device):
    """Guards against figures that are read before they have arrived, or of the step after."""
    loss = torch.zeros((), device=device)
    work = torch.randn(1000, 1000, device=device)
    with Lines(device) as log:
        for step in range(20):
            log.step_begins()
            for _ in range(10 if REHEARSAL else 200):
                work = torch.tanh(work @ work)
            loss = loss + 1 + 0 * work.sum()
            log.step_ended(step, loss, 0.1, loss * 2)
            assert len(log.lines) == step
    assert [line[:3] for line in log.lines] == [(i, i + 1.0, 2 * i + 2.0) for i in range(20)]
    assert all(0 < seconds < 60 for *_, seconds in log.lines)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_validation_equals_that_of_the_cpu(device, data, compiled):
    """Guards against chunks, padding or a compiled graph that lose tokens of the split."""
    torch.manual_seed(1)
    block_size = TRAINING["block_size"]
    scored = GPT(GPTConfig(block_size, 320, 2, 2, 64)).eval()
    for p in scored.parameters():
        torch.nn.init.normal_(p, std=0.2)
    loader = TokenLoader(data, "val", block_size)
    exact = torch.autocast("cpu", enabled=False)
    on_cpu = Evaluator(scored, torch.device("cpu"), exact, batch_size=7)
    wanted = on_cpu.validation_loss(loader, 10**9)
    scored.to(device)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2)):
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        evaluator = Evaluator(scored, device, autocast, batch_size=7, compile=compiled)
        loss = evaluator.validation_loss(loader, 10**9)
        assert loss == pytest.approx(wanted, rel=tolerance)


# -----------------------------------------------------------------------------
# kill and resume, several processes

QUICK_COMPILER = """
import functools, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")
"""
KILLED = """
import os, signal, train_gpt2
from gptlib.training.console import Console
report = Console._report
def report_and_die(console, step, *args):
    report(console, step, *args)
    if step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
Console._report = report_and_die
train_gpt2.run_main(train_gpt2.main)
"""


def run_code(code, *args, cwd):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, text=True,
                          capture_output=True, timeout=300,
                          env={**environment(), "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_kill_and_resume_repeat_bit_for_bit(device, data, tmp_path, monkeypatch, compiled):
    """Guards against a kernel that adds up in any order, and state that a checkpoint lacks."""
    settings = {**TRAINING, "max_steps": 20, "checkpoint_interval": 5, "eval_interval": 10,
                "dropout": 0.1, "device": str(device), "dtype": "bfloat16", "compile": compiled,
                "deterministic": True, "optimizer": "muon", "num_samples": 1,
                "data_root": data, "auto_resume": True}

    def run_to_the_end(log_dir):
        argv = ["train_gpt2.py", *flags(**settings, log_dir=log_dir)]
        monkeypatch.setattr("sys.argv", argv)
        train_gpt2.main()

    run_to_the_end(tmp_path / "whole")
    killed = run_code(QUICK_COMPILER * REHEARSAL + KILLED,
                      *flags(**settings, log_dir=tmp_path / "killed"), cwd=tmp_path)
    assert killed.returncode == -9, killed.stderr
    assert 10 <= max(read_log(tmp_path / "killed")["train"]) < 19
    run_to_the_end(tmp_path / "killed")
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    assert read_log(tmp_path / "killed") == read_log(tmp_path / "whole")
    ours, theirs = (torch.load(tmp_path / name / "model_00020.pt", weights_only=True)
                    for name in ("killed", "whole"))
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
    for one, other in zip(ours["optimizer"], theirs["optimizer"], strict=True):
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
        assert one["param_groups"] == other["param_groups"]


ONE_PROCESS = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from gptlib.distributed import any_rank, join
from gptlib.runtime import prepare_device, resolve_device
from train_gpt2 import GPT, GPTConfig, TrainConfig, Trainer, configure_optimizers

def steps(device, wrap):
    torch.manual_seed(1)
    cfg = TrainConfig(total_batch_size=256)
    raw_model = GPT(GPTConfig(16, 64, 2, 2, 128)).to(device)
    optimizers = configure_optimizers(raw_model, cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    model = wrap(raw_model)
    x, y = torch.randint(64, (2, 8, 16), device=device)
    autocast = torch.autocast(device.type, torch.bfloat16)
    micro_batches = [(x, y, 128, False), (y, x, 128, True)]
    trainer = Trainer(model, optimizers, scaler, autocast, device, 256)
    return [trainer.step(iter(micro_batches), 1e-3)[0].item() for _ in range(5)]

def wrap_ddp(raw_model):
    device_ids = [device.index] if device.type == "cuda" else None
    compiled = torch.compile(raw_model, backend=sys.argv[2])
    return DDP(compiled, device_ids=device_ids, bucket_cap_mb=1, gradient_as_bucket_view=True)

with join() as world:
    device = resolve_device(sys.argv[1], world.local_rank)
    prepare_device(device)
    total = torch.ones(3, device=device)
    dist.all_reduce(total)
    backend = dist.get_backend_config()
    assert total.sum().item() == 3 and not any_rank(False, world)
    assert ("nccl" in str(backend)) == (device.type == "cuda"), backend
    plain, distributed_steps = steps(device, lambda model: model), steps(device, wrap_ddp)
    assert torch.allclose(torch.tensor(plain), torch.tensor(distributed_steps), atol=5e-3)
    print("the steps are equal:", plain[0] > plain[-1])
"""


def test_one_process_of_torchrun_trains_by_nccl(device, tmp_path, monkeypatch):
    """Guards against a process group, or DDP around a compiled model, that fails on the first
    host with GPUs."""
    (tmp_path / "steps.py").write_text(ONE_PROCESS)
    backend = "aot_eager" if REHEARSAL else "inductor"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = run(tmp_path / "steps.py", device.type, backend, nproc=1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the steps are equal: True" in done.stdout


def test_torchrun_gives_the_losses_of_one_process(device, data, expected, tmp_path):
    """Guards against training under torchrun that differs from a plain start."""
    settings = {**TRAINING, "max_steps": 10, "device": device.type, "dtype": "bfloat16"}
    done = run("train_gpt2.py", *flags(**settings, data_root=data), cwd=tmp_path, nproc=1)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = losses_of(tmp_path / "log")
    cfg = TrainConfig(**settings, data_root=str(data), log_dir=str(tmp_path / "plain"))
    train(cfg)
    assert losses == pytest.approx(losses_of(tmp_path / "plain"), abs=5e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharded_on_one_gpu_equals_plain(device, data, tmp_path, optimizer):
    """Guards against FSDP, Muon's exchange of rows or a checkpoint directory that fails for the
    first time on several GPUs: one GPU goes through all of it."""
    settings = {**TRAINING, "max_steps": 10, "checkpoint_interval": 5, "device": device.type,
                "dtype": "bfloat16", "compile": not REHEARSAL, "optimizer": optimizer}
    sharded = dict(settings, data_root=data, shard=True, largest_file=0)
    train(TrainConfig(**{**settings, "compile": False}, data_root=str(data),
                      log_dir=str(tmp_path / "plain")))
    expected = losses_of(tmp_path / "plain")
    done = run("train_gpt2.py", *flags(**sharded), cwd=tmp_path, nproc=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(tmp_path / "log") == pytest.approx(expected, abs=0.02)
    middle = tmp_path / "log" / "model_00005.pt"
    assert middle.is_dir()
    done = run("train_gpt2.py", *flags(**sharded, resume=True, checkpoint_path=middle),
               cwd=tmp_path, nproc=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(tmp_path / "log") == pytest.approx(expected, abs=0.02)


def test_two_gpus_give_the_losses_of_one(device, data, tmp_path):
    """Guards against gradients that are not added up, and ranks on one another's GPU."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    settings = {**TRAINING, "max_steps": 10, "device": device.type, "dtype": "bfloat16",
                "compile": not REHEARSAL}
    done = run("train_gpt2.py", *flags(**settings, data_root=data), cwd=tmp_path, nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    cfg = TrainConfig(**{**settings, "compile": False}, data_root=str(data),
                      log_dir=str(tmp_path / "one"))
    train(cfg)
    ours, theirs = losses_of(tmp_path / "log"), losses_of(tmp_path / "one")
    assert ours == pytest.approx(theirs, abs=0.02)


# -----------------------------------------------------------------------------
# memory


@contextlib.contextmanager
def little_memory(device, monkeypatch, n_bytes):
    """Let a process have n_bytes of the device's memory beside what it holds."""
    if device.type != "cuda":
        monkeypatch.setattr(memory, "free_host_memory", lambda: n_bytes)
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    held = torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction((held + n_bytes) / total, device)
    try:
        yield
    finally:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_batch_size_0_finds_what_fits(device, data, tmp_path, monkeypatch):
    """Guards against a search that ends at one sequence, or whose answer does not fit a step."""
    block_size = TRAINING["block_size"]
    settings = {**TRAINING, "batch_size": 0, "total_batch_size": 512 * block_size, "max_steps": 2,
                "device": str(device), "dtype": "bfloat16"}
    n_bytes = (8 << 20) if REHEARSAL else (256 << 20)
    with little_memory(device, monkeypatch, n_bytes):
        train(TrainConfig(**settings, data_root=str(data), log_dir=str(tmp_path / "log")))
    found = records_of(tmp_path / "log", "config")[0]["batch_size"]
    assert 1 < found < 512
    assert found & (found - 1) == 0
    assert len(losses_of(tmp_path / "log")) == 2


OUT_OF_MEMORY = """
import sys, torch, train_gpt2
if torch.cuda.is_available() and "--device=cpu" not in sys.argv:
    torch.cuda.set_per_process_memory_fraction(1e-3)
else:
    def forward(*args, **settings):
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
    train_gpt2.GPT.forward = forward
train_gpt2.run_main(train_gpt2.main)
"""


def test_out_of_memory_is_told_in_a_line(device, data, tmp_path):
    """Guards against a page of traceback where the remedy is a smaller --batch_size."""
    settings = {**TRAINING, "batch_size": 256, "total_batch_size": 1 << 17, "device": device.type}
    done = run_code(OUT_OF_MEMORY, *flags(**settings, data_root=data), cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "out of memory at --batch_size 256" in done.stderr


# -----------------------------------------------------------------------------
# the engine and the server


@pytest.fixture(scope="module")
def long_model(device):
    """A model with a context of four sizes of graphs, and random weights that tell tokens apart."""
    torch.manual_seed(3)
    made = GPT(GPTConfig(64 if REHEARSAL else 1024, 320, 2, 2, 64))
    for name, p in made.named_parameters():
        is_norm_weight = "ln_" in name and "weight" in name
        torch.nn.init.normal_(p, mean=float(is_norm_weight), std=0.4 if p.dim() == 2 else 0.1)
    return made.to(device).eval().requires_grad_(False)


def largest_gap(uncached, prompt, tokens):
    """By how much the likeliest token's logit exceeds that of the token taken, at most; by one
    whole forward pass over all of them."""
    idx = torch.tensor([prompt + tokens[:-1]], device=uncached.lm_head.weight.device)
    logits = uncached(idx)[0][0, len(prompt) - 1:, :257].float()
    taken = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    return (logits.max(dim=1).values - taken).max().item()


@pytest.mark.parametrize("slots", range(1, 4 if REHEARSAL else 9))
@pytest.mark.parametrize("compiled", [False, True], ids=["graphs", "compiled"])
def test_the_engine_follows_the_uncached_model(device, long_model, slots, compiled, monkeypatch):
    """Guards against graphs of one shape that read another's cache, anywhere in the context, and
    against one that is first recorded in service."""
    if compiled and slots not in (1, 3):
        pytest.skip("time: one slot and three are compiled")
    block_size = long_model.config.block_size
    engine = Engine(long_model, slots, n_vocab=257, compile=compiled)
    engine.warm_up()
    n_graphs = len(getattr(engine.decode_step, "graphs", ()))
    rng = random.Random(slots)
    requests = []
    for i in range(slots + 2):  # two wait for a slot
        prompt = [rng.randrange(256) for _ in range(rng.randrange(1, 20))]
        longest = block_size - len(prompt)
        length = longest if i == 0 else rng.randrange(1, longest)
        requests.append(engine.submit(prompt, max_length=length, temperature=0))
    while engine.step():
        pass
    for request in requests:
        assert len(request.tokens) == request.max_length
        assert largest_gap(long_model, request.prompt, request.tokens) < 1e-2
    assert len(getattr(engine.decode_step, "graphs", ())) == n_graphs
    assert (n_graphs > 0) == (device.type == "cuda")


def test_an_engine_of_the_last_gpu_runs_in_any_thread(device, long_model):
    """Guards against graphs and events on GPU 0 where the model is on another one."""
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.device_count() - 1)
    twin = copy.deepcopy(long_model).to(device)

    def work():
        engine = Engine(twin, 2, n_vocab=257)
        engine.warm_up()
        request = engine.submit([1, 2, 3], max_length=40, temperature=0)
        while engine.step():
            pass
        return request.tokens

    with ThreadPoolExecutor(1) as thread:
        tokens = thread.submit(work).result()
    assert largest_gap(twin, [1, 2, 3], tokens) < 1e-2


def test_the_server_under_load_answers_as_alone(device, home, model):
    """Guards against answers that change with their neighbours, and requests that get lost."""
    prompts = [f"{i} apples and {i * i} pears" for i in range(40)]
    wanted = [generate_text(model, p, max_length=20, temperature=0) for p in prompts]
    with serving.run_server(home, DEVICE=device.type, SLOTS="8", QUEUE_SIZE="64") as server:
        server.ready()

        def ask(i):
            body = dict(prompt=prompts[i], max_length=20, temperature=0)
            if i % 2:
                return server.post(**body).json()["generated_text"]
            last = serving.events(server.post(stream=True, **body))[-1]
            return last["generated_text"]

        with ThreadPoolExecutor(16) as clients:
            answers = list(clients.map(ask, range(40)))
        server.idle()
        assert answers == wanted
        assert server.stop() == 0


# -----------------------------------------------------------------------------
# HellaSwag


@pytest.mark.parametrize("dtype, rtol, atol", [
    (torch.float32, 1e-3, 1e-3), (torch.bfloat16, 0.05, 0.2)])
def test_hellaswag_scores_as_in_float32_on_the_cpu(device, dtype, rtol, atol):
    """Guards against an attention backend that ignores the mask, or rounds more than it may."""
    scored = make_scored_model()
    examples = made_examples()
    batch = [tokens_of(example, BYTES) for example in examples]
    wanted = flat(scoring.ending_losses(scored, batch))
    exact = torch.autocast("cpu", enabled=False)
    wanted_scores = scoring.evaluate(scored, examples, BYTES, exact)
    scored.to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with autocast:
        losses = flat(scoring.ending_losses(scored, batch))
    torch.testing.assert_close(losses, wanted, rtol=rtol, atol=atol)
    scores = scoring.evaluate(scored, examples, BYTES, autocast)
    assert scores["examples"] == wanted_scores["examples"]
    few = 0 if dtype == torch.float32 else 0.1
    assert abs(scores["acc"] - wanted_scores["acc"]) <= few
    assert abs(scores["acc_norm"] - wanted_scores["acc_norm"]) <= few


def test_a_device_that_is_not_there_is_named(device):
    """Guards against a traceback of CUDA for a wrong --device."""
    count = torch.cuda.device_count()
    with pytest.raises(train_gpt2.UserError, match=f"cuda:{count} is not there"):
        resolve_device(f"cuda:{count}")
