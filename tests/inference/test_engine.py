"""The engine against the uncached model: many sequences, seeds, failures, threads.

    python -m pytest tests/inference/test_engine.py
"""

import dataclasses
import random
import threading

import pytest
import torch
from byte_model import (CONFIG, N_VOCAB, copy_of, drain, events_of, make_model, prompts,
                        uncached)

from gptlib.common import UserError
from gptlib.inference.engine import Engine
from gptlib.inference.kv_cache import Prefill
from gptlib.inference.sampling import SamplingParams
from train_gpt2 import GPT

# 1 is what a GPU does: collect the tokens of a step when the next one is under way
both_depths = pytest.mark.parametrize("async_depth", [0, 1])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return make_model()


# -----------------------------------------------------------------------------
# greedy text


@pytest.mark.parametrize("length", [1, 5, 23, 24, 25, 60])
@both_depths
def test_greedy_alone_equals_the_uncached_model(model, length, async_depth):
    """Guards against wrong positions, in the context and where it is rolled on past its end."""
    engine = Engine(model, slots=1, n_vocab=N_VOCAB, async_depth=async_depth)
    prompt, = prompts(length)
    sequence = engine.submit(prompt, max_length=70, temperature=0)
    drain(engine)
    assert sequence.tokens == uncached(model, prompt, 70)
    assert sequence.finish_reason == "length"


@both_depths
def test_greedy_among_others_equals_the_uncached_model(model, async_depth):
    """Guards against neighbours that are admitted, retired or cancelled and disturb a cache."""
    engine = Engine(model, slots=3, n_vocab=N_VOCAB, async_depth=async_depth)
    rng = random.Random(0)
    greedy, others = [], []
    for i, prompt in enumerate(prompts(*[1, 23, 24, 25, 60, 7] * 3)):
        greedy.append(engine.submit(prompt, max_length=rng.randrange(1, 60), temperature=0))
        others.append(engine.submit(prompts(9)[0], max_length=rng.randrange(1, 40),
                                    top_k=rng.choice([None, 5])))
        for _ in range(rng.randrange(12)):
            engine.step()
        if i % 3 == 0:
            others[-1].cancel()
    drain(engine)
    for sequence in greedy:
        assert sequence.tokens == uncached(model, sequence.prompt, sequence.max_length)
    assert {sequence.finish_reason for sequence in others} == {"length", "cancelled"}


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_smallest_contexts_work(block_size):
    """Guards against half a context of no tokens, and against positions past its end."""
    model = GPT(dataclasses.replace(CONFIG, block_size=block_size)).eval()
    engine = Engine(model, slots=2)
    sequences = [engine.submit([3], max_length=9), engine.submit([4, 5, 6, 7], max_length=9)]
    drain(engine)
    assert [len(sequence.tokens) for sequence in sequences] == [9, 9]


def test_padded_ids_are_never_sampled(model):
    """Guards against ids that no tokenizer can decode; this model likes them best."""
    assert model(torch.tensor([[1, 2, 3]]))[0][0, -1].argmax() >= N_VOCAB
    settings = [dict(temperature=0), dict(), dict(top_k=20), dict(top_p=0.5), dict(temperature=2.0)]
    tokens = []
    for setting in settings:
        engine = Engine(model, slots=2, n_vocab=N_VOCAB)
        sequences = [engine.submit([i], max_length=60, **setting) for i in range(4)]
        drain(engine)
        for sequence in sequences:
            tokens += sequence.tokens
    assert max(tokens) < N_VOCAB


def test_tiny_temperatures_give_greedy_text(model):
    """Guards against logits that overflow where the temperature is almost 0."""
    engine = Engine(model, slots=2, n_vocab=N_VOCAB)
    temperatures = (0, 1e-39, 1e-300)
    sequences = [engine.submit([7], max_length=20, temperature=t) for t in temperatures]
    drain(engine)
    assert [sequence.tokens for sequence in sequences] == [uncached(model, [7], 20)] * 3


