"""Sampling settings, and the token sampled from logits.

    python -m pytest tests/inference/test_sampling.py
"""

import pytest
import torch
from torch.nn import functional as F

from gptlib.common import UserError
from gptlib.inference.sampling import SamplingParams, sample_next


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


# -----------------------------------------------------------------------------
# a large vocabulary


def plain_sample(logits, temperature, top_k, top_p, noise):
    """The sampler written out over all logits, which sample_next has to agree with."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    values, ids = logits.sort(descending=True)
    probs = F.softmax(values[:, :top_k].double() / temperature, dim=-1)
    mass_before = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill(mass_before >= top_p, 0.0)
    if top_p == 1 and top_k == logits.size(-1):  # all tokens, in the order of their ids
        ids = torch.arange(top_k).expand(logits.shape)
        probs = F.softmax(logits.double() / temperature, dim=-1)
    mass = probs.cumsum(dim=-1)
    return ids.gather(-1, (mass < noise * mass[:, -1:]).sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 12.0])  # from nearly even to a few tokens
@pytest.mark.parametrize("temperature, top_k, top_p", [
    (0, 5000, 1.0), (1.0, 5000, 1.0), (1.0, 1, 1.0), (1.0, 7, 1.0), (0.7, 19, 0.9),
    (1.0, 4000, 1.0), (1.0, 5000, 0.9), (0.6, 5000, 0.5), (1.3, 5000, 0.9999)])
def test_a_large_vocabulary_gives_the_same_draws(spread, temperature, top_k, top_p):
    """Guards against short cuts through a large vocabulary that lose tokens or change draws."""
    generator = torch.Generator().manual_seed(3)
    # 5000 is no multiple of the blocks; the columns past it are padding, as in the engine's logits
    padded = torch.randn(24, 5056, generator=generator) * spread
    noise = torch.rand(24, 1, generator=generator)
    padded[0, 4999] = padded[:, :5000].max() + 1  # past the last whole block
    logits = padded[:, :5000]
    expected = plain_sample(logits, temperature, top_k, top_p, noise)
    for rows in (slice(0, 24), slice(0, 1), slice(5, 8)):
        found = sample_next(logits[rows], temperature, top_k, top_p, noise=noise[rows])
        assert torch.equal(found, expected[rows])


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_the_nucleus_of_even_probabilities(top_p):
    """Guards against a threshold that cuts into a nucleus of many equally likely tokens."""
    noise = torch.linspace(0, 1, 2001)[:-1, None]
    sampled = sample_next(torch.zeros(2000, 5000), top_p=top_p, noise=noise)
    expected = min(2000, round(top_p * 5000))
    assert abs(len(sampled.unique()) - expected) <= 2  # sums of 5000 numbers are rounded


def test_the_first_of_equal_logits_is_the_likeliest():
    """Guards against greedy text that depends on how the logits are searched."""
    logits = torch.zeros(3, 5000)
    logits[0, [70, 4995]] = 1.0
    logits[1, [63, 64, 130]] = 1.0
    logits[2, 4990:] = 1.0
    assert sample_next(logits, temperature=0)[:, 0].tolist() == [70, 63, 4990]


@pytest.mark.parametrize("n_vocab", [100, 5000])
@pytest.mark.parametrize("settings", [
    dict(), dict(top_k=5), dict(top_p=0.9), dict(top_k=5, top_p=0.9), dict(temperature=0)])
def test_nan_logits_give_a_token_that_exists(n_vocab, settings):
    """Guards against an id past the vocabulary, which ends the sequences beside it as well."""
    noise = torch.tensor([[0.0], [0.999]])
    sampled = sample_next(torch.full((2, n_vocab), torch.nan), noise=noise, **settings)
    assert sampled.min() >= 0
    assert sampled.max() < n_vocab
