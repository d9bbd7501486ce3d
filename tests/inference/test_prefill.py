"""Prompts read in chunks and beginnings read only once, against the uncached model.

    python -m pytest tests/inference/test_prefill.py
"""

import dataclasses
import functools
import random

import pytest
import torch
from byte_model import CONFIG, N_VOCAB, drain, make_model, prompts, uncached

from gptlib.inference.kv_cache import KVCache
from gptlib.inference import prefix_cache
from gptlib.inference.engine import PASS_COST, Engine
from train_gpt2 import GPT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def long_model():
    """A model with a context of 300 tokens."""
    torch.manual_seed(0)
    return GPT(dataclasses.replace(CONFIG, block_size=300)).eval()


@pytest.fixture
def passes(monkeypatch):
    """The shape of every forward pass, (rows, tokens)."""
    shapes = []
    hidden = GPT.hidden

    def noting(self, idx, *args):
        shapes.append(tuple(idx.shape))
        return hidden(self, idx, *args)

    monkeypatch.setattr(GPT, "hidden", noting)
    return shapes


def plant_garbage(engine):
    """Fill the cache with large numbers, which change every token that they reach."""
    for tensor in engine.cache.keys + engine.cache.values:
        tensor.fill_(1e4)


# -----------------------------------------------------------------------------
# any schedule gives the uncached model's tokens


def check_contents(engine, model):
    """Compare the keys and values that are kept with those of a pass over their tokens."""
    for slot, content in enumerate(engine.prefixes.contents):
        tokens = content.tokens() if content and slot >= len(engine.live) else []
        if not tokens:
            continue
        cache = KVCache.of_model(model, 1)
        model.hidden(torch.tensor([tokens]), cache.from_start())
        kept = engine.cache.narrow(slot, 1, len(tokens))
        expected = cache.narrow(0, 1, len(tokens))
        torch.testing.assert_close(kept.keys, expected.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kept.values, expected.values, atol=1e-4, rtol=1e-4)


def random_prompt(rng):
    """One of a few beginnings, often shared by others, and something of its own."""
    beginning = prompts(12, 20, 33)[rng.randrange(3)][:rng.randrange(34)]
    own = [rng.randrange(256) for _ in range(rng.randrange(6))]
    return (beginning + own) or [7]


def run_schedule(engine, model, rng):
    """Random joins, leaves and cancellations; returns the sequences."""
    sequences = []
    for _ in range(14):
        for _ in range(rng.randrange(3)):
            n_samples = rng.choice([1, 1, 1, 3])
            prompt, length = random_prompt(rng), rng.randrange(1, 45)
            for _ in range(n_samples):
                sequences.append(engine.submit(prompt, max_length=length, temperature=0))
        for _ in range(rng.randrange(9)):
            engine.step()
        if rng.random() < 0.3 and sequences:
            rng.choice(sequences).cancel()
        if rng.random() < 0.05:
            engine.abort(RuntimeError("a failed step"))
        if rng.random() < 0.3:
            check_contents(engine, model)
    drain(engine)
    return sequences


@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_gives_the_uncached_tokens(model, monkeypatch, seed):
    """Guards against a chunk at a wrong position, and another sequence's keys and values."""
    rng = random.Random(seed)
    expected = functools.cache(lambda prompt: uncached(model, list(prompt), 45))
    monkeypatch.setattr(prefix_cache, "MIN_SHARED", rng.choice([1, 4]))
    engine = Engine(model, rng.randrange(1, 6), n_vocab=N_VOCAB, async_depth=seed % 2,
                    prefill_chunk=rng.choice([0, 1, 2, 5, 11]), prefix_reuse=seed % 4 != 3)
    # as on CUDA: rows of a step that no sequence has write into slots too
    engine.decode_step.fixed_shapes = seed % 3 != 0
    plant_garbage(engine)
    sequences = run_schedule(engine, model, rng)
    for sequence in sequences:
        tokens = expected(tuple(sequence.prompt))[:sequence.max_length]
        assert sequence.tokens == tokens[:len(sequence.tokens)]
        assert sequence.ended
        if sequence.finish_reason == "length":
            assert sequence.tokens == tokens
    assert [sequence.finish_reason for sequence in sequences].count("length") > 5
    if engine.prefixes.keep:
        assert sum(sequence.n_reused for sequence in sequences) > 0


# -----------------------------------------------------------------------------
# chunks


