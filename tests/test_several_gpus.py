"""The script for several GPUs: a rehearsal of every part, and what it does when a part fails.

    python -m pytest tests/test_several_gpus.py
"""

import argparse
import contextlib
import json
import os
import sys

import pytest
import torch

from benches import several_gpus
from gptlib.common import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux",
                                reason="finds the processes of torchrun in /proc")


@pytest.mark.timeout(1900)  # five minutes on two cores with other work beside it
def test_a_rehearsal_runs_every_part(monkeypatch):
    """Guards against a script that fails for the first time on eight rented GPUs."""
    monkeypatch.setattr(several_gpus, "TOTAL_SECONDS", 1800)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    results = several_gpus.bench_several_gpus(argparse.Namespace(device="cpu"))
    assert results["failed"] == {}
    parts = results["parts"]
    assert list(parts) == ["each_alone", *several_gpus.processes_of(2), "killed_and_stopped"]
    json.dumps(results)  # bench.py prints them
    text = several_gpus.table(results, "two processes")
    for name, part in parts.items():
        assert part["summary"], name
        assert f"| {name} |" in text
    assert list(parts["all_gpus"]["seconds"]) == ["val", "hella", "samples"]
    compared = [name for _, name, _, expected in several_gpus.runs_of("cpu", 2) if expected]
    assert all(f"{name} 0.0" in text for name in compared)


@pytest.mark.parametrize("n_gpus, halves", [(2, 1), (3, 1), (4, 2), (8, 2)])
def test_parts_fit_any_number_of_gpus(n_gpus, halves):
    """Guards against copies of a sharded model that the GPUs of a part do not divide among them."""
    processes = several_gpus.processes_of(n_gpus)
    assert max(processes.values()) == n_gpus
    assert processes["resumed"] == halves
    copies = [flags for _, name, flags, _ in several_gpus.runs_of("cuda", n_gpus)
              if name == "copies"]
    assert copies[0]["shard_ranks"] * 2 == processes["four_gpus"]


def test_the_first_failure_ends_it():
    """Guards against minutes of rented GPUs spent on parts that cannot succeed any more."""
    def fail():
        raise UserError("rank 3 | does not answer\nmore of it")

    called = []
    results = several_gpus.run_parts(dict(
        good=lambda: dict(summary="fine"), bad=fail, never=lambda: called.append("never")))
    assert called == []
    assert results["failed"] == {"bad": "rank 3 | does not answer"}
    text = several_gpus.table(results, "heading")
    assert "| good | 0 | fine |" in text
    assert "| bad | | **failed**: rank 3 / does not answer |" in text


@pytest.fixture
def bench(tmp_path):
    return several_gpus.Bench(tmp_path, "cpu", 2)


def test_a_part_that_fails_shows_its_error(bench):
    """Guards against an exit code alone, where the message of the process says what is broken."""
    with pytest.raises(UserError, match="exit code 1\n(.*\n)*.*this is broken"):
        bench.wait(bench.start("-c", "raise SystemExit('this is broken')"))


def test_a_part_that_hangs_is_ended(bench):
    """Guards against GPUs that are paid for all night because one part waits."""
    bench.end = 0
    process = bench.start("-c", "import time; time.sleep(1000)")
    with pytest.raises(UserError, match="the 600 s are over"):
        bench.wait(process)
    assert process.poll() is not None


@pytest.mark.parametrize("records, is_equal", [([1.0, 1.5], True), ([1.0, 1.6], False),
                                               ([1.0, float("nan")], False)])
def test_losses_that_differ_are_an_error(bench, records, is_equal):
    """Guards against a comparison that any losses pass, among them those that are no numbers."""
    for name, losses in (("one", [1.0, 1.51]), ("other", records)):
        (bench.folder / name).mkdir()
        lines = [json.dumps(dict(kind="train", loss=loss)) + os.linesep for loss in losses]
        (bench.folder / name / "log.jsonl").write_text("".join(lines))
    if is_equal:
        assert bench.compare("other", "one") == pytest.approx(0.01)
    else:
        with pytest.raises(UserError, match="differ from those of one"):
            bench.compare("other", "one")


@pytest.mark.parametrize("are_equal", [True, False])
def test_ranks_with_other_weights_are_an_error(tmp_path, monkeypatch, are_equal):
    """Guards against ranks that drift apart by a bit a step, which no loss shows."""
    def gather(digest, world):
        return [digest, digest if are_equal else "another"]

    monkeypatch.setattr(several_gpus, "gather_from_all", gather)
    monkeypatch.setattr(several_gpus.ComparingSaver, "writes", False)
    with several_gpus.ComparingSaver(tmp_path, 1) as saver:
        state = dict(model={"weight": torch.ones(3)}, step=7)
        expected = contextlib.nullcontext() if are_equal else pytest.raises(
            UserError, match="different weights at step 7")
        with expected:
            saver.save(state)


def test_a_slow_card_is_named(bench, monkeypatch):
    """Guards against a run that is as slow as its slowest GPU, and nobody knows which that is."""
    rates = iter(["100", "80"])
    bench.device = "cuda"
    monkeypatch.setattr(bench, "start", lambda *args, **variables: None)
    monkeypatch.setattr(bench, "wait", lambda process: (
        bench.folder / "output.txt").write_text(next(rates)))
    with pytest.raises(UserError, match="100, 80: GPU 1 is slower"):
        several_gpus.each_alone(bench)
