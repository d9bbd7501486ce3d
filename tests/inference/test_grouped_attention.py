"""Decode steps of sequences of unlike lengths, against the model's own attention.

    python -m pytest tests/inference/test_grouped_attention.py
"""

import copy

import pytest
import torch
from byte_model import N_VOCAB, drain, make_model, prompts, uncached

from gptlib.inference.kv_cache import KVCache
from gptlib.inference import grouped_attention
from gptlib.inference.engine import Engine
from gptlib.inference.grouped_attention import group_attention, group_rows

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


def test_any_grouping_gives_the_models_own_step(monkeypatch):
    """Guards against heads or rows mixed up, and keys written to another place."""
    model = make_model()
    filled = KVCache.of_model(model, 5)
    for tensor in filled.keys + filled.values:
        torch.nn.init.normal_(tensor)
    pos = torch.tensor([[3], [20], [0], [23], [4]])
    idx = torch.tensor(prompts(5)).T
    cache = copy.deepcopy(filled)
    expected = model.hidden(idx, cache.narrow(0, 5, 24), pos)
    for call_cost in (0, 10, 1000):
        monkeypatch.setattr(grouped_attention.group_rows, "__defaults__", (call_cost,))
        own = copy.deepcopy(filled)
        found = group_attention(model).hidden(idx, own.narrow(0, 5, 24), pos)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(own.keys, cache.keys)
        torch.testing.assert_close(own.values, cache.values)


def test_grouped_engines_give_the_uncached_tokens(monkeypatch):
    """Guards against the groups of one step used for the next, or for other slots."""
    monkeypatch.setattr(grouped_attention.group_rows, "__defaults__", (0,))
    model = make_model()
    n_groups = []
    groups_of = grouped_attention.groups_of

    def noting(mask):
        n_groups.append(len(groups_of(mask)))
        return groups_of(mask)

    monkeypatch.setattr(grouped_attention, "groups_of", noting)
    engine = Engine(model, slots=4, n_vocab=N_VOCAB)
    requests = [engine.submit(prompt, max_length=30, temperature=0)
                for prompt in prompts(2, 20, 9, 24, 1, 13)]
    drain(engine)
    for request in requests:
        assert request.tokens == uncached(model, request.prompt, 30)
    assert max(n_groups) > 1


def test_the_callers_model_stays_as_it_is():
    """Guards against a state dict with other names after the model has been served."""
    model = make_model()
    names = list(model.state_dict())
    Engine(model, slots=2)
    assert list(model.state_dict()) == names
    grouped = group_attention(model)
    addresses = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in grouped.parameters()} == addresses, "no weight is copied"
