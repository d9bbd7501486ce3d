"""How a decode step is run on its device: CUDA's calls through a stand-in, shapes, precision.

    python -m pytest tests/test_decode_step.py
"""

import threading

import pytest
import torch
from byte_model import N_VOCAB, drain, make_model, prompts, uncached
from fake_cuda import FakeCuda

from gptlib import engine as engine_module
from gptlib.decode_step import CudaDecodeStep
from gptlib.engine import Engine


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
    requests = [engine.submit(p, max_length=50, temperature=0) for p in prompts(5, 24, 1, 60, 9)]
    drain(engine)
    for request in requests:
        assert request.tokens == uncached(model, request.prompt, 50)
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