def test_no_step_reads_more_than_a_chunk(long_model, passes):
    """Guards against eight streams that wait for the whole of a newcomer's prompt."""
    engine = Engine(long_model, slots=8, prefill_chunk=40)
    streams = [engine.submit([i + 1], max_length=60, temperature=0) for i in range(7)]
    while len(engine.live) < 7:
        engine.step()
    newcomer = engine.submit(prompts(250)[0], max_length=5, temperature=0)
    while not newcomer.tokens:
        del passes[:]
        before = [len(stream.tokens) for stream in streams]
        engine.step()
        n_read = sum(n for _, n in passes if n > 1)
        assert n_read <= 40
        assert [len(stream.tokens) for stream in streams] == [n + 1 for n in before]
    assert len(streams[0].tokens) >= 250 // 40


def test_short_newcomers_share_the_chunk_of_a_step(long_model, passes):
    """Guards against eight newcomers at once, each of whom holds up the others."""
    engine = Engine(long_model, slots=10, prefill_chunk=40)
    engine.submit([1], max_length=60)
    engine.step()
    for i in range(8):
        engine.submit([i + 2] * 20, max_length=5)
    most = 0
    while engine.waiting or engine.filling:
        del passes[:]
        engine.step()
        prefills = [n for _, n in passes if n > 1]
        most = max(most, sum(prefills) + PASS_COST * (len(prefills) - 1))
    assert 20 <= most <= 40


def test_a_prompt_with_no_one_else_is_read_at_once(long_model, passes):
    """Guards against a first token that comes later where nobody is held up."""
    engine = Engine(long_model, slots=2, prefill_chunk=40)
    engine.submit(prompts(250)[0], max_length=2)
    engine.step()
    assert passes == [(1, 250), (1, 1)]


def test_a_rolled_context_is_read_in_chunks_too(model, passes):
    """Guards against streams that wait while another one starts on its next half context."""
    engine = Engine(model, slots=2, n_vocab=N_VOCAB, prefill_chunk=4)
    sequences = [engine.submit(p, max_length=60, temperature=0) for p in prompts(3, 11)]
    drain(engine)
    assert max(n for rows, n in passes if (rows, n) not in ((1, 3), (1, 12))) <= 4
    for sequence in sequences:
        assert sequence.tokens == uncached(model, sequence.prompt, 60)


def test_a_cancelled_newcomer_leaves_between_chunks(long_model):
    """Guards against a client that went away and whose prompt is read to its end."""
    engine = Engine(long_model, slots=2, prefill_chunk=20)
    engine.submit([1], max_length=90)
    engine.step()
    newcomer = engine.submit(prompts(250)[0], max_length=5)
    engine.step()
    assert engine.filling.sequence is newcomer
    newcomer.cancel()
    engine.step()
    assert engine.filling is None
    assert newcomer.events.get(timeout=1) is None
    again = engine.submit(prompts(250)[0], max_length=5)
    drain(engine)
    assert again.n_reused == 20, "what has been read of it was not lost"


def test_a_failed_prompt_is_nobodys_twin(model, monkeypatch):
    """Guards against samples of a prompt whose slot a failing prompt has written into."""
    hidden = GPT.hidden

    def fragile(self, idx, *args):
        x = hidden(self, idx, *args)
        if 99 in idx:  # after it has filled the cache
            raise RuntimeError("no memory left for this one")
        return x

    monkeypatch.setattr(GPT, "hidden", fragile)
    engine = Engine(model, slots=1, n_vocab=N_VOCAB, prefix_reuse=False)
    engine.submit([1, 2, 3], max_length=1)
    engine.submit([99, 4, 5], max_length=1)
    again = engine.submit([1, 2, 3], max_length=9, temperature=0)
    drain(engine)
    assert again.tokens == uncached(model, [1, 2, 3], 9)


def test_after_abort_nothing_is_reused(long_model):
    """Guards against keys and values that a failed step has left half moved or half written."""
    engine = Engine(long_model, slots=3)
    sequences = [engine.submit([i + 1] * 100, max_length=5) for i in range(2)]
    drain(engine)
    sequences.append(engine.submit([9] * 100, max_length=50))
    engine.step()
    engine.abort(RuntimeError("the device is lost"))
    again = [engine.submit(sequence.prompt, max_length=2) for sequence in sequences]
    drain(engine)
    assert [sequence.n_reused for sequence in again] == [0, 0, 0]
    assert [sequence.finish_reason for sequence in again] == ["length"] * 3


