"""Checkpoint directories: what a sharded run wrote is read whole, whatever Python wrote it.

    python -m pytest tests/checkpoints/test_directory.py

tests/training/test_sharded.py has those of several processes, test_hostile.py those of strangers.
"""

import io
import json
import pickle
from enum import Enum

from interop_helpers import assert_same_nest, training_state, write_checkpoint_directory

from gptlib.checkpoints.directory import checksum
from gptlib.checkpoints.formats import load_checkpoint


def test_a_directory_holds_what_was_saved(tmp_path):
    """Guards against weights that are read from other rows, or a tie that is lost."""
    state = training_state()
    path = write_checkpoint_directory(tmp_path / "model_00003.pt", state)
    found = load_checkpoint(path)
    assert_same_nest(found, state)
    model = found["model"]
    assert model["transformer.wte.weight"].data_ptr() == model["lm_head.weight"].data_ptr()


class OldPickler(pickle.Pickler):
    """Pickles members of an enum as Python 3.11.2 does: as getattr(enum, name)."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_of_any_python_is_read(tmp_path):
    """Guards against checkpoint directories that Debian's Python writes and nobody can read."""
    state = training_state()
    path = write_checkpoint_directory(tmp_path / "model_00003.pt", state)
    metadata, content = path / ".metadata", io.BytesIO()
    OldPickler(content).dump(pickle.loads(metadata.read_bytes()))
    assert b"getattr" in content.getvalue()
    metadata.write_bytes(content.getvalue())
    checksums = path / "checksums.json"
    listed = json.loads(checksums.read_bytes()) | {".metadata": checksum(metadata)}
    checksums.write_text(json.dumps(listed))
    assert_same_nest(load_checkpoint(path)["model"], state["model"])
