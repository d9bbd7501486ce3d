"""Steps that are skipped on the device, and Muon in one process beside torch's.

    python -m pytest tests/training/test_optim.py

tests/training/test_sharded.py has Muon in several processes.
"""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptlib.training.optim import Muon, skip_if_not_finite
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizers

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
NAN = torch.tensor(math.nan)
ONE = torch.tensor(1.0)


class NoHostWait(TorchDispatchMode):
    """Raises where the host asks for a tensor's value, for which it would wait on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
        assert function._schema.name not in waits, f"{function} makes the host wait"
        return function(*args, **(kwargs or {}))


class Setup:
    """A tiny model and its optimizers."""

    def __init__(self, optimizer="adamw", fused=True):
        torch.manual_seed(1)
        self.model = GPT(GPTConfig(16, 64, 2, 2, 32))
        if fused:
            cfg = TrainConfig(optimizer=optimizer, max_lr=1e-2)
            self.optimizers = configure_optimizers(self.model, cfg, CPU)
        else:
            self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=False)]

    def step(self, bad=None):
        """A step on gradients of which one is `bad`, if that is given."""
        idx = torch.arange(32).view(2, 16)
        _, loss = self.model(idx, idx.flip(0))
        loss.backward()
        if bad is not None:
            self.model.lm_head.weight.grad[0, 0] = bad
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        for optimizer in self.optimizers:
            skip_if_not_finite(optimizer, norm)
            optimizer.step()
            optimizer.zero_grad()

    def state(self):
        states = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        return copy.deepcopy((self.model.state_dict(), states))


def assert_same(state, expected):
    torch.testing.assert_close(state, expected, rtol=0, atol=0, equal_nan=True)


SETUPS = pytest.mark.parametrize("kind", [("adamw", True), ("muon", True), ("adamw", False)],
                                 ids=["fused AdamW", "Muon", "AdamW that is not fused"])


@SETUPS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_leaves_weights_and_moments(kind, bad):
    """Guards against weights of NaN, decayed weights, and moments or a bias correction that count
    a step which never was."""
    run = Setup(*kind)
    run.step()
    before = run.state()
    run.step(bad)
    assert_same(run.state(), before)


@SETUPS
def test_the_step_after_a_bad_one_is_taken(kind):
    """Guards against a mark of the bad step that skips all later ones."""
    run, undisturbed = Setup(*kind), Setup(*kind)
    for setup in (run, undisturbed):
        setup.step()
    run.step(math.nan)
    for setup in (run, undisturbed):
        setup.step()
    assert_same(run.state(), undisturbed.state())


@SETUPS
def test_a_bad_first_step_changes_nothing_later(kind):
    """Guards against moments that a skipped first step leaves behind."""
    run, undisturbed = Setup(*kind), Setup(*kind)
    run.step(math.nan)
    for setup in (run, undisturbed):
        setup.step()
    assert_same(run.state(), undisturbed.state())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_skipping_never_makes_the_host_wait(optimizer):
    """Guards against a read of the norm before the update: on CUDA the device would idle until the
    host has queued the next step."""
    run = Setup(optimizer)
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    with NoHostWait():
        for norm in (ONE, NAN):
            for one in run.optimizers:
                skip_if_not_finite(one, norm)
                one.step()


def test_the_guard_sees_a_read():
    """Guards against a NoHostWait that finds neither .item() nor a condition on a tensor."""
    for read in (lambda: torch.ones(1).item(), lambda: bool(torch.ones(1) > 0)):
        with pytest.raises(AssertionError, match="host wait"), NoHostWait():
            read()


# -----------------------------------------------------------------------------
# Muon

SHAPES = [(64, 32), (32, 64), (5, 7), (64, 32), (1, 3)]
OPTIONS = dict(lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


class Products(TorchDispatchMode):
    """Records the dtypes of matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.dtypes.add(args[-1].dtype)
        return func(*args, **kwargs or {})


def step_of(Optimizer):
    """What one step adds to each of some matrices, and the dtypes of its products."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer = Optimizer(params, **OPTIONS)
    with Products() as products:
        optimizer.step()
    return [p.detach() - b for p, b in zip(params, before, strict=True)], products.dtypes


@pytest.mark.parametrize("has_bfloat16, tolerance", [(False, 0.06), (True, 0.005)])
def test_a_step_is_torchs_in_the_precision_that_the_cpu_has(monkeypatch, has_bfloat16, tolerance):
    """Guards against products in bfloat16 on a CPU without instructions for it, which make a step
    of the demo six times as long, and against updates that differ from torch's by more than
    rounding."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    expected, _ = step_of(torch.optim.Muon)
    found, dtypes = step_of(Muon)
    assert dtypes == {torch.bfloat16 if has_bfloat16 else torch.float32}
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())
