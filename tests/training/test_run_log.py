"""What a run leaves to look at: its log survives crashes, full disks and resumes, and its sinks
are closed.

    python -m pytest tests/training/test_run_log.py
"""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, command, environment, flags, read_log

from gptlib.common import UserError
from gptlib.distributed import World
from gptlib.training.console import describe_run
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
    """Guards against a log.txt that plotters of the original recipe can't read."""
    write_run(tmp_path, steps=1)
    assert (tmp_path / "log.txt").read_text() == "0 val 5.0000\n0 hella 0.2500\n0 train 4.000000\n"
    assert records(tmp_path)[0] == {"kind": "config", "step": 0, **FACTS}


def test_values_that_are_not_finite(tmp_path):
    """Guards against NaN in log.jsonl, which json.dumps writes and no JSON parser reads."""
    with RunLog(tmp_path, None, FACTS) as log:
        log.write(0, "train", loss=math.nan, norm=math.inf)
    assert records(tmp_path)[1] == {"kind": "train", "step": 0, "loss": None, "norm": None}
    assert read_log(tmp_path)["train"] == {0: "nan"}


def test_a_resume_drops_what_came_after_its_checkpoint(tmp_path):
    """Guards against steps that stand in the log twice, and against the loss of the evaluation at
    the checkpoint's step, which is not repeated."""
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
    """Guards against a second run that overwrites the first one's log and checkpoints."""
    folder = tmp_path / "log"
    write_run(folder)
    before = (folder / "log.jsonl").read_bytes()
    (tmp_path / "log_001").mkdir()
    RunLog(folder, None, FACTS).close()
    assert (tmp_path / "log_002" / "log.jsonl").read_bytes() == before
    assert len(records(folder)) == 1


