"""Checkpoints are saved whole or not at all, and latest_checkpoint.pt names the newest.

    python -m pytest tests/checkpoints/test_saver.py
"""

import pytest
import torch
from interop_helpers import training_state, write_checkpoint_directory

from gptlib.checkpoints.formats import load_checkpoint
from gptlib.checkpoints.saver import Saver, checkpoint_path, copy_to_host, save_checkpoint
from gptlib.common import UserError


def test_the_copy_to_save_shares_what_the_state_shares():
    """Guards against a copy of the embedding and another of the head, the same tensor: twice the
    largest one, in memory and in the file."""
    weight = torch.ones(3)
    copied = copy_to_host({"model": {"wte": weight, "head": weight}, "rng": (torch.zeros(1), 5)})
    weight.zero_()
    assert copied["model"]["wte"].sum() == 3
    assert copied["model"]["head"] is copied["model"]["wte"]
    assert copied["rng"] == (torch.zeros(1), 5)


def test_latest_checkpoint_without_symbolic_links(tmp_path, monkeypatch):
    """Guards against a save that fails on Windows and on network drives without symbolic links."""
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    for step in (3, 4):
        save_checkpoint(tmp_path, training_state(step), keep=1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest_checkpoint.pt", "model_00004.pt"]
    assert load_checkpoint(tmp_path / "latest_checkpoint.pt")["step"] == 4


@pytest.mark.parametrize("has_links", [True, False])
def test_latest_checkpoint_never_dangles(tmp_path, monkeypatch, has_links):
    """Guards against a latest_checkpoint.pt that names what a resume from an earlier checkpoint has
    moved away, or on Windows holds a copy of it."""
    def refuse(*args):
        raise OSError("no links here")

    if not has_links:
        monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    for step in (3, 4):
        save_checkpoint(tmp_path, training_state(step), keep=5)
    checkpoint_path(tmp_path, 4).unlink()
    with Saver(tmp_path, keep=5):
        assert load_checkpoint(tmp_path / "latest_checkpoint.pt")["step"] == 3
    checkpoint_path(tmp_path, 3).unlink()
    with Saver(tmp_path, keep=5):
        assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_is_removed(tmp_path):
    """Guards against a checkpoint's directory that a process was killed in removing, or a file in
    writing, and that takes its place on the disk for ever."""
    save_checkpoint(tmp_path, training_state(3), keep=5)
    (tmp_path / "model_00001.pt.removed").mkdir()
    (tmp_path / "model_00001.pt.removed" / "__0_0.distcp").write_bytes(b"x")
    (tmp_path / "model_00002.pt.tmp").write_bytes(b"x")
    (tmp_path / "model_00004.pt.tmp").mkdir()
    with Saver(tmp_path, keep=5):
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["latest_checkpoint.pt", "model_00003.pt"]


@pytest.mark.parametrize("name", ["model_00003.pt.tmp", "latest_checkpoint.tmp"])
@pytest.mark.parametrize("has_links", [True, False])
def test_links_are_not_written_through(tmp_path, monkeypatch, name, has_links):
    """Guards against a log folder from a stranger in which a temporary name is a link to a file
    elsewhere, which a save would overwrite."""
    def refuse(*args):
        raise OSError("no links here")

    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / name).symlink_to(outside)
    if not has_links:
        monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    path = save_checkpoint(tmp_path / "log", training_state(3), keep=5)
    assert outside.read_text() == "precious"
    assert load_checkpoint(path)["step"] == 3


@pytest.mark.parametrize("suffix", [".tmp", ".removed"])
def test_linked_folders_are_not_emptied(tmp_path, suffix):
    """Guards against a link under a temporary name of a checkpoint directory, through which the
    files of another folder would be removed, or written."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    path = tmp_path / "model_00003.pt"
    link = path.with_name(path.name + suffix)
    for _ in range(2):  # the second one replaces the first
        link.unlink(missing_ok=True)
        link.symlink_to(outside)
        write_checkpoint_directory(path, training_state(3))
    assert [file.name for file in outside.iterdir()] == ["precious"]
    assert load_checkpoint(path)["step"] == 3


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path, monkeypatch):
    """Guards against reading a checkpoint whose meaning has changed as if it were today's."""
    monkeypatch.setattr("gptlib.checkpoints.saver.CHECKPOINT_VERSION", 2)
    state = training_state()
    del state["version"]
    with Saver(tmp_path, keep=1) as saver:
        saver.save(state, wait=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match="version 2, and this program reads versions up to 1"):
        load_checkpoint(tmp_path / "model_00003.pt", mmap=True)
