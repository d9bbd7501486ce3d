"""Checkpoints are saved whole or not at all, and latest_checkpoint.pt names the newest.

    python -m pytest tests/checkpoints/test_saver.py
"""

import pytest
import torch
from interop_helpers import training_state

from gptlib.checkpoints.formats import load_checkpoint
from gptlib.checkpoints.saver import Saver, copy_to_host, save_checkpoint
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
