"""
python -m pytest tests/data/test_verify.py

fineweb.py --verify names every shard that is not as it was written.
"""

import json
import shutil

import numpy as np
import pytest

from corpus import assert_fails, contents, fineweb_here, some_documents, write_jsonl

from gptlib.data.shards import checksums_of, list_shards, read_meta


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, flags of fineweb.py but --data_root) of a dataset of several shards."""
    folder = tmp_path_factory.mktemp("made")
    source = write_jsonl(folder / "a.jsonl", some_documents(200))
    flags = ["--files", source, "--shard_size", 2500, "--tokenizer", "bpe", "--vocab_size", 300]
    result = fineweb_here(*flags, "--data_root", folder / "data")
    assert result.returncode == 0, result.stderr
    assert len(list_shards(folder / "data", "train")) > 3
    return folder, flags


@pytest.fixture
def dataset(made, tmp_path):
    """(data_root, the flags that make it) of a copy of that dataset."""
    folder, flags = made
    shutil.copytree(folder / "data", tmp_path / "data")
    return tmp_path / "data", [*flags, "--data_root", tmp_path / "data"]


def flip_bit(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def remove_checksums(root):
    """Make meta.json as it was before it had checksums."""
    meta = read_meta(root)
    for shard in meta["shards"]:
        del shard["crc32"]
    (root / "meta.json").write_text(json.dumps(meta))


def verify(root, *args):
    return fineweb_here("--verify", "--data_root", root, *args)


def test_verify_whole_dataset(dataset):
    """Guards against calling a sound dataset damaged, and against a --verify that changes it."""
    root, _ = dataset
    before = contents(root)
    result = verify(root)
    assert result.returncode == 0, result.stderr
    assert f"{len(before) - 2} shards, no damage found" in result.stdout
    assert "no checksum" not in result.stdout
    assert contents(root) == before


def test_verify_names_each_bad_shard(dataset):
    """Guards against a changed byte or a missing shard that passes, or hides another."""
    root, args = dataset
    whole = contents(root)
    train = list_shards(root, "train")
    flip_bit(train[0], -1)
    flip_bit(train[2], 128)
    train[3].unlink()
    result = verify(root, "--num_proc", 2)
    assert_fails(result, f"3 of {len(train) + 1} shards", root)
    lines = result.stdout.splitlines()
    assert [str(line).split(":")[0] for line in lines] == [str(train[i]) for i in (0, 2, 3)]

    # what the message says to do
    for i in (0, 2):
        train[i].unlink()
    assert fineweb_here(*args).returncode == 0
    assert contents(root) == whole
    assert verify(root).returncode == 0


def test_verify_interrupted_dataset(dataset):
    """Guards against calling damaged what a kill leaves recorded but not yet written."""
    root, _ = dataset
    meta = read_meta(root)
    (root / meta["shards"][-1]["name"]).unlink()
    assert verify(root).returncode == 1, "of a complete dataset, no shard may be missing"
    (root / "meta.json").write_text(json.dumps(meta | {"complete": False}))
    result = verify(root)
    assert result.returncode == 0, result.stdout
    assert "not complete" in result.stdout
    (root / meta["shards"][1]["name"]).unlink()
    assert verify(root).returncode == 1


def test_dataset_without_checksums(dataset):
    """Guards against refusing, or not continuing, a dataset from before there were checksums."""
    root, args = dataset
    remove_checksums(root)
    result = verify(root)
    assert result.returncode == 0, result.stderr
    n = len(list(root.glob("*.npy")))
    assert f"{n} of {n} shards have no checksum" in result.stdout

    shards = {path.name: path.read_bytes() for path in root.glob("*.npy")}
    removed = list_shards(root, "train")[-2:]
    for path in removed:
        path.unlink()
    assert fineweb_here(*args).returncode == 0
    assert {path.name: path.read_bytes() for path in root.glob("*.npy")} == shards
    assert set(checksums_of(read_meta(root))) == {path.name for path in removed}
    assert f"{n - 2} of {n} shards have no checksum" in verify(root).stdout


def test_verify_shards_of_other_programs(tmp_path):
    """Guards against refusing shards without meta.json, and a truncated one that passes."""
    np.save(tmp_path / "edufineweb_val_000000.npy", np.arange(5, dtype=np.uint16))
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(5, dtype=np.uint16))
    result = verify(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 of 2 shards have no checksum" in result.stdout
    path = tmp_path / "edufineweb_train_000001.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert_fails(verify(tmp_path), "1 of 2 shards")


def test_verify_nothing(tmp_path):
    """Guards against a wrong --data_root that passes because it holds no bad shard."""
    assert_fails(verify(tmp_path / "nowhere"), "no shards in", tmp_path / "nowhere")
