"""What --preset, --optimizer and --lr_schedule make of the learning rate.

    python -m pytest tests/training/test_presets.py
"""

import pytest
import torch

from gptlib.training.presets import PRESETS
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizers, get_lr, parse_flags


def rate_of(*argv):
    return TrainConfig(**parse_flags(argv)).max_lr


@pytest.mark.parametrize("argv, rate", [
    ([], 6e-4),
    (["--optimizer", "muon"], 1.8e-3),
    (["--preset", "gpt2", "--optimizer", "muon"], 1.8e-3),
    (["--preset", "gpt2-xl", "--optimizer", "muon"], 1.8e-3 * (768 / 1600) ** 0.5),
    (["--preset", "gpt3-2.7b", "--optimizer", "muon"], 1.8e-3 * (768 / 2560) ** 0.5),
    (["--preset", "gpt2-xl", "--optimizer", "muon", "--max_lr", "1e-3"], 1e-3),
    (["--preset", "gpt2-xl"], 2e-4),
    (["--preset", "gpt2-xl", "--optimizer", "adamw"], 2e-4),
    (["--preset", "demo"], PRESETS["demo"]["max_lr"]),
    (["--preset", "demo", "--optimizer", "muon"], PRESETS["demo"]["max_lr"]),
    (["--preset", "demo", "--optimizer", "adamw"], 6e-4),
])
def test_the_rate_of_a_preset_and_optimizer(argv, rate):
    """Guards against AdamW's rate for Muon, which wastes two thirds of what Muon brings, and Muon's
    for AdamW, which diverges."""
    assert rate_of(*argv) == pytest.approx(rate)


def test_a_resumed_run_keeps_its_rate():
    """Guards against a command line with --optimizer muon that resumes and brings back the default
    rate."""
    assert "max_lr" not in parse_flags(["--optimizer", "muon", "--auto_resume"])


@pytest.mark.parametrize("width", [64, 256])
def test_muons_update_has_one_spectral_norm_at_any_width(width):
    """Guards against a default rate in another scale, which the root of its width would not fit.

    The norm of the update is measured, on a square matrix and after one step of torch.optim.Muon.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 64, 1, 1, width))
    cfg = TrainConfig(optimizer="muon", n_embd=width, n_head=1, weight_decay=0.0)
    muon = configure_optimizers(model, cfg, torch.device("cpu"))[1]
    matrix = model.transformer.h[0].attn.c_proj.weight
    before = matrix.detach().clone()
    matrix.grad = torch.randn_like(matrix)
    muon.step()
    norm = torch.linalg.matrix_norm(matrix.detach() - before, ord=2).item()
    # 0.2 * 1.8e-3 * sqrt(768), times what five iterations leave of a norm of 1: 0.7 to 1.2
    assert norm == pytest.approx(0.2 * 1.8e-3 * 768 ** 0.5, rel=0.3)


@pytest.mark.parametrize("schedule, rates", [
    ("cosine", [5e-4, 1e-3, 1e-3, 7.75e-4, 5.5e-4, 3.25e-4, 1e-4]),
    ("linear", [5e-4, 1e-3, 1e-3, 7e-4, 5.5e-4, 4e-4, 1e-4]),
    ("wsd", [5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-4]),
])
def test_schedules_by_hand(schedule, rates):
    """Guards against a schedule that ends above its end, or that falls at the wrong time."""
    cfg = TrainConfig(max_steps=62, warmup_steps=2, max_lr=1e-3, min_lr=1e-4, lr_schedule=schedule)
    steps = [0, 1, 2, 22, 32, 42, 62]  # a third, a half and two thirds of the way down
    assert [get_lr(step, cfg) for step in steps] == pytest.approx(rates)


def test_wsd_falls_in_the_last_fifth():
    """Guards against a decay that begins before 80 %, is no straight line, or leaves the range."""
    cfg = TrainConfig(max_steps=100, warmup_steps=0, max_lr=1.0, min_lr=0.0, lr_schedule="wsd")
    assert [get_lr(step, cfg) for step in (79, 80, 85, 90, 95, 100, 200)] == pytest.approx(
        [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
