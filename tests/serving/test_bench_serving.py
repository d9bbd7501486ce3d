"""What bench.py serve measures: clients, first tokens, newcomers. No time is asserted.

    python -m pytest tests/serving/test_bench_serving.py
"""

import pytest
import serving_helpers as serving

from benches.serving import (
    bench_newcomer,
    clients,
    newcomer,
    offline_tokenizer,
    percentile,
    request_completion,
)

model, home, server = serving.model, serving.home, serving.server


@pytest.mark.parametrize("percent, expected", [(1, 1), (50, 50), (99, 99), (100, 100)])
def test_percentiles_are_by_nearest_rank(percent, expected):
    """Guards against a p99 that is the mean of its neighbours, or the 98th."""
    assert percentile(list(range(100, 0, -1)), percent) == expected
    assert percentile([7.0], percent) == 7.0


def test_each_token_is_a_piece_of_text():
    """Guards against gaps between pieces that are not gaps between tokens."""
    tokenizer = offline_tokenizer()
    assert tokenizer.n_vocab == 50257
    pieces = [tokenizer.decode([i]) for i in range(256, 50256)]
    assert all(piece.isascii() and piece.isalpha() for piece in pieces)
    assert len(set(pieces)) == 50000


@pytest.mark.parametrize("stream", [False, True])
def test_a_completions_pieces_are_timed(server, stream):
    """Guards against the usage or the [DONE] at the end of a stream, counted as text."""
    lines = []
    n_tokens, times = request_completion(server.port, [97, 98], 9, 0, stream,
                                         lambda: lines.append(True))
    assert n_tokens == 9
    assert times == sorted(times)
    assert len(times) == 1 or stream
    assert len(times) <= 10
    assert len(lines) == len(times) + (2 if stream else 0)


def test_every_client_notes_its_first_token(server):
    """Guards against first tokens of some clients only."""
    first_tokens = []
    work = clients(server.port, [[97], [98, 99], [100]], 5, True, first_tokens)
    assert work() == 15
    assert len(first_tokens) == 3


def test_a_newcomer_is_timed_beside_streams(server):
    """Guards against a newcomer that comes when nobody waits for it any more."""
    prompts = [[97] * 5, [98] * 6]
    first_token, usual, waits = newcomer(server.port, prompts, [99] * 40, 1000)
    assert first_token > 0
    assert usual > 0
    assert len(waits) >= 2, "each of the others waited at least once"
    assert min(waits) > 0


def test_servers_are_compared_over_all_rounds_but_the_first(server, monkeypatch):
    """Guards against a first round that counts (it warms up), and a p99 of one round alone."""
    figures = iter([(9.0, 9.0, [9.0] * 100), (1.0, 0.1, [1.0] * 100), (3.0, 0.2, [2.0] * 99),
                    (2.0, 0.3, [3.0])])
    monkeypatch.setattr("benches.serving.newcomer", lambda *args: next(figures))
    found = bench_newcomer({"only": server.port}, 8, 3)
    assert found == {"only": dict(first_token=2.0, usual_wait=0.2, p50=1.0, p99=2.0, longest=3.0)}
