"""Muon in one process; tests/training/test_sharded.py has it in several.

python -m pytest tests/training/test_muon.py
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptlib.training.optim import Muon

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
    of the demo six times as long; and against other updates than torch's, but for rounding.
    """
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    expected, _ = step_of(torch.optim.Muon)
    found, dtypes = step_of(Muon)
    assert dtypes == {torch.bfloat16 if has_bfloat16 else torch.float32}
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())