def test_one_forward_pass_a_token_and_one_a_prompt(model, monkeypatch):
    """Guards against sequences that are decoded one by one, or a prompt that is read twice."""
    shapes = []
    hidden = GPT.hidden

    def counting(self, idx, *args):
        shapes.append(tuple(idx.shape))
        return hidden(self, idx, *args)

    monkeypatch.setattr(GPT, "hidden", counting)
    engine = Engine(model, slots=3, n_vocab=N_VOCAB)
    for _ in range(3):
        engine.submit([1, 2, 3, 4, 5], max_length=5)
    drain(engine)
    assert shapes == [(1, 5)] + [(3, 1)] * 4


# -----------------------------------------------------------------------------
# settings and seeds


def test_submit_takes_params_or_settings(model):
    """Guards against two ways in that sample differently."""
    engine = Engine(model, slots=2, n_vocab=N_VOCAB)
    settings = dict(max_length=20, temperature=0.7, top_k=50, top_p=0.8, seed=3)
    sequences = [engine.submit([1], SamplingParams(**settings)), engine.submit([1], **settings)]
    drain(engine)
    assert sequences[0].tokens == sequences[1].tokens
    assert len(sequences[0].tokens) == 20


def test_submit_refuses_settings_out_of_range(model):
    """Guards against a sequence that fails in the engine's thread in place of its caller's."""
    engine = Engine(model, slots=1)
    with pytest.raises(UserError, match="temperature is 3.0: expected 0.0 to 2.0"):
        engine.submit([1], temperature=3.0)
    assert not engine.waiting


@pytest.mark.parametrize("settings", [
    {}, dict(top_k=5), dict(top_p=0.9), dict(temperature=0.7, top_k=50, top_p=0.8)])
def test_a_seed_gives_one_sample_whoever_is_beside_it(model, settings):
    """Guards against a random state, or sampling settings, that are shared with neighbours."""
    def sample(slots, n_neighbours):
        engine = Engine(model, slots, n_vocab=N_VOCAB)
        for i in range(n_neighbours):
            engine.submit(prompts(3 + i)[0], max_length=10 + 3 * i,
                          temperature=0.5 + 0.5 * (i % 3), seed=i)
        engine.step()
        sequence = engine.submit(prompts(6)[0], max_length=40, seed=1234, **settings)
        for i in range(n_neighbours):
            engine.submit(prompts(6)[0], max_length=20, seed=i)
        drain(engine)
        return sequence.tokens

    alone = sample(1, 0)
    assert sample(4, 1) == alone
    assert sample(3, 5) == alone
    assert len(set(alone)) > 3


def test_a_random_seed_repeats_the_sample(model):
    """Guards against equal samples without a seed, and against a seed that is not the one used."""
    # one at a time: at these seeds the rounding of another batch could decide between two tokens
    engine = Engine(model, slots=1, n_vocab=N_VOCAB)
    first = [engine.submit([1], max_length=20) for _ in range(3)]
    drain(engine)
    assert len({tuple(sequence.tokens) for sequence in first}) == 3
    again = engine.submit([1], max_length=20, seed=first[1].seed)
    drain(engine)
    assert again.tokens == first[1].tokens


def test_samples_have_the_models_probabilities(model):
    """Guards against a bias between logits and samples."""
    engine = Engine(model, slots=50, n_vocab=N_VOCAB)
    sequences = [engine.submit([65, 66], max_length=1, seed=i) for i in range(3000)]
    drain(engine)
    tokens = torch.tensor([sequence.tokens[0] for sequence in sequences])
    counts = torch.bincount(tokens, minlength=N_VOCAB) / 3000
    expected = model(torch.tensor([[65, 66]]))[0][0, -1, :N_VOCAB].softmax(-1)
    torch.testing.assert_close(counts, expected, atol=0.03, rtol=0)


# -----------------------------------------------------------------------------
# how sequences end