@pytest.mark.parametrize("chunk", [0, 5])
def test_a_chunk_that_fails_ends_its_request_alone(model, monkeypatch, chunk):
    """Guards against an engine that reads a failing prompt for ever, or keeps half of it."""
    hidden = GPT.hidden

    def fragile(self, idx, *args):
        if 99 in idx and idx.size(1) > 1:
            raise RuntimeError("no memory left for this one")
        return hidden(self, idx, *args)

    monkeypatch.setattr(prefix_cache, "MIN_SHARED", 1)
    engine = Engine(model, slots=2, n_vocab=N_VOCAB, prefill_chunk=chunk)
    other = engine.submit([1], max_length=15, temperature=0)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "hidden", fragile)
        bad = engine.submit([5] * 11 + [99] * 3, max_length=5)
        for _ in range(6):
            engine.step()
    assert bad.finish_reason == "error"
    assert bad.ended
    follower = engine.submit([5] * 11 + [99] * 3, max_length=5, temperature=0)
    drain(engine)
    assert follower.n_reused == 0
    assert follower.tokens == uncached(model, follower.prompt, 5)
    assert other.tokens == uncached(model, [1], 15)


# -----------------------------------------------------------------------------
# beginnings


def test_a_beginning_in_the_cache_is_read_once(long_model, passes):
    """Guards against a repeated system prefix that is read for every prompt."""
    engine = Engine(long_model, slots=3)
    system = prompts(200)[0]
    engine.submit([*system, 1, 2], max_length=5, temperature=0)  # ends before the next one comes
    drain(engine)
    live = engine.submit([*system, 3, 4, 5], max_length=20, temperature=0)
    engine.step()
    while_live = engine.submit([*system, 6], max_length=20, temperature=0)
    drain(engine)
    prefills = [shape for shape in passes if shape[1] > 1]
    assert prefills == [(1, 202), (1, 3)]
    assert (live.n_reused, while_live.n_reused) == (200, 200)
    plain = Engine(long_model, slots=3, prefix_reuse=False)
    for sequence in (live, while_live):
        expected = plain.submit(sequence.prompt, max_length=20, temperature=0)
        drain(plain)
        assert expected.n_reused == 0
        assert sequence.tokens == expected.tokens


def test_more_samples_than_slots_read_the_prompt_once(long_model, passes):
    """Guards against num_samples that read their prompt again for each round of slots."""
    engine = Engine(long_model, slots=2)
    prompt = prompts(100)[0]
    sequences = [engine.submit(prompt, max_length=4 + i, seed=i) for i in range(7)]
    drain(engine)
    assert [shape for shape in passes if shape[1] > 1] == [(1, 100)]
    assert sum(sequence.n_reused for sequence in sequences) >= 6 * 99


def test_a_conversation_goes_on_from_the_last_answer(long_model, passes):
    """Guards against an answer whose tokens are read again with the next question."""
    engine = Engine(long_model, slots=1)
    first = engine.submit(prompts(50)[0], max_length=30, temperature=0)
    drain(engine)
    # the last token was sampled, but never fed
    second = engine.submit([*first.prompt, *first.tokens, 1, 2], max_length=3)
    drain(engine)
    assert second.n_reused == 50 + 29


def test_the_least_recently_used_is_given_up(long_model):
    """Guards against a system prefix that is lost to any passer-by."""
    engine = Engine(long_model, slots=3)
    system, *others = prompts(60, 61, 62, 63, 64, 65)
    for other in others:
        for prompt in ([*system, 1], other):
            sequence = engine.submit(prompt, max_length=5)
            drain(engine)
            if prompt is not other and other is not others[0]:
                assert sequence.n_reused == 60
    content = [held.tokens()[:60] for held in engine.prefixes.contents]
    assert system in content
    assert others[-1][:60] in content


def test_prefix_reuse_takes_no_memory(long_model):
    """Guards against a cache of beginnings that grows with the sequences."""
    engine = Engine(long_model, slots=2)
    n_bytes = sum(tensor.nbytes for tensor in engine.cache.keys + engine.cache.values)
    shape = (2, CONFIG.n_head, 300, CONFIG.n_embd // CONFIG.n_head)
    one = 4 * shape[0] * shape[1] * shape[2] * shape[3]
    for i in range(20):
        engine.submit([i] * 100, max_length=3)
    drain(engine)
    tensors = engine.prefixes.cache.keys + engine.prefixes.cache.values
    assert sum(tensor.nbytes for tensor in tensors) == n_bytes == 2 * CONFIG.n_layer * one
    assert len(engine.prefixes.contents) == 2


def test_without_reuse_nothing_is_kept(long_model, passes):
    """Guards against a setting that switches off nothing."""
    engine = Engine(long_model, slots=2, prefix_reuse=False)
    for _ in range(2):
        engine.submit(prompts(100)[0], max_length=4)
        drain(engine)
    assert [shape for shape in passes if shape[1] > 1] == [(1, 100)] * 2
    assert engine.prefixes.contents == [None, None]
