"""Attention to the cache in decode steps of unlike lengths, against the ungrouped one.

    python -m pytest tests/inference/test_kv_cache.py
"""

import copy

import pytest
import torch
from byte_model import N_VOCAB, drain, make_model, prompts, uncached

from gptlib.inference import kv_cache
from gptlib.inference.engine import Engine
from gptlib.inference.kv_cache import GroupedAttention, KVCache, group_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_of_like_lengths_stay_together():
    """Guards against a call for each row, which costs more than it saves."""
    assert group_rows([60] * 8) == [(0, 8, 60)]
    assert group_rows([60, 90, 70, 61], call_cost=100) == [(0, 4, 90)]
    assert group_rows([5]) == [(0, 1, 5)]


def test_a_long_row_is_alone():
    """Guards against seven short sequences that read as far as the one long one."""
    assert group_rows([60] * 7 + [1000]) == [(0, 7, 60), (7, 1, 1000)]
    assert group_rows([1000] + [60] * 7) == [(0, 1, 1000), (1, 7, 60)]
    assert group_rows([60, 60, 1000, 60]) == [(0, 2, 60), (2, 1, 1000), (3, 1, 60)]


@pytest.mark.parametrize("call_cost", [0, 3, 10, 1000])
def test_groups_hold_each_row_once_and_whole(call_cost):
    """Guards against rows that are left out, or attend to less than they have."""
    torch.manual_seed(call_cost)
    for n_rows in range(1, 20):
        lengths = torch.randint(1, 50, (n_rows,)).tolist()
        rows = []
        for first, count, size in group_rows(lengths, call_cost):
            rows += range(first, first + count)
            assert size == max(lengths[first:first + count])
        assert rows == list(range(n_rows))


@torch.inference_mode()
def test_any_grouping_gives_the_same_step(monkeypatch):
    """Guards against heads or rows mixed up, and keys written to another place."""
    model = make_model()
    filled = KVCache.of_model(model, 5)
    for tensor in filled.keys + filled.values:
        torch.nn.init.normal_(tensor)
    pos = torch.tensor([[3], [20], [0], [23], [4]])
    idx = torch.tensor(prompts(5)).T
    cache = copy.deepcopy(filled)
    expected = model.hidden(idx, cache.at(pos))
    for call_cost in (0, 10, 1000):
        monkeypatch.setattr(kv_cache.group_rows, "__defaults__", (call_cost,))
        own = copy.deepcopy(filled)
        found = model.hidden(idx, GroupedAttention(own, pos))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(own.keys, cache.keys)
        torch.testing.assert_close(own.values, cache.values)


def test_grouped_engines_give_the_uncached_tokens(monkeypatch):
    """Guards against the groups of one step used for the next, or for other slots."""
    n_groups = []

    def all_apart(lengths):
        n_groups.append(len(lengths))
        return group_rows(lengths, call_cost=0)

    monkeypatch.setattr(kv_cache, "group_rows", all_apart)
    model = make_model()
    engine = Engine(model, slots=4, n_vocab=N_VOCAB)
    sequences = [engine.submit(prompt, max_length=30, temperature=0)
                 for prompt in prompts(2, 20, 9, 24, 1, 13)]
    drain(engine)
    for sequence in sequences:
        assert sequence.tokens == uncached(model, sequence.prompt, 30)
    assert max(n_groups) > 1
