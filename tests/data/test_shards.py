"""
python -m pytest tests/data/test_shards.py

Shards and meta.json, against files that are made by hand.
"""

import gc
import json
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from corpus import assert_fails, fineweb_here

from gptlib.common import UserError
from gptlib.data import shards
from gptlib.data.shards import (checksums_of, file_checksum, is_fineweb_edu, list_shards,
                                open_shard, read_meta, save_shard, shard_checksum,
                                tokens_per_byte, verify_shard, write_meta)

TOKENS = np.array([50256, 1, 65535], dtype=np.uint16)


def llm_c_header(magic=20240520, version=1, num_tokens=3):
    return struct.pack("<3i", magic, version, num_tokens) + bytes(4 * 253)


def test_open_shard(tmp_path):
    """Guards against a shard of either format that is read wrongly, or into memory."""
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


def test_names_of_llm_c_are_found(tmp_path):
    """Guards against llm.c's own starter files, which have no number, that are not found."""
    for split, n in (("train", 3), ("val", 2)):
        data = llm_c_header(num_tokens=n) + bytes(2 * n)
        (tmp_path / f"tiny_shakespeare_{split}.bin").write_bytes(data)
    (tmp_path / "train.bin").write_bytes(b"nanoGPT's, without a header")
    assert [path.name for path in list_shards(tmp_path, "val")] == ["tiny_shakespeare_val.bin"]
    result = fineweb_here("--verify", "--data_root", tmp_path)
    assert "2 shards, no damage found" in result.stdout, result.stderr


@pytest.mark.parametrize("meta, shards_of, expected", [
    ({"source": "HuggingFaceFW/fineweb-edu, sample-10BT, column text"}, "edufineweb", True),
    ({"source": "HuggingFaceFW/fineweb, sample-10BT, column text"}, "edufineweb", False),
    ({"source": "a.txt, column text: 1 files"}, "edufineweb", False),
    ({}, "edufineweb", True), ({}, "edu_fineweb", True), ({}, "fineweb", False)])
def test_whose_val_split_it_is(tmp_path, meta, shards_of, expected):
    """Guards against FineWeb-Edu's published figures beside the loss on another text."""
    np.save(tmp_path / f"{shards_of}_val_000000.npy", TOKENS)
    assert is_fineweb_edu(tmp_path, meta) is expected


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
    """Guards against training on a file that is no shard, and against a traceback."""
    if isinstance(data, np.ndarray):
        np.save(tmp_path / name, data)
    elif data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}.*python fineweb.py"):
        open_shard(tmp_path / name)


def test_truncated_npy(tmp_path):
    """Guards against reading a shard that lacks its last token."""
    np.save(tmp_path / "a.npy", np.zeros(100, np.uint16))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:-2])
    with pytest.raises(UserError, match="a.npy.*whole shard"):
        open_shard(tmp_path / "a.npy")


def test_read_meta(tmp_path):
    """Guards against refusing a directory without meta.json, or taking a damaged one."""
    assert read_meta(tmp_path) == {}
    assert read_meta(tmp_path / "missing") == {}
    for text in ("{truncated", "3", '"text"'):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(UserError, match="meta.json"):
            read_meta(tmp_path)


# -----------------------------------------------------------------------------
# checksums


def save_tokens(path):
    tokens = np.arange(1000, dtype=np.uint16)
    save_shard(path, tokens)
    return shard_checksum(tokens)


def test_checksum_is_that_of_the_file(tmp_path):
    """Guards against a checksum, computed before the shard is written, that is not the file's."""
    checksum = save_tokens(tmp_path / "a.npy")
    assert checksum == f"{zlib.crc32((tmp_path / 'a.npy').read_bytes()):08x}"
    assert checksum == file_checksum(tmp_path / "a.npy")
    assert open_shard(tmp_path / "a.npy").tolist() == list(range(1000))


def test_checksum_of_a_slice(tmp_path):
    """Guards against a checksum over the longer array of which a shard is a slice."""
    tokens = np.arange(1000, dtype=np.uint16)[100:200]
    save_shard(tmp_path / "a.npy", tokens)
    verify_shard(tmp_path / "a.npy", shard_checksum(tokens))


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("place", [128, 1000, 2127])
def test_verify_shard_finds_a_flipped_bit(tmp_path, place, bit):
    """Guards against one changed bit in the first, a middle or the last token."""
    path = tmp_path / "a.npy"
    checksum = save_tokens(path)
    verify_shard(path, checksum)
    data = bytearray(path.read_bytes())
    assert len(data) == 128 + 2 * 1000
    data[place] ^= 1 << bit
    path.write_bytes(data)
    assert len(open_shard(path)) == 1000, "the format alone should not show it"
    with pytest.raises(UserError, match=r"a\.npy: damaged"):
        verify_shard(path, checksum)


