"""--tuning: what is asked for arrives at torch, and none of it changes what a step computes.

    python -m pytest tests/training/test_tuning.py
"""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment

from gptlib.common import UserError
from gptlib.tuning import Tuning, parse_tuning
from train_gpt2 import TrainConfig


def test_without_choices_torch_has_its_defaults():
    """Guards against a default that changes the program of a run without being asked for."""
    assert parse_tuning("") == Tuning()
    assert Tuning().compile_options() == {}
    assert Tuning().ddp_options() == dict(bucket_cap_mb=25, gradient_as_bucket_view=True)


def test_each_choice_arrives():
    """Guards against a choice that is accepted and has no effect."""
    every = parse_tuning("bucket_mb=100, keep_gradients,max_autotune")
    assert every == Tuning(100, True, False, True)
    assert every.ddp_options()["bucket_cap_mb"] == 100
    both = dict(coordinate_descent_tuning=True, max_autotune=True)
    assert every.compile_options() == dict(options=both)
    alone = parse_tuning("coordinate_descent").compile_options()
    assert alone == dict(options=dict(coordinate_descent_tuning=True))


def test_torch_knows_the_options():
    """Guards against an option that this torch no longer has, which only a GPU would tell."""
    options = parse_tuning("coordinate_descent,max_autotune").compile_options()
    torch.compile(lambda x: x + 1, **options)  # checks the names at once


@pytest.mark.parametrize("text, complaint", [
    ("buckets=3", "choose from bucket_mb"),
    ("bucket_mb", "expected bucket_mb=N"),
    ("bucket_mb=0", "expected bucket_mb=N"),
    ("bucket_mb=-1", "expected bucket_mb=N"),
    ("keep_gradients=no", "write keep_gradients alone"),
])
def test_a_wrong_choice_is_named(text, complaint):
    """Guards against a misspelt choice that silently does nothing for a night."""
    with pytest.raises(UserError, match=complaint):
        TrainConfig(tuning=text)


STEPS_OF_TWO_RANKS = """
import hashlib
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizers, take_step
from gptlib.distributed import distributed

def train(world, tuning, compiled, optimizer):
    torch.manual_seed(1)
    torch.compiler.reset()
    cfg = TrainConfig(total_batch_size=256, tuning=tuning, optimizer=optimizer)
    raw_model = GPT(GPTConfig(16, 64, 2, 2, 128))
    optimizers = configure_optimizers(raw_model, cfg, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model = torch.compile(raw_model, backend="aot_eager") if compiled else raw_model
    model = DDP(model, **cfg.tuned.ddp_options())
    autocast = torch.autocast("cpu", enabled=False)
    result, in_buckets = hashlib.sha256(), []
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + world.rank)
        micro_batches = []
        for _ in range(4):
            idx = torch.randint(64, (2, 17), generator=generator)
            micro_batches.append((idx[:, :-1].contiguous(), idx[:, 1:].contiguous(), 32))
        loss, norm = take_step(model, micro_batches, optimizers, scaler, autocast, 1e-3, cfg, world)
        result.update(str((loss.item(), norm.item())).encode())
        in_buckets.append(all(p.grad is not None for p in raw_model.parameters()))
    for p in raw_model.parameters():
        result.update(p.detach().numpy().tobytes())
    return result.hexdigest(), in_buckets[-1]

with distributed() as world:
    for compiled in (False, True):
        optimizer = "muon" if compiled else "adamw"
        plain, _ = train(world, "", compiled, optimizer)
        for tuning in ("bucket_mb=1", "keep_gradients", "keep_gradients,bucket_mb=100")[compiled:]:
            result, kept = train(world, tuning, compiled, optimizer)
            assert kept == ("keep_gradients" in tuning), (tuning, kept)
            assert result == plain, (tuning, compiled)
    if world.rank == 0:
        print("all are equal")
"""


def test_two_ranks_compute_the_same_bit_for_bit(tmp_path):
    """Guards against buckets or kept gradients that lose a micro-batch's gradient,
    add the last step's again, or exchange them in every micro-step."""
    script = tmp_path / "steps.py"
    script.write_text(STEPS_OF_TWO_RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2", str(script)]
    done = subprocess.run(torchrun, cwd=ROOT, text=True, capture_output=True, timeout=300,
                          env={**environment(), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all are equal" in done.stdout
