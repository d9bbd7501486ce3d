"""What a run leaves to look at: its log survives crashes, full disks and resumes, and its sinks
are closed.

    python -m pytest tests/training/test_run_log.py
"""

import json
import math
import sys
import types

import pytest
from conftest import read_log

from gptlib.common import UserError
from gptlib.training.run_log import RunLog, append_line, plot, select_curve

FACTS = {"config": {"max_lr": 1e-3}}


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def write_run(folder, steps=4):
    """The log of a run that evaluates at every second step."""
    with RunLog(folder, None, FACTS) as log:
        for step in range(steps):
            if step % 2 == 0:
                log.write(step, "val", loss=5.0 - step)
                log.write(step, "hella", acc_norm=0.25 + step / 100, acc=0.2)
            log.write(step, "train", loss=4.0 - step, lr=0.1, mfu=None)


def test_the_three_fields_of_the_original_format(tmp_path):
    """Plotters of the original recipe read `step kind value` lines: nothing else may stand in
    log.txt."""
    write_run(tmp_path, steps=1)
    assert (tmp_path / "log.txt").read_text() == "0 val 5.0000\n0 hella 0.2500\n0 train 4.000000\n"
    assert records(tmp_path)[0] == {"kind": "config", "step": 0, **FACTS}


def test_values_that_are_not_finite(tmp_path):
    """json.dumps writes NaN, which no JSON parser reads."""
    with RunLog(tmp_path, None, FACTS) as log:
        log.write(0, "train", loss=math.nan, norm=math.inf)
    assert records(tmp_path)[1] == {"kind": "train", "step": 0, "loss": None, "norm": None}
    assert read_log(tmp_path)["train"] == {0: "nan"}


def test_a_resume_drops_what_came_after_its_checkpoint(tmp_path):
    """Steps that are run again would stand in the log twice; the evaluation at the checkpoint's
    step is not run again."""
    write_run(tmp_path)
    for step in (2, 3):
        (tmp_path / f"model_{step:05d}.pt").write_bytes(b"")
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "tra')  # a crash in the middle of a line
    RunLog(tmp_path, 2, FACTS).close()
    log = read_log(tmp_path)
    assert sorted(log["train"]) == [0, 1]
    assert sorted(log["val"]) == [0, 2]
    assert records(tmp_path)[-1]["kind"] == "resume"
    assert not (tmp_path / "model_00003.pt").exists()
    assert (tmp_path / "model_00002.pt").exists()


def test_a_new_run_moves_the_earlier_one_away(tmp_path):
    """A second run with the default log_dir would overwrite the first one's log and checkpoints."""
    folder = tmp_path / "log"
    write_run(folder)
    before = (folder / "log.jsonl").read_bytes()
    (tmp_path / "log_001").mkdir()
    RunLog(folder, None, FACTS).close()
    assert (tmp_path / "log_002" / "log.jsonl").read_bytes() == before
    assert len(records(folder)) == 1


def test_a_full_disk_warns_once_and_training_goes_on(tmp_path, capsys):
    """A run of days must not end because its log can't be written to."""
    log = RunLog(tmp_path, None, FACTS)
    for name in ("log.txt", "log.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir()  # not even root can append to a folder
    for step in range(3):
        log.write(step, "train", loss=1.0)
    assert capsys.readouterr().err.count("can't be written to") == 1


def test_a_log_dir_that_can_not_be_made(tmp_path):
    """A file where the directory should be has to give one line that names the flag."""
    (tmp_path / "log").write_text("")
    with pytest.raises(UserError, match="--log_dir .* can't be written to"):
        RunLog(tmp_path / "log", None, FACTS)


class FakeWandb(types.ModuleType):
    """Stands for the package: notes what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options["config"]))
        return self

    def log(self, values, step):
        self.calls.append((values, step))

    def finish(self):
        self.calls.append("finish")


def test_wandb_is_closed_when_training_fails(tmp_path, monkeypatch):
    """A wandb run that is not finished stays "running" on its site, without the last values."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(KeyError):
        with RunLog(tmp_path, None, FACTS, wandb=True) as log:
            log.write(3, "train", loss=1.5, mfu=None)
            raise KeyError
    log.close()  # a second time changes nothing
    assert wandb.calls == [("init", FACTS["config"]), ({"train/loss": 1.5}, 3), "finish"]


def test_tensorboard_is_closed_after_the_run(tmp_path, monkeypatch):
    """TensorBoard's writer buffers for two minutes: what is not flushed at the end is lost."""
    calls = []

    class SummaryWriter:
        def __init__(self, folder):
            calls.append(folder)

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("close")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with RunLog(tmp_path, None, FACTS, tensorboard=True) as log:
        log.write(0, "val", loss=2.0)
    assert calls == [tmp_path / "tensorboard", ("val/loss", 2.0, 0), "close"]


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    """An optional package that is missing has to give one line that says what to install."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed: pip install wandb"):
        RunLog(tmp_path, None, FACTS, wandb=True)


@pytest.mark.parametrize("gpt2_tokens", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_the_plot_of_any_run(tmp_path, steps, gpt2_tokens):
    """A run without any record yet, and one with HellaSwag, are drawn alike."""
    write_run(tmp_path, steps)
    log = RunLog(tmp_path, steps, {**FACTS, "gpt2_tokens": gpt2_tokens})
    log.draw()
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")


def test_the_published_figures_are_for_gpt2_tokens_alone(tmp_path, monkeypatch):
    """Losses of another tokenizer are of other tokens: GPT-2's line beside them would mislead."""
    import matplotlib.axes
    write_run(tmp_path)
    lines = []
    monkeypatch.setattr(matplotlib.axes.Axes, "axhline", lambda self, y, **style: lines.append(y))
    plot(records(tmp_path), tmp_path / "a.png", gpt2_tokens=False)
    assert lines == []
    plot(records(tmp_path), tmp_path / "a.png", gpt2_tokens=True)
    assert lines == [3.2924, 0.2945, 0.337]


def test_a_curve_leaves_out_what_was_not_finite(tmp_path):
    """A single NaN would hide the rest of a curve, or stop the plot."""
    points = [{"kind": "train", "step": i, "loss": loss} for i, loss in enumerate([3.0, None, 2.0])]
    assert select_curve([*points, {"kind": "val", "step": 0, "loss": 9.0}], "train") == ([0, 2], [3.0, 2.0])


def test_a_disk_that_is_full_keeps_the_last_plot(tmp_path, monkeypatch):
    """The image that was there has to stay, and the run has to go on."""
    write_run(tmp_path)
    (tmp_path / "log.png").write_bytes(b"before")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    plot(records(tmp_path), tmp_path / "log.png", gpt2_tokens=False)
    assert (tmp_path / "log.png").read_bytes() == b"before"


def test_a_full_disk_leaves_no_half_line(tmp_path):
    """Half a line stayed when the disk was full, and with room again the next record went on in
    it: a line of five fields."""
    resource = pytest.importorskip("resource", reason="limits the size of files: not on Windows")
    path = tmp_path / "log.txt"
    append_line(path, "1 train 2.0")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, limits[1]))
    try:
        with pytest.raises(OSError):
            append_line(path, "2 train 2.0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_line(path, "3 train 2.0")
    assert path.read_text() == "1 train 2.0\n3 train 2.0\n"