def test_verify_shard_without_checksum(tmp_path):
    """Guards against refusing another program's shard, and against a truncated one that passes."""
    path = tmp_path / "a.bin"
    path.write_bytes(llm_c_header() + bytes(6))
    verify_shard(path)
    path.write_bytes(llm_c_header() + bytes(4))
    with pytest.raises(UserError, match="a.bin"):
        verify_shard(path)


def test_checksums_of_meta_json():
    """Guards against a traceback for a dataset in which some shards have no checksum, or all."""
    assert checksums_of({}) == {}
    recorded = [{"name": "old.npy"}, {"name": "new.npy", "crc32": "00c0ffee"}]
    assert checksums_of({"shards": recorded}) == {"new.npy": "00c0ffee"}


def test_tokens_per_byte_of_meta_json():
    """Guards against bits per byte of the wrong split, or made up where bytes are not known."""
    meta = {"tokens": {"train": 30, "val": 10}, "bytes": {"train": 99, "val": 40}}
    assert tokens_per_byte(meta, "val") == 0.25
    assert tokens_per_byte({"tokens": meta["tokens"]}, "val") is None
    assert tokens_per_byte({}, "val") is None


def test_shard_in_pieces_is_what_numpy_writes(tmp_path, monkeypatch):
    """Guards against a shard, written a piece at a time, that lacks or repeats some of it."""
    monkeypatch.setattr(shards, "WRITTEN_AT_ONCE", 7)
    for size in (0, 1, 7, 20):
        tokens = np.arange(size, dtype=np.uint16)
        np.save(tmp_path / "numpy.npy", tokens)
        save_shard(tmp_path / "ours.npy", tokens)
        assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_shards_are_opened_in_several_threads(tmp_path, monkeypatch):
    """Guards against "AST constructor recursion depth mismatch": Python 3.11 parses in one thread
    at a time, and training opens a shard while the check of another begins."""
    path = tmp_path / "a_train_000000.npy"
    np.save(path, np.arange(100, dtype=np.uint16))

    def open_often(depth):
        if depth > 0:  # the parser compares the depths of the calls
            return open_often(depth - 1)
        return [len(open_shard(path)) for _ in range(300)]

    thresholds = gc.get_threshold()

    def switch_threads(*_):
        time.sleep(0)

    gc.callbacks.append(switch_threads)
    gc.set_threshold(5)
    try:
        with ThreadPoolExecutor(2) as threads:
            lengths = [*threads.map(open_often, (1, 40))]
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(switch_threads)
    assert lengths == [[100] * 300] * 2


@pytest.mark.parametrize("header", [b"{" * 60, b"(" * 60, b"1e999" + b"9" * 50, b"{'a': \xff}" * 6])
def test_a_damaged_header_gives_a_line(tmp_path, header):
    """Guards against a traceback: numpy parses the header as Python and raises TokenError,
    SyntaxError and others."""
    path = tmp_path / "a_train_000000.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    data = path.read_bytes()
    path.write_bytes(data[:10] + header + data[10 + len(header):])
    with pytest.raises(UserError, match="a whole shard"):
        open_shard(path)


@pytest.mark.parametrize("meta", [
    {"shards": [{"tokens": 3}]}, {"shards": 3}, {"shards": [3]}, {"tokenizer": None},
    {"tokens": [1, 2]}, {"bytes": {"val": "many"}}, {"settings": {}, "shards": [], "order": None},
    {"settings": {}, "order": None, "trained_within": {}, "shards": [],
     "tokens": {"train": 0, "val": 0}, "bytes": {"train": 0, "val": 0}},
    {"settings": {"shard_size": 9}, "order": None, "trained_within": {},
     "shards": [{"name": "a", "tokens": 1}]},
    {"tokens": {"train": 3}}, {"source": 7}, {"hub": {"revision": "a", "files": ["../a"]}},
    {"hub": {"files": []}}, {"ready": {"dataset": "a/b", "revision": "c"}},
    {"shards": [{"name": "../a_train_000001.npy"}]},
])
def test_a_meta_json_of_another_form(tmp_path, meta):
    """Guards against a KeyError with a traceback for damage that leaves valid JSON."""
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="cannot read .*meta.json"):
        read_meta(tmp_path)


def test_a_path_that_is_not_utf8(tmp_path):
    """Guards against a folder with a Latin-1 letter from which no dataset can be made."""
    meta = {"source": "caf\udce9/*.txt"}
    write_meta(tmp_path, meta)
    assert read_meta(tmp_path) == meta


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000])
def test_a_deep_meta_json(tmp_path, text):
    """Guards against a traceback for JSON that is nested deeper than Python's stack."""
    (tmp_path / "meta.json").write_text(text)
    result = fineweb_here("--verify", "--data_root", tmp_path)
    assert_fails(result, "meta.json", "nested too deeply")


def test_a_huge_meta_json(tmp_path):
    """Guards against a file of gigabytes in memory."""
    with open(tmp_path / "meta.json", "wb") as f:
        f.truncate(2**32)
    assert_fails(fineweb_here("--verify", "--data_root", tmp_path), "meta.json", "bytes")