@both_depths
def test_the_stop_token_ends_a_sequence(model, async_depth):
    """Guards against a stop token within the tokens, or tokens after it."""
    expected = uncached(model, [7], 30)
    stop = next(t for i, t in enumerate(expected) if i > 2 and t not in expected[:i])
    engine = Engine(model, slots=2, n_vocab=N_VOCAB, stop_token=stop, async_depth=async_depth)
    sequence = engine.submit([7], max_length=30, temperature=0)
    follower = engine.submit([7, 8], max_length=5)
    drain(engine)
    assert sequence.tokens == expected[:expected.index(stop)]
    assert sequence.finish_reason == "stop"
    assert follower.finish_reason in ("length", "stop")


def test_cancelling_frees_the_slot_before_the_next_token(model):
    """Guards against a slot that is kept for a client that went away, and against lost events."""
    engine = Engine(model, slots=1, n_vocab=N_VOCAB)
    first = engine.submit([1], max_length=10**6)
    second = engine.submit([2], max_length=3)
    third = engine.submit([3], max_length=3)
    for _ in range(5):
        engine.step()
    assert len(first.tokens) == 6
    assert not second.tokens
    first.cancel()
    third.cancel()
    engine.step()
    assert len(first.tokens) == 6
    assert second.tokens
    drain(engine)
    sequences = (first, second, third)
    reasons = [sequence.finish_reason for sequence in sequences]
    assert reasons == ["cancelled", "length", "cancelled"]
    for sequence in sequences:
        assert events_of(sequence) == sequence.tokens
        assert sequence.events.empty()


def test_a_cancelled_waiting_request_leaves_the_queue(model):
    """Guards against a reader that waits for a sequence which nobody will ever admit."""
    engine = Engine(model, slots=1, n_vocab=N_VOCAB)
    first, second, third = (engine.submit([i], max_length=20) for i in range(3))
    engine.step()
    second.cancel()
    engine.step()
    assert list(engine.waiting) == [third]
    assert second.events.get(timeout=1) is None
    assert not first.ended


POISON = 99  # a token that no forward pass survives


@both_depths
@pytest.mark.parametrize("where", ["prefill", "decode", "roll"])
def test_a_failing_sequence_leaves_its_neighbours_alone(model, monkeypatch, where, async_depth):
    """Guards against one prompt that ends, or changes, the sequences beside it."""
    hidden = GPT.hidden
    rolling = False  # long after the prefill of the prompts

    def fragile(self, idx, attention):
        is_prefill = isinstance(attention, Prefill)
        fails = {"prefill": is_prefill, "decode": not is_prefill, "roll": is_prefill and rolling}
        if POISON in idx and fails[where]:
            raise RuntimeError("no memory left for this one")
        return hidden(self, idx, attention)

    good = [p for p in prompts(5, 20, 9, 24) if POISON not in p]
    expected = [uncached(model, p, 40) for p in good]
    for prompt, tokens in zip(good, expected, strict=True):
        assert POISON not in prompt + tokens
    monkeypatch.setattr(GPT, "hidden", fragile)
    engine = Engine(model, slots=3, n_vocab=N_VOCAB, async_depth=async_depth)
    sequences = [engine.submit(p, max_length=40, temperature=0) for p in good[:2]]
    bad_prompt = [1, 2, 3] if where == "decode" else [1] * 15 + [POISON]
    poisoned = engine.submit(bad_prompt, max_length=40, temperature=0)
    sequences += [engine.submit(p, max_length=40, temperature=0) for p in good[2:]]
    for i in range(300):
        rolling = i > 2
        if where == "decode" and i == 3:
            engine.last_tokens[engine.live.index(poisoned)] = POISON
        if not engine.step():
            break
    assert poisoned.finish_reason == "error"
    assert "no memory" in str(poisoned.error)
    assert events_of(poisoned) == poisoned.tokens
    assert [sequence.tokens for sequence in sequences] == expected
    assert not engine.live
    assert not engine.waiting
    assert not engine.pending


