"""Linear layers for a CPU: packed weights, and logits against products in float64.

    python -m pytest tests/inference/test_cpu_layers.py
"""

import pytest
import torch
from byte_model import CONFIG, N_VOCAB, copy_of, drain, make_model, prompts

from gptlib.inference.cpu_layers import Float32Head, can_give_float32, can_pack, use_cpu_layers
from gptlib.inference.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")


def make_head(weight):
    head = torch.nn.Linear(weight.size(1), weight.size(0), bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.copy_(weight)
    if not can_give_float32(head):
        pytest.skip("this torch has no FBGEMM")
    return head


@pytest.mark.parametrize("scale", [1e-3, 0.02, 3.0])
@pytest.mark.parametrize("rows", [1, 8])
@torch.inference_mode()
def test_logits_are_not_rounded_to_bfloat16(scale, rows):
    """Guards against logits that are made in bfloat16 and widened afterwards."""
    torch.manual_seed(0)
    head = make_head(torch.randn(500, 96) * scale)
    x = (torch.randn(rows, 96) * 5).bfloat16()
    expected = x.double() @ head.weight.double().t()
    found = Float32Head(head)(x)
    assert found.dtype == torch.float32
    error = (found.double() - expected).abs().max() / expected.abs().max()
    error_of_bfloat16 = (head(x).double() - expected).abs().max() / expected.abs().max()
    assert error < 2e-5
    assert error_of_bfloat16 > 1e-3, "else there is nothing to gain"


@torch.inference_mode()
def test_close_large_logits_are_told_apart():
    """Guards against equal logits for tokens that the model tells apart by an eighth of a nat."""
    head = make_head(torch.tensor([[100.0, 0.0], [100.0, 0.125]]))
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    assert head(x).tolist() == [[100.0, 100.0]], "bfloat16 cannot tell them apart"
    assert Float32Head(head)(x).tolist() == [[100.0, 100.125]]


@pytest.mark.parametrize("weight", [1e5, torch.nan, torch.inf])
def test_weights_that_float16_lacks_are_left_alone(weight):
    """Guards against a large weight that becomes infinite."""
    head = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight[0, 0] = weight
    assert not can_give_float32(head)


def test_the_engine_samples_from_float32_logits(monkeypatch):
    """Guards against an engine that leaves the rounding head in the model it decodes with."""
    if not can_pack(torch.bfloat16):
        pytest.skip("this CPU or this torch has no bfloat16 kernels of oneDNN")
    model = copy_of(make_model()).to(torch.bfloat16)
    engine = Engine(model, slots=2, n_vocab=N_VOCAB)
    sampled = []
    sample = engine._sample
    monkeypatch.setattr(engine, "_sample",
                        lambda slot, logits: (sampled.append(logits.clone()), sample(slot, logits)))
    engine.submit([1, 2, 3], max_length=3)
    drain(engine)
    assert [logits.dtype for logits in sampled] == [torch.float32] * 3
    assert sampled[0].shape == (1, CONFIG.vocab_size)
    with torch.inference_mode():
        x = engine.model.hidden(torch.tensor([[1, 2, 3]]))[:, -1]
    expected = x.double() @ model.lm_head.weight.double().t()
    torch.testing.assert_close(sampled[0].double(), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(model.lm_head, torch.nn.Linear), "the caller's model stays as it was"


def test_packed_bfloat16_weights_are_the_same_function():
    """Guards against a packed layout that computes something else, and against copied weights."""
    if not can_pack(torch.bfloat16):
        pytest.skip("this CPU or this torch has no bfloat16 kernels of oneDNN")
    model = copy_of(make_model()).to(torch.bfloat16)
    names = list(model.state_dict())
    idx = torch.tensor(prompts(24, 24))
    expected = model(idx)[0].float()
    packed = use_cpu_layers(model)
    found = packed(idx)[0].float()
    torch.testing.assert_close(found, expected, atol=0.05 * expected.std().item(), rtol=0.05)
    assert list(model.state_dict()) == names, "the caller's model stays as it was"
    assert packed.transformer.wte.weight is model.transformer.wte.weight


def test_a_float32_model_is_taken_as_it_is():
    """Guards against a copy of a model that gains nothing from other layers."""
    model = make_model()
    assert use_cpu_layers(model) is model
