"""bench.py measures what it says, of whom it says. Nothing here asserts how fast anything is.

    python -m pytest tests/test_bench.py
"""

import json
import os

import pytest
from conftest import run

import bench
from gptlib.common import UserError


def test_ratios_are_medians_of_pairs_and_the_first_turn_does_not_count(monkeypatch):
    clock = iter([0, 0,  # warming up
                  0, 1, 0, 2,  # 10 / s and 5 / s: x 2
                  0, 2, 0, 2,  # 5 / s and 5 / s: x 1
                  0, 5, 0, 40])  # 2 / s and 0.25 / s: x 8
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    ours, peer = bench.take_turns({"ours": lambda: 10, "peer": lambda: 10}, 3, "tok")
    assert ours == dict(name="ours", unit="tok/s", median=5, low=2, high=10, ratio=2)
    assert peer == dict(name="peer", unit="tok/s", median=5, low=0.25, high=5, ratio=1)


def whose_process(amount):
    return lambda: (amount, os.getpid())


def fails():
    raise ValueError("no such thing")


def test_contenders_run_in_processes_of_their_own_and_their_errors_come_home():
    with bench.apart(a=(whose_process, 1), b=(whose_process, 2)) as works:
        (a, first), (b, second) = works["a"](), works["b"]()
        assert (a, b) == (1, 2) and len({first, second, os.getpid()}) == 3 and works["a"]() == (1, first)
    with pytest.raises(UserError, match="fails: no such thing"), bench.apart(a=(fails,)):
        pass


PEER = """
from dataclasses import dataclass
import torch.nn as nn

raise SystemExit("this trains at import, and must not be run")

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, 4)
    def forward(self, x, y):
        logits = self.wte(x) @ self.wte.weight.t()
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


def test_training_is_measured_beside_a_peers_classes(tmp_path):
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "train_gpt2.py").write_text(PEER)
    done = run("bench.py", "train", "--preset=demo", "--peer=peer", "--rounds=1", "--batch_size=1", "--block_size=16",
               "--device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]["train"]
    (title, rows), loader = next(iter(results.items())), results["loader"]
    assert "1 x 1 x 16 tokens" in title and [r["name"] for r in rows][0] == "train_gpt2.py"
    assert rows[-1]["name"] == "peer, eager" and rows[-1]["ratio"] == 1 and loader["tok/s"] > 0
    assert all(0 < r["low"] <= r["median"] <= r["high"] and r["mfu"] > 0 for r in rows)


def test_a_checkpoint_is_measured_and_nothing_of_it_stays(tmp_path):
    done = run("bench.py", "checkpoint", "--preset=demo", "--rounds=1", "--device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (title, rows), = json.loads(done.stdout.splitlines()[-1])["results"]["checkpoint"].items()
    assert "checkpoint of demo" in title and len(rows) == 4 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv, message", [
    (["train", "--peer=nowhere"], "--peer nowhere is no checkout of build-nanogpt or nanoGPT"),
    (["train", "--rounds=0"], "--rounds is 0: expected at least 1"),
    (["hellaswag", "--hellaswag_data=nowhere.jsonl"], "nowhere.jsonl"),
    (["growth", "--picture=nowhere/growth.png", "--preset=demo", "--rounds=1"], "nowhere"),
])
def test_what_is_wrong_gets_one_line(tmp_path, argv, message):
    done = run("bench.py", *argv, cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
