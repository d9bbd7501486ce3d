"""
python -m pytest tests/data/test_ready.py

Shards that others have made, from a server on this machine that behaves as the Hugging Face Hub
does on a bad day. The real Hub is not asked. All of it needs the GPT-2 vocabulary.
"""

import json
import os

import numpy as np
import pytest

from corpus import assert_fails, fineweb_command, fineweb_here, openai_gpt2, python_text
from hub_server import COMMIT, REPOSITORY, hub_server

from gptlib.data.loader import open_dataset
from gptlib.data.shards import list_shards, read_meta

SHARD = 5000  # tokens in a file
TRAIN = [f"edu_fineweb_train_{number:06d}.bin" for number in range(1, 6)]
VAL = "edu_fineweb_val_000000.bin"


def llm_c_file(tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes()


@pytest.fixture(scope="module")
def stream():
    """As many real GPT-2 tokens as all files hold, in documents."""
    enc = openai_gpt2()
    one = [enc.eot_token, *enc.encode_ordinary(python_text())]
    return np.resize(one, SHARD * 6)


@pytest.fixture(scope="module")
def files(stream):
    shards = np.split(stream, 6)
    named = dict(zip([VAL, *TRAIN], map(llm_c_file, shards), strict=True))
    return named | {"README.md": b"# shards", "hellaswag_val.bin": b"something else"}


def fetch(server, tmp_path, *flags, name=REPOSITORY):
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"),
                        "HF_HUB_DISABLE_TELEMETRY": "1"}
    return fineweb_command("--ready", name, "--data_root", tmp_path / "data", *flags, env=env)


def fetched_names(server):
    return {name for name, _, _ in server.downloads if name.endswith(".bin")}


def test_bad_network(files, stream, tmp_path):
    """Guards against a dropped connection or a busy Hub that ends the command or damages a shard.

    Then more is asked for, when the dataset has a newer commit with other files.
    """
    with hub_server(files) as server:
        server.answers = {"HEAD": [503, 429], "GET": ["drop", 429, "slow", "drop"]}
        result = fetch(server, tmp_path, "--max_tokens", 2 * SHARD)
        assert result.returncode == 0, result.stderr
        assert server.answers == {"HEAD": [], "GET": []}
        assert fetched_names(server) == {VAL, *TRAIN[:2]}
        assert not (tmp_path / "data" / "downloads").exists()
        meta = read_meta(tmp_path / "data")
        assert meta["tokens"] == {"train": 2 * SHARD, "val": SHARD}
        assert meta["complete"] is True
        assert meta["ready"]["revision"] == COMMIT

        server.downloads.clear()
        server.old_files, server.commit = files, "newer" + "0" * 35
        server.files = {TRAIN[0]: b"another file"}
        result = fetch(server, tmp_path)
        assert result.returncode == 0, result.stderr
        assert fetched_names(server) == set(TRAIN[2:])
    data = open_dataset(tmp_path / "data", 50)
    assert (data.train.n_tokens, data.val.n_tokens) == (5 * SHARD, SHARD)
    x = next(data.train.micro_batches(2 * SHARD, 500, 10)).x
    assert x.flatten().tolist() == stream[3 * SHARD:][:500].tolist()


def test_what_is_not_published_is_computed(files, stream, tmp_path):
    """Guards against bits per byte that are missing or wrong: the shards do not say the bytes."""
    with hub_server(files) as server:
        assert fetch(server, tmp_path, "--max_tokens", 2).returncode == 0
    text = openai_gpt2().decode_bytes([token for token in stream[:SHARD] if token != 50256])
    meta = read_meta(tmp_path / "data")
    assert meta["bytes"]["val"] == len(text)
    assert meta["shards"][0]["documents"] == np.count_nonzero(stream[SHARD:2 * SHARD] == 50256)
    assert fineweb_here("--verify", "--data_root", tmp_path / "data").returncode == 0


def test_killed_between_two_shards(files, tmp_path):
    """Guards against a continued command that fetches again what is there, or leaves a hole."""
    with hub_server(files) as server:
        assert fetch(server, tmp_path).returncode == 0
        # as kill -9 leaves it: the last record is there before its shard
        root = tmp_path / "data"
        whole = {path.name: path.read_bytes() for path in root.glob("*.bin")}
        meta = read_meta(root)
        (root / TRAIN[3]).unlink()
        (root / TRAIN[4]).unlink()
        meta["shards"] = [shard for shard in meta["shards"] if shard["name"] != TRAIN[4]]
        (root / "meta.json").write_text(json.dumps(meta | {"complete": False}))
        server.downloads.clear()
        result = fetch(server, tmp_path)
        assert result.returncode == 0, result.stderr
        assert fetched_names(server) == {TRAIN[3], TRAIN[4]}
    assert {path.name: path.read_bytes() for path in root.glob("*.bin")} == whole


@pytest.mark.parametrize("damage, words", [
    (lambda data: data[:-2], "expected header"),
    (lambda data: b"<html>" + data[6:], "expected header"),
    (lambda data: data[:-2] + np.uint16(50257).tobytes(), "token 50257"),
], ids=["truncated", "another file", "token of another vocabulary"])
def test_a_file_that_is_no_shard(files, tmp_path, damage, words):
    """Guards against training on a file of the Hub that is damaged or of another tokenizer."""
    with hub_server(files | {TRAIN[1]: damage(files[TRAIN[1]])}) as server:
        result = fetch(server, tmp_path)
    assert_fails(result, TRAIN[1], words)
    names = {path.name for path in list_shards(tmp_path / "data", "train")}
    assert names == {TRAIN[0]}
    assert not read_meta(tmp_path / "data")["complete"]


def test_a_directory_with_something_else_is_left_alone(files, tmp_path):
    """Guards against shards of two datasets, or two tokenizers, in one directory."""
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "edufineweb_train_000001.npy", np.arange(9, dtype=np.uint16))
    with hub_server(files) as server:
        assert_fails(fetch(server, tmp_path), "another dataset", "--data_root")
        assert server.downloads == []


@pytest.mark.parametrize("flags, words", [
    (["--ready", "fineweb"], "fineweb-edu-100B"),
    (["--ready", "../x"], "--ready ../x"),
    (["--ready", "a/b/c"], "--ready a/b/c"),
    (["--ready", "fineweb-10B", "--tokenizer", "gpt2"], "--ready goes with"),
    (["--ready", "fineweb-10B", "--verify"], "--ready goes with"),
], ids=lambda flags: " ".join(flags) if isinstance(flags, list) else "")
def test_wrong_flags(tmp_path, monkeypatch, flags, words):
    """Guards against a name or a flag that is silently ignored, or a directory left behind."""
    monkeypatch.chdir(tmp_path)
    assert_fails(fineweb_here(*flags), words)
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_of_other_files(tmp_path):
    """Guards against a dataset of text that is taken for ready shards."""
    with hub_server({"data/train-00000-of-00001.parquet": b"text"}) as server:
        assert_fails(fetch(server, tmp_path), "no set of ready shards")
    assert not (tmp_path / "data" / "meta.json").exists()
