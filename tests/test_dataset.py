"""
python -m pytest tests/test_dataset.py

Shards and meta.json, against files that are made by hand.
"""

import struct

import numpy as np
import pytest

from gptlib.common import UserError
from gptlib.dataset import list_shards, open_shard, read_meta

TOKENS = np.array([50256, 1, 65535], dtype=np.uint16)


def llm_c_header(magic=20240520, version=1, num_tokens=3):
    return struct.pack("<3i", magic, version, num_tokens) + bytes(4 * 253)


def test_open_shard(tmp_path):
    """A shard of either format is read wrongly, or into memory instead of mapped."""
    np.save(tmp_path / "x_val_000000.npy", TOKENS)
    (tmp_path / "x_val_000001.bin").write_bytes(llm_c_header() + struct.pack("<3H", *TOKENS))
    (tmp_path / "x_train_000002.npy.tmp").write_bytes(b"")
    paths = list_shards(tmp_path, "val")
    assert [path.name for path in paths] == ["x_val_000000.npy", "x_val_000001.bin"]
    assert not list_shards(tmp_path, "train")
    for path in paths:
        shard = open_shard(path)
        assert isinstance(shard, np.memmap)
        assert shard.dtype == np.uint16
        assert shard.tolist() == TOKENS.tolist()


@pytest.mark.parametrize("name, data", [
    ("a.bin", llm_c_header(num_tokens=4) + bytes(6)),
    ("a.bin", b"short"),
    ("a.bin", llm_c_header(version=2) + bytes(6)),
    ("a.bin", llm_c_header(magic=20240801) + bytes(6)),
    ("a.npy", b"\x93NUMPY truncated"),
    ("a.npy", b""),
    ("a.npy", np.zeros(9, np.int64)),
    ("a.npy", np.zeros((3, 3), np.uint16)),
    ("missing.npy", None)])
def test_open_shard_refuses(tmp_path, name, data):
    """A file that is no shard is trained on, or ends in a traceback."""
    if isinstance(data, np.ndarray):
        np.save(tmp_path / name, data)
    elif data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}.*python fineweb.py"):
        open_shard(tmp_path / name)


def test_truncated_npy(tmp_path):
    """A shard that lacks its last token is read."""
    np.save(tmp_path / "a.npy", np.zeros(100, np.uint16))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:-2])
    with pytest.raises(UserError, match="a.npy.*whole shard"):
        open_shard(tmp_path / "a.npy")


def test_read_meta(tmp_path):
    """A missing meta.json is an error, or a damaged one is not."""
    assert read_meta(tmp_path) == {}
    assert read_meta(tmp_path / "missing") == {}
    for text in ("{truncated", "3", '"text"'):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(UserError, match="meta.json"):
            read_meta(tmp_path)
