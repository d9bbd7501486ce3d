"""The validation loss as a GPU computes it, in chunks and of one shape, against the plain one.

    python -m pytest tests/training/test_evaluation.py
"""

import pytest
import torch
from conftest import english, write_dataset
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt2
from gptlib.training import evaluation
from gptlib.data.loader import TokenLoader
from gptlib.training.evaluation import Evaluator, chunked_loss, make_batch_loss
from train_gpt2 import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
V, T = 264, 32
FLOAT32 = torch.autocast("cpu", enabled=False)


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = GPT(GPTConfig(T, V, 2, 2, 32)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def batch(rows):
    idx = torch.randint(257, (rows, T + 1), generator=torch.Generator().manual_seed(2))
    x, y = idx[:, :-1], idx[:, 1:].clone()
    y[0, 20:] = -1
    return x, y


class LargestLogits(TorchDispatchMode):
    """Records the most rows of the vocabulary's width that any tensor has had."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() and out.size(-1) == V:
            self.rows = max(self.rows, out.numel() // V)
        return out


@torch.no_grad()
@pytest.mark.parametrize("head_rows", [33, 50, 64, 96, 10**6])
def test_chunks_give_the_loss_of_the_whole(model, head_rows):
    """Guards against chunks that overlap or are weighted alike though one is short, and against
    padding that counts."""
    x, y = batch(3)
    expected = model(x, y)[1].item()
    with LargestLogits() as largest:
        loss = chunked_loss(model, x, y, head_rows).item()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert largest.rows <= min(head_rows, 96), "the logits of the whole batch were there at once"


@torch.no_grad()
def test_elsewhere_it_is_the_models_own_loss(model):
    """Guards against a CPU run whose validation losses change in the last digit."""
    x, y = batch(3)
    loss = make_batch_loss(model, CPU, 4, compile=True)(x, y)
    assert loss.item() == model(x, y, return_logits=False)[1].item()


@torch.no_grad()
def test_a_gpu_sees_one_shape(model, monkeypatch):
    """Guards against a short last batch that compiles for minutes, or that counts its padding."""
    shapes = []

    def compile_model(function, device, **options):
        def compiled(model, idx, targets, head_rows):
            shapes.append((tuple(idx.shape), tuple(targets.shape)))
            return function(model, idx, targets, head_rows)
        assert options == {"dynamic": False}
        return compiled

    monkeypatch.setattr(evaluation, "compile_model", compile_model)
    loss_of = make_batch_loss(model, torch.device("cuda", 0), 5, compile=True)
    for rows in (5, 3, 1):
        x, y = batch(rows)
        assert loss_of(x, y).item() == pytest.approx(model(x, y)[1].item(), rel=1e-6)
    assert set(shapes) == {((5, T), (5, T))}


def test_the_compiled_loss_evaluates_a_split(tmp_path, model, monkeypatch):
    """Guards against a split that is summed up differently where a GPU computes the losses: here
    truly compiled, on the CPU, with a short last batch and a chunk that is cut short."""
    root = write_dataset(tmp_path / "data", [english(500, 1)], [english(1500, 3)])
    loader = TokenLoader(root, "val", T)
    evaluator = Evaluator(model, CPU, FLOAT32, batch_size=7)
    expected = evaluator.validation_loss(loader, 10**9)
    monkeypatch.setattr(evaluation, "compile_model",
                        lambda function, device, **options: torch.compile(function, **options))
    monkeypatch.setattr(evaluation, "HEAD_ROWS", 100)
    evaluator.batch_loss = make_batch_loss(model, torch.device("cuda", 0), 7, compile=True)
    chunked = evaluator.validation_loss(loader, 10**9)
    assert chunked == pytest.approx(expected, rel=1e-6)


def test_a_run_compiles_its_evaluation(tmp_path, data_root, monkeypatch):
    """Guards against a training loop that evaluates by another function than the compiled one."""
    from conftest import TINY

    def constant(model, device, batch_size, compile):
        assert (batch_size, compile) == (4, False)
        return lambda idx, targets: torch.tensor(2.5)

    monkeypatch.setattr(evaluation, "make_batch_loss", constant)
    cfg = train_gpt2.TrainConfig(**{**TINY, "max_steps": 1, "num_samples": 0},
                                 data_root=str(data_root), log_dir=str(tmp_path / "log"))
    assert train_gpt2.train(cfg) == 2.5