@both_depths
def test_after_abort_waiting_requests_are_served(model, async_depth):
    """Guards against an engine that is unusable after one failed step."""
    engine = Engine(model, slots=2, n_vocab=N_VOCAB, async_depth=async_depth)
    sequences = [engine.submit([i + 1], max_length=10, temperature=0) for i in range(3)]
    for _ in range(3):
        engine.step()
    engine.abort(RuntimeError("the device is lost"))
    assert [sequence.finish_reason for sequence in sequences] == ["error", "error", None]
    drain(engine)
    assert sequences[2].tokens == uncached(model, [3], 10)
    for sequence in sequences:
        assert sequence.events.get(timeout=1) is not None


def test_requests_of_many_threads_are_served_by_one(model):
    """Guards against events or tokens that get lost between the threads."""
    engine = Engine(model, slots=3, n_vocab=N_VOCAB)
    results, closing = {}, threading.Event()

    def ask(i):
        sequence = engine.submit([i + 1], max_length=20, seed=i)
        events = list(iter(sequence.events.get, None))
        results[i] = events, sequence.tokens

    def work():
        while not closing.is_set():
            engine.step()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    worker = threading.Thread(target=work)
    for thread in [*threads, worker]:
        thread.start()
    for thread in threads:
        thread.join(30)
    closing.set()
    worker.join(30)
    alone = Engine(model, slots=1, n_vocab=N_VOCAB)
    for i in range(12):
        sequence = alone.submit([i + 1], max_length=20, seed=i)
        drain(alone)
        events, tokens = results[i]
        assert tokens == sequence.tokens
        assert events == tokens


# -----------------------------------------------------------------------------
# bfloat16, compiled, CUDA


def test_bfloat16_greedy_follows_float32(model):
    """Guards against low precision that does more than decide near-ties differently."""
    engine = Engine(copy_of(model).to(torch.bfloat16), slots=2, n_vocab=N_VOCAB)
    sequences = [engine.submit(p, max_length=40, temperature=0) for p in prompts(5, 20)]
    drain(engine)
    for sequence in sequences:
        tokens = sequence.prompt + sequence.tokens
        for i in range(len(sequence.prompt), CONFIG.block_size):
            logits = model(torch.tensor([tokens[:i]]))[0][0, -1, :N_VOCAB]
            assert logits.max() - logits[tokens[i]] < 0.1 * logits.std()


def test_each_compiled_engine_has_its_own_weights(model, capsys):
    """Guards against a compiled step that is found again with another model's weights."""
    other = copy_of(model)
    other.load_state_dict({name: p.flip(0) for name, p in model.state_dict().items()})
    for m in (model, other):
        engine = Engine(m, slots=2, n_vocab=N_VOCAB, compile=True)
        warning = capsys.readouterr().err
        if "torch.compile does not work here" in warning:
            pytest.skip(warning)
        engine.warm_up()
        sequences = [engine.submit(p, max_length=30, temperature=0) for p in prompts(5, 24, 1)]
        drain(engine)
        for sequence in sequences:
            assert sequence.tokens == uncached(m, sequence.prompt, 30)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("slots, compile", [
    (1, False), (2, False), (3, False), (5, False), (3, True)])
def test_a_gpu_gives_the_same_tokens_by_its_graphs(model, slots, compile):
    """Guards against graphs that read or write other memory than the engine does.

    The last GPU is not the current one where there are several.
    """
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    engine = Engine(copy_of(model).to(device), slots, n_vocab=N_VOCAB, compile=compile)
    engine.warm_up()
    sequences = [engine.submit(p, max_length=50, temperature=0) for p in prompts(5, 24, 1, 60, 9)]
    drain(engine)
    for sequence in sequences:
        assert sequence.tokens == uncached(model, sequence.prompt, 50)
    assert engine.decode_step.graphs
