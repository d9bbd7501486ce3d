"""The script for several GPUs: a rehearsal of every part, and what it does when a part fails.

    python -m pytest tests/test_several_gpus.py
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

from benches import several_gpus
from benches.parts import Runs, parts_table
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
    assert list(parts) == ["each_alone", "one_gpu", "exchanges, two_gpus, four_gpus", "resumed",
                           "all_gpus", "killed_and_stopped"]
    json.dumps(results)  # bench.py prints them
    text = parts_table("two processes", results)
    for name, part in parts.items():
        assert part["rows"], name
        assert f"| {name} |" in text
    for kind in ("val", "hella", "samples"):
        assert kind in parts["all_gpus"]["rows"]["one evaluation"]
    assert "all-reduce of 4 B" in text
    for _, name, _, expected in several_gpus.runs_of("cpu", 2):
        if expected:
            assert f"| {name} beside {expected} | 0.0" in text


@pytest.mark.parametrize("n_gpus, halves", [(2, 1), (3, 1), (4, 2), (8, 2)])
def test_parts_fit_any_number_of_gpus(n_gpus, halves):
    """Guards against copies of a sharded model that the GPUs of a part do not divide among them."""
    processes = several_gpus.processes_of(n_gpus)
    assert max(processes.values()) == n_gpus
    assert processes["resumed"] == halves
    copies = [flags for _, name, flags, _ in several_gpus.runs_of("cuda", n_gpus)
              if name == "copies"]
    assert copies[0]["shard_ranks"] * 2 == processes["four_gpus"]


def test_the_first_failure_ends_it(monkeypatch):
    """Guards against minutes of rented GPUs spent on parts that cannot succeed any more."""
    def fail(left):
        raise UserError("rank 3 | does not answer\nmore of it")

    called = []
    monkeypatch.setattr(several_gpus, "parts_of", lambda runs, n_gpus: [
        ("good", 0, lambda left: dict(rows={"a rate": "fine"})), ("bad", 0, fail),
        ("never", 0, lambda left: called.append("never"))])
    results = several_gpus.bench_several_gpus(argparse.Namespace(device="cpu"))
    assert called == []
    assert results["failed"] == {"bad": "rank 3 | does not answer"}
    text = parts_table("heading", results)
    assert "| good | a rate | fine |" in text
    assert "| bad | | **failed**: rank 3 / does not answer |" in text


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path, "cpu", 600)


def start(runs, code):
    """A Python process whose output is where that of a run is."""
    with open(runs.folder / "output.txt", "w") as output:
        return subprocess.Popen([sys.executable, "-c", code], stderr=output)


def test_a_part_that_fails_shows_its_error(runs):
    """Guards against an exit code alone, where the message of the process says what is broken."""
    with pytest.raises(UserError, match="exit code 1\n(.*\n)*.*this is broken"):
        runs.wait(start(runs, "raise SystemExit('this is broken')"))


def test_a_part_that_hangs_is_ended(runs):
    """Guards against GPUs that are paid for all night because one part waits."""
    runs.end = 0
    process = start(runs, "import time; time.sleep(1000)")
    with pytest.raises(UserError, match="the 600 s are over"):
        runs.wait(process)
    assert process.poll() is not None


@pytest.mark.parametrize("losses, is_equal", [([1.0, 1.5], True), ([1.0, 1.6], False),
                                              ([1.0, float("nan")], False)])
def test_losses_that_differ_are_an_error(runs, losses, is_equal):
    """Guards against a comparison that any losses pass, among them those that are no numbers."""
    for name, values in (("one", [1.0, 1.51]), ("other", losses)):
        (runs.folder / name).mkdir()
        lines = [json.dumps(dict(kind="train", loss=loss)) + os.linesep for loss in values]
        (runs.folder / name / "log.jsonl").write_text("".join(lines))
    if is_equal:
        assert several_gpus.compare(runs, "other", "one") == pytest.approx(0.01)
    else:
        with pytest.raises(UserError, match="differ from those of one"):
            several_gpus.compare(runs, "other", "one")


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


def test_a_slow_card_is_named(runs, monkeypatch):
    """Guards against a run that is as slow as its slowest GPU, and nobody knows which that is."""
    monkeypatch.setattr(several_gpus, "run_alone", lambda *args: [100.0, 80.0])
    with pytest.raises(UserError, match="100, 80 TFLOP/s: GPU 1 is slower"):
        several_gpus.each_alone(runs, 2)
