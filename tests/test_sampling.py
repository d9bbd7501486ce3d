"""Sampling settings, and the token sampled from logits.

    python -m pytest tests/test_sampling.py
"""

import pytest
import torch

from gptlib.common import UserError
from gptlib.sampling import SamplingParams, sample_next


@pytest.mark.parametrize("settings, expected", [
    (dict(), {0, 1, 2, 3}),
    (dict(top_k=1), {1}),
    (dict(top_k=2), {1, 3}),
    (dict(top_k=9), {0, 1, 2, 3}),
    (dict(top_p=0.4), {1}),  # the likeliest always stays
    (dict(top_p=0.74), {1, 3}),
    (dict(top_p=0.76), {1, 2, 3}),
    (dict(top_p=1.0), {0, 1, 2, 3}),
    (dict(top_k=2, top_p=0.6), {1}),  # of the two, 1 has two thirds
    (dict(top_p=0.76, temperature=0.5), {1, 3}),  # squares: 0.25 and 0.0625 of 0.345
])
def test_top_k_and_top_p_keep_what_they_should(settings, expected):
    """Guards against a cut that keeps one token too many or too few, or a token of no mass."""
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))
    noise = torch.linspace(0, 1, 101)[:, None]  # from 0 to 1, both ends included
    sampled = sample_next(logits.expand(101, 4), noise=noise, **settings)
    assert set(sampled[:, 0].tolist()) == expected


@pytest.mark.parametrize("settings, message", [
    (dict(temperature=-1.0), "temperature is -1.0: expected 0.0 to 2.0"),
    (dict(temperature=2.1), "temperature is 2.1: expected 0.0 to 2.0"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(top_k=0), "top_k is 0: expected at least 1"),
    (dict(top_k=True), "top_k is True"),
    (dict(top_p=0), "top_p is 0.0: expected above 0 and up to 1"),
    (dict(max_length=0), "max_length is 0"),
    (dict(max_length=2.5), "max_length is 2.5"),
    (dict(seed=-1), "seed is -1"),
])
def test_settings_out_of_range_are_named(settings, message):
    """Guards against a value that fails deep in the model, or an error that names no setting."""
    with pytest.raises(UserError) as error:
        SamplingParams(**settings)
    assert message in str(error.value)


def test_limits_of_the_ranges_are_allowed():
    """Guards against a range that leaves out its own ends."""
    params = SamplingParams(max_length=1, temperature=2, top_k=1, top_p=1, seed=0)
    assert (params.temperature, params.top_k, params.top_p, params.seed) == (2.0, 1, 1.0, 0)


@pytest.mark.parametrize("temperature", [0, 1e-39, 1e-300])
def test_tiny_temperatures_are_greedy(temperature):
    """Guards against infinite logits, whose softmax is NaN."""
    assert SamplingParams(temperature=temperature).temperature == 0.0


def test_a_missing_seed_is_chosen_at_random():
    """Guards against one fixed seed for everybody who gives none."""
    assert len({SamplingParams().seed for _ in range(5)}) > 1
