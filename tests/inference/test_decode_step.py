"""How a decode step is run on its device: CUDA's calls through a stand-in, shapes, precision.

    python -m pytest tests/inference/test_decode_step.py
"""

import dataclasses
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from byte_model import CONFIG, N_VOCAB, drain, make_model, prompts, uncached
from fake_cuda import FakeCuda

from gptlib.inference import decode_step
from gptlib.inference import engine as engine_module
from gptlib.inference.decode_step import CudaDecodeStep
from gptlib.inference.engine import Engine
from gptlib.runtime import skip_init
from train_gpt2 import GPT


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda's stand-in; engines made meanwhile decode as on cuda:1."""
    cuda = FakeCuda(monkeypatch)

    def make_decode_step(forward, cache, last_tokens, device, fixed_shapes):
        device = torch.device("cuda", 1)
        return CudaDecodeStep(cuda.traced(forward), cache, last_tokens, device, fixed_shapes)

    monkeypatch.setattr(engine_module, "make_decode_step", make_decode_step)
    return cuda


# -----------------------------------------------------------------------------
# the device and its streams


def test_graphs_give_the_tokens_of_the_uncached_model(model, cuda):
    """Guards against a graph that is replayed with old positions, or an early look at tokens."""
    engine = Engine(model, slots=3, n_vocab=N_VOCAB)
    sequences = [engine.submit(p, max_length=50, temperature=0) for p in prompts(5, 24, 1, 60, 9)]
    drain(engine)
    for sequence in sequences:
        assert sequence.tokens == uncached(model, sequence.prompt, 50)
    assert engine.async_depth == 1


@pytest.mark.parametrize("in_thread", [False, True])
def test_every_cuda_call_is_on_the_engines_device(model, cuda, in_thread):
    """Guards against an empty capture, and tokens read too early, where the model is on cuda:1.

    The current device is 0 on every thread that has not set it.
    """
    engine = Engine(model, slots=2, n_vocab=N_VOCAB)

    def work():
        engine.warm_up()
        engine.submit([1, 2, 3], max_length=5)
        drain(engine)

    if in_thread:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
    else:
        work()
    names = {call.name for call in cuda.calls}
    assert names >= {"forward", "capture", "replay", "record", "synchronize", "wait_stream"}
    assert [call for call in cuda.calls if call.current != 1] == []
    assert [call for call in cuda.calls if call.device != 1] == []


def test_a_step_leaves_the_callers_device_as_it_was(model, cuda):
    """Guards against an engine that moves its caller's later work to another GPU."""
    engine = Engine(model, slots=1, n_vocab=N_VOCAB)
    engine.submit([1], max_length=2)
    with cuda.device("cuda:3"):
        engine.step()
        assert cuda.current == 3
    assert cuda.current == 0


# -----------------------------------------------------------------------------
# precision


def test_logits_on_cuda_are_float32():
    """Guards against logits rounded to bfloat16, which at 64 and more are half a nat apart."""
    # tensors without data need no GPU
    with FakeTensorMode(), skip_init(), torch.inference_mode():
        head = torch.nn.Linear(8, 50, bias=False, device="cuda:0", dtype=torch.bfloat16)
        x = torch.empty(2, 8, device="cuda:0", dtype=torch.bfloat16)
        logits = decode_step.project_to_logits(head, x)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 50)


def test_close_logits_are_told_apart(monkeypatch):
    """Guards against a product that is made in bfloat16 and widened afterwards."""
    product = torch.mm

    def mixed_product(a, b, out_dtype):
        return product(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(decode_step, "has_mixed_product", lambda x: True)
    monkeypatch.setattr(torch, "mm", mixed_product)
    head = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[100.0, 0.0], [100.0, 0.125]]))
        x = torch.ones(1, 2, dtype=torch.bfloat16)
        assert head(x).tolist() == [[100.0, 100.0]], "bfloat16 cannot tell them apart"
        logits = decode_step.project_to_logits(head, x)
    assert logits.tolist() == [[100.0, 100.125]]


# -----------------------------------------------------------------------------
# shapes


@pytest.fixture(scope="module")
def long_model():
    """A model whose context takes several sizes of the cache."""
    torch.manual_seed(0)
    return GPT(dataclasses.replace(CONFIG, block_size=600)).eval()


def serve_long_texts(engine):
    """One sequence and then several, from a token to far past the end of the context."""
    engine.submit([1], max_length=700, temperature=0)
    drain(engine)
    for n in range(engine.slots):
        engine.submit([1] * (1 + 250 * n), max_length=100, temperature=0)
    drain(engine)


def test_after_warm_up_no_graph_is_recorded(long_model, cuda):
    """Guards against a pause in service where a sequence first needs a larger cache."""
    engine = Engine(long_model, slots=3)
    engine.warm_up()
    recorded = set(engine.decode_step.graphs)
    assert recorded == {(rows, size) for rows in (1, 3) for size in (256, 512, 600)}
    serve_long_texts(engine)
    assert set(engine.decode_step.graphs) == recorded


def test_after_warm_up_no_new_shape_is_compiled(long_model, monkeypatch):
    """Guards against a compilation in service where a sequence first needs a larger cache."""
    shapes = []

    def compile_nothing(forward, device, **options):
        def call(idx, cache, pos):
            shapes.append((idx.size(0), cache.keys[0].size(2)))
            return forward(idx, cache, pos)
        return call

    monkeypatch.setattr(decode_step, "compile_model", compile_nothing)
    engine = Engine(long_model, slots=3, compile=True)
    engine.warm_up()
    warm, shapes[:] = set(shapes), []
    serve_long_texts(engine)
    assert set(shapes) <= warm
    assert len(set(shapes)) > 10, "the texts need many sizes"


def test_warm_up_does_not_change_what_is_sampled(model, cuda):
    """Guards against positions or tokens that the warm-up leaves behind in the cache."""
    engine = Engine(model, slots=2, n_vocab=N_VOCAB)
    engine.warm_up()
    sequences = [engine.submit(p, max_length=50, temperature=0) for p in prompts(5, 24, 9)]
    drain(engine)
    for sequence in sequences:
        assert sequence.tokens == uncached(model, sequence.prompt, 50)