def test_a_full_disk_warns_once_and_training_goes_on(tmp_path, capsys):
    """Guards against a run of days that ends because its log can't be written to."""
    log = RunLog(tmp_path, None, FACTS)
    for name in ("log.txt", "log.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir()  # not even root can append to a folder
    for step in range(3):
        log.write(step, "train", loss=1.0)
    assert capsys.readouterr().err.count("can't be written to") == 1


def test_a_log_dir_that_can_not_be_made(tmp_path):
    """Guards against a traceback if a file is where the directory should be."""
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
    """Guards against a wandb run that stays "running" on its site, without the last values."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(KeyError):
        with RunLog(tmp_path, None, FACTS, wandb=True) as log:
            log.write(3, "train", loss=1.5, mfu=None)
            raise KeyError
    log.close()  # a second time changes nothing
    assert wandb.calls == [("init", FACTS["config"]), ({"train/loss": 1.5}, 3), "finish"]


def test_tensorboard_is_closed_after_the_run(tmp_path, monkeypatch):
    """Guards against the loss of what TensorBoard's writer has buffered for two minutes."""
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


@pytest.mark.parametrize("flag, module", [
    ("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_told_before_any_move(tmp_path, monkeypatch, flag, module):
    """Guards against a log directory without its checkpoint, since the earlier run was moved away
    before the package was looked for."""
    folder = tmp_path / "log"
    write_run(folder)
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"is not installed: pip install {flag}"):
        RunLog(folder, None, FACTS, **{flag: True})
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_service_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    """Guards against a run that ends because wandb's site can't be reached."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def fail(*args, **values):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(wandb, "log", fail)
    monkeypatch.setattr(wandb, "finish", fail)
    with RunLog(tmp_path, None, FACTS, wandb=True) as log:
        for step in range(3):
            log.write(step, "train", loss=1.0)
    assert capsys.readouterr().err.count("warning: WandbSink: the network is unreachable") == 1
    monkeypatch.setattr(wandb, "init", fail)
    RunLog(tmp_path, None, FACTS, wandb=True).close()
    assert "--wandb: the network is unreachable" in capsys.readouterr().err


@pytest.mark.parametrize("gpt2_tokens", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_the_plot_of_any_run(tmp_path, steps, gpt2_tokens):
    """Guards against a run that can't be drawn: one without any record, or with HellaSwag."""
    write_run(tmp_path, steps)
    log = RunLog(tmp_path, steps, {**FACTS, "gpt2_tokens": gpt2_tokens})
    log.draw()
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("gpt2_tokens, fineweb_edu, expected", [
    (False, False, []), (True, False, [0.2945, 0.337]), (True, True, [3.2924, 0.2945, 0.337])])
def test_the_published_figures_are_for_runs_like_theirs(tmp_path, monkeypatch, gpt2_tokens,
                                                        fineweb_edu, expected):
    """Guards against GPT-2's line beside losses of other tokens or on another text."""
    import matplotlib.axes
    write_run(tmp_path)
    lines = []
    monkeypatch.setattr(matplotlib.axes.Axes, "axhline", lambda self, y, **style: lines.append(y))
    plot(records(tmp_path), tmp_path / "a.png", gpt2_tokens, fineweb_edu)
    assert lines == expected


@pytest.mark.parametrize("tokenizer, is_fineweb_edu, expected", [
    ("gpt2", True, (True, True)), ("gpt2", False, (True, False)), ("bpe", True, (False, False))])
def test_the_first_record_says_what_to_compare_with(tokenizer, is_fineweb_edu, expected):
    """Guards against published losses beside those on another text, or of another tokenizer."""
    data = SimpleNamespace(tokenizer=SimpleNamespace(name=tokenizer), description="a dataset",
                           is_fineweb_edu=is_fineweb_edu)
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(vocab_size=1)
    facts = describe_run({}, model, torch.device("cpu"), torch.float32, World(), 1, data)
    assert (facts["gpt2_tokens"], facts["fineweb_edu"]) == expected


def test_a_curve_leaves_out_what_was_not_finite(tmp_path):
    """Guards against a NaN that hides the rest of a curve, or stops the plot."""
    points = [{"kind": "train", "step": i, "loss": loss} for i, loss in enumerate([3.0, None, 2.0])]
    points.append({"kind": "val", "step": 0, "loss": 9.0})
    assert select_curve(points, "train") == ([0, 2], [3.0, 2.0])


def test_a_full_disk_keeps_the_last_plot_and_report(tmp_path, monkeypatch, capsys):
    """Guards against half an image, and against a run that ends for want of one."""
    log = RunLog(tmp_path, None, FACTS)
    (tmp_path / "report.md").write_bytes(b"before")
    (tmp_path / "log.png").write_bytes(b"before")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    for _ in range(2):
        log.draw()
        log.write_report()
    warnings = capsys.readouterr().err
    for name in ("log.png", "report.md"):
        assert (tmp_path / name).read_bytes() == b"before"
        assert warnings.count(f"warning: {name}: ") == 1


def test_a_full_disk_leaves_no_half_line(tmp_path):
    """Guards against half a line on a full disk that the next record continues: a line of five
    fields."""
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


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_a_notebooks_backend_does_not_end_a_run(tmp_path, data_root, backend):
    """Guards against a traceback at step 0 in every notebook, which sets MPLBACKEND for itself."""
    settings = {**TINY, "max_steps": 2, "num_samples": 0}
    done = subprocess.run(command("train_gpt2.py", "--data_root=data", *flags(**settings)),
                          cwd=tmp_path, env={**environment(), "MPLBACKEND": backend}, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert (tmp_path / "log" / "log.png").read_bytes().startswith(b"\x89PNG")


def test_text_that_is_not_utf8(tmp_path, data_root):
    """Guards against a prompt or a path with a Latin-1 letter that ends training at its first
    evaluation."""
    settings = {**TINY, "max_steps": 2, "eval_interval": 1, "data_root": "data"}
    argv = command("train_gpt2.py", *flags(**settings))
    argv = [os.fsencode(word) for word in argv] + [b"--sample_prompt=caf\xe9", b"--log_dir=l\xf6g"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / os.fsdecode(b"l\xf6g")
    assert b"warning" not in done.stderr
    assert "caf?" in (folder / "report.md").read_text()


# -----------------------------------------------------------------------------
# where an earlier run goes


def second_run(log_dir):
    """Start a run where another one was; returns what the moved log.jsonl was."""
    before = (log_dir / "log.jsonl").read_bytes()
    RunLog(log_dir, None, FACTS).close()
    assert len(records(log_dir)) == 1
    return before


def test_a_log_dir_that_is_a_link(tmp_path):
    """Guards against a second run that fails ("Invalid cross-device link") because its log_dir is a
    link to another disk, and the earlier files were to be moved beside the link."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").mkdir()
    link = tmp_path / "here" / "log"
    link.symlink_to(tmp_path / "disk" / "runs")
    (tmp_path / "disk" / "runs").mkdir()
    write_run(link)
    before = second_run(link)
    assert (tmp_path / "disk" / "runs_001" / "log.jsonl").read_bytes() == before
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["log"]


def test_the_working_directory_as_log_dir(tmp_path, monkeypatch):
    """Guards against --log_dir . that fails in its second run, or moves it beside the project."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    write_run(Path("."))
    before = second_run(Path("."))
    assert (project / "project_001" / "log.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def fake_mount_points(monkeypatch, *mounted):
    """Let these paths, and what lies in them, seem to be on another file system."""
    stat = Path.stat
    names = ["st_dev", "st_mode"]

    def fake_stat(self, **options):
        real = stat(self, **options)
        inside = any(self.absolute() == path or path in self.absolute().parents for path in mounted)
        values = {name: getattr(real, name) for name in names}
        return SimpleNamespace(**{**values, "st_dev": values["st_dev"] + inside})

    monkeypatch.setattr(Path, "stat", fake_stat)
    monkeypatch.setattr(Path, "lstat", lambda self: self.stat(follow_symlinks=False))


def test_a_mount_point_as_log_dir(tmp_path, monkeypatch):
    """Guards against a container's volume as log_dir, from which files can't be renamed to the
    folder that it is mounted in."""
    folder = tmp_path / "log"
    write_run(folder)
    fake_mount_points(monkeypatch, folder)
    before = second_run(folder)
    assert (folder / "log_001" / "log.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_file_on_another_disk_is_told_before_any_move(tmp_path, monkeypatch):
    """Guards against half of an earlier run in a numbered folder, and the other half in log/."""
    folder = tmp_path / "log"
    write_run(folder)
    (folder / "tensorboard").mkdir()
    before = sorted(path.name for path in folder.iterdir())
    fake_mount_points(monkeypatch, folder / "tensorboard")
    with pytest.raises(UserError, match="is on another disk than"):
        RunLog(folder, None, FACTS)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_resume_from_an_earlier_checkpoint_points_at_it(tmp_path):
    """Guards against a latest_checkpoint.pt that names a checkpoint which has been moved away."""
    folder = tmp_path / "log"
    write_run(folder)
    for step in (2, 4):
        (folder / f"model_{step:05d}.pt").write_text(str(step))
    (folder / "latest_checkpoint.pt").symlink_to("model_00004.pt")
    RunLog(folder, 2, FACTS).close()
    assert (folder / "latest_checkpoint.pt").read_text() == "2"
    assert (tmp_path / "log_001" / "model_00004.pt").exists()


# -----------------------------------------------------------------------------
# files of a stranger


@pytest.mark.parametrize("line", [
    "3", "[1, 2]", "null", '"text"', "[" * 100_000, "{}", '{"kind": "train"}',
    '{"kind": 3, "step": 1}', '{"kind": "train", "step": "1", "loss": 1.0}',
    '{"kind": "train", "step": 1, "loss": "x"}', '{"kind": "val", "step": 1}',
    '{"kind": "end", "step": 1, "elapsed": []}', "\xff\xfe",
    '{"kind": "train", "step": 1, "loss": 1%s}' % ("0" * 400)])
def test_a_line_that_is_no_record_is_left_out(tmp_path, line):
    """Guards against a traceback at each resume for a line of log.jsonl that is not ours."""
    write_run(tmp_path)
    (tmp_path / "model_00002.pt").write_bytes(b"")
    with open(tmp_path / "log.jsonl", "a", encoding="latin-1") as file:
        file.write(line + "\n")
    log = RunLog(tmp_path, 2, {**FACTS, "gpt2_tokens": True})
    log.draw()
    log.close()
    assert [r["kind"] for r in records(tmp_path)] == [
        "config", "val", "hella", "train", "train", "val", "hella", "resume"]


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="the system can't refuse links")
@pytest.mark.parametrize("name", ["log.txt", "log.jsonl"])
def test_a_link_is_not_written_through(tmp_path, name, capsys):
    """Guards against lines appended to a file of the user's, such as a shell's profile."""
    victim = tmp_path / "profile"
    victim.write_text("before")
    log = RunLog(tmp_path / "log", None, FACTS)
    (tmp_path / "log" / name).unlink(missing_ok=True)
    (tmp_path / "log" / name).symlink_to(victim)
    log.write(0, "train", loss=1.0)
    log.write(1, "train", loss=1.0)
    assert victim.read_text() == "before"
    assert capsys.readouterr().err.count("can't be written to") == 1


def test_a_resume_replaces_a_link(tmp_path):
    """Guards against an earlier log that is a link, and is rewritten where it leads to."""
    folder = tmp_path / "log"
    write_run(folder)
    (folder / "log.jsonl").rename(tmp_path / "elsewhere")
    (folder / "log.jsonl").symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    RunLog(folder, 2, FACTS).close()
    assert (tmp_path / "elsewhere").read_bytes() == before
    assert not (folder / "log.jsonl").is_symlink()
