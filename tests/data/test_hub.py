"""
python -m pytest tests/data/test_hub.py

Datasets from a server on this machine that behaves as the Hugging Face Hub does on a bad day,
against the same files in a local directory. Offline.
"""

import io
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from corpus import assert_fails, contents, fineweb_command, make_dataset, some_documents
from hub_server import COMMIT, REPOSITORY, hub_server

from gptlib.data import hub
from gptlib.common import UserError
from gptlib.data.shards import list_shards, read_meta
from gptlib.data.hub import fetch_ahead, with_retries
from gptlib.data.sources import HubSource

OPTIONS = {"shard_size": 5000, "tokenizer": "bpe", "vocab_size": 300}
FLAGS = [text for key, value in OPTIONS.items() for text in (f"--{key}", str(value))]


def parquet_bytes(texts):
    """A file of rows with their text and 2 KB of something else each, in row groups of 7."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    file = io.BytesIO()
    table = pa.table({"id": [os.urandom(2000) for _ in texts], "text": texts})
    pq.write_table(table, file, row_group_size=7)
    return file.getvalue()


@pytest.fixture(scope="module")
def files():
    documents = [text for text in some_documents(330) if "\ud800" not in text]
    names = [f"data/train-{i:05d}-of-00005.parquet" for i in range(5)]
    return {name: parquet_bytes(documents[i::5]) for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def expected(files, tmp_path_factory):
    """The dataset that is made of the same files in a local directory."""
    root = tmp_path_factory.mktemp("expected")
    (root / "hub" / "data").mkdir(parents=True)
    for name, data in files.items():
        (root / "hub" / name).write_bytes(data)
    make_dataset(root / "data", dataset=root / "hub", **OPTIONS)
    assert len(list_shards(root / "data", "train")) > 5
    return shards_of(root / "data")


def shards_of(root):
    return {path.name: path.read_bytes() for path in Path(root).glob("*.npy")}


def prepare_from(server, tmp_path, *flags):
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"),
                        "HF_HUB_DISABLE_TELEMETRY": "1"}
    return fineweb_command("--dataset", REPOSITORY, "--data_root", tmp_path / "data", *FLAGS,
                           *flags, env=env)


def test_bad_network(files, expected, tmp_path):
    """Guards against a slow, failing or broken download that ends the run, loses rows or stays on
    the disk.

    Then the run is continued after a kill, when the dataset has a newer commit with other files.
    """
    with hub_server(files) as server:
        server.answers = {"HEAD": [503, 429, "slow"], "GET": ["drop", 429, 500, "slow", "drop"]}
        result = prepare_from(server, tmp_path)
        assert result.returncode == 0, result.stderr
        assert server.answers == {"HEAD": [], "GET": []}
        assert shards_of(tmp_path / "data") == expected
        assert read_meta(tmp_path / "data")["hub"] == {"revision": COMMIT, "files": [*files]}
        assert not (tmp_path / "data" / "downloads").exists()

        # as kill -9 leaves it: shards and a meta.json that is not complete
        meta = read_meta(tmp_path / "data")
        for shard in meta["shards"][-2:]:
            (tmp_path / "data" / shard["name"]).unlink()
        (tmp_path / "data" / "meta.json").write_text(json.dumps(meta | {"complete": False}))
        server.files = {"data/train-00000-of-00005.parquet": b"not even parquet"}
        server.old_files, server.commit = files, "newer" + "0" * 35
        server.downloads.clear()
        result = prepare_from(server, tmp_path)
        assert result.returncode == 0, result.stderr
        assert shards_of(tmp_path / "data") == expected
        # files that are in finished shards are not read again
        first = next(iter(files))
        read = sum(last - first for name, first, last in server.downloads if name == first)
        assert read < 0.9 * len(files[first])


def test_parts_from_the_hub(files, expected, tmp_path):
    """Guards against parts that overlap, differ in commit, or merge in another order."""
    data = tmp_path / "data"
    with hub_server(files) as server:
        for number in (3, 1):
            result = prepare_from(server, tmp_path, "--part", f"{number}/3")
            assert result.returncode == 0, result.stderr

        # part 1 is killed, and goes on when the dataset has a newer commit with other files
        root = data / "part_0001_of_0003"
        meta = read_meta(root)
        (root / meta["shards"][-1]["name"]).unlink()
        (root / "meta.json").write_text(json.dumps(meta | {"complete": False}))
        server.files = {"data/train-00000-of-00005.parquet": b"not even parquet"}
        server.old_files, server.commit = files, "newer" + "0" * 35
        assert_fails(fineweb_command("--merge", "--data_root", data), "lacks 1 of 3 parts")
        result = prepare_from(server, tmp_path, "--part", "1/3")
        assert result.returncode == 0, result.stderr
        # a part that begins only now can be told which commit the others read
        result = prepare_from(server, tmp_path, "--part", "2/3", "--revision", COMMIT)
        assert result.returncode == 0, result.stderr
        assert not list(data.rglob("downloads"))
    result = fineweb_command("--merge", "--data_root", data)
    assert result.returncode == 0, result.stderr
    merged = shards_of(data)
    assert merged["edufineweb_val_000000.npy"] == expected["edufineweb_val_000000.npy"]
    assert stream_of(merged) == stream_of(expected)


def stream_of(shards):
    """The tokens of the train split, as bytes, in the order of the names."""
    trains = [data for name, data in sorted(shards.items()) if "_train_" in name]
    return b"".join(np.load(io.BytesIO(data)).tobytes() for data in trains)


def test_downloads_are_kept(files, expected, tmp_path):
    """Guards against --keep_downloads that keeps nothing, or a second download of what it kept."""
    with hub_server(files) as server:
        assert prepare_from(server, tmp_path, "--keep_downloads").returncode == 0
        assert shards_of(tmp_path / "data") == expected
        assert {name for name, _, _ in server.downloads} == set(files)
        server.downloads.clear()
        again = prepare_from(server, tmp_path, "--keep_downloads", "--data_root",
                             tmp_path / "again")
        assert again.returncode == 0, again.stderr
        assert shards_of(tmp_path / "again") == expected
        assert server.downloads == []


def test_missing_file_is_told(files, tmp_path):
    """Guards against asking over and over for a file that the Hub lacks, and a traceback."""
    with hub_server(files) as server:
        server.answers["HEAD"] = [404] * 100
        result = prepare_from(server, tmp_path)
    assert_fails(result, "cannot read dataset somebody/text", "run the same command again")
    assert "trying again" not in result.stderr


# -----------------------------------------------------------------------------
# retries and fetching ahead, without a server


class Response:
    def __init__(self, status, **headers):
        self.status_code, self.headers = status, headers


class HttpError(OSError):
    def __init__(self, status, **headers):
        super().__init__(f"status {status}")
        self.response = Response(status, **headers)


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited, without waiting."""
    seconds = []
    monkeypatch.setattr(hub.time, "sleep", seconds.append)
    return seconds


def failing(*errors):
    errors = list(errors)

    def work():
        if errors:
            raise errors.pop(0)
        return "done"
    return work


def test_retries_wait_longer_each_time(waits):
    """Guards against asking a busy server again at once, which keeps it busy."""
    errors = [HttpError(500), ConnectionError("reset"), TimeoutError(), OSError("short download")]
    assert with_retries("a", failing(*errors)) == "done"
    assert all(2 ** i / 2 <= seconds <= 2 ** i for i, seconds in enumerate(waits))
    assert len(waits) == 4


def test_retry_after_is_obeyed(waits):
    """Guards against coming back earlier than the Hub says."""
    assert with_retries("a", failing(HttpError(429, **{"Retry-After": "17"}))) == "done"
    assert waits == [17]


@pytest.mark.parametrize("error", [
    HttpError(404), HttpError(401), OSError(28, "No space left on device"), UserError("no"),
    KeyError("a fault of the program")], ids=repr)
def test_lasting_errors_are_not_retried(waits, error):
    """Guards against a wrong name or a full disk that is told after six minutes."""
    with pytest.raises(type(error)):
        with_retries("a", failing(error))
    assert waits == []


def test_retries_end(waits):
    """Guards against asking for ever a server that is gone."""
    with pytest.raises(HttpError):
        with_retries("a", failing(*[HttpError(503) for _ in range(99)]))
    assert len(waits) == hub.MAX_TRIES - 1
    assert 120 < sum(waits) < 600


def test_fetch_ahead_is_in_order_and_bounded():
    """Guards against files in the order of the network, or all of them on the disk at once."""
    started, lock = [], threading.Lock()

    def fetch(name):
        with lock:
            started.append(name)
        time.sleep(0.02 * (3 - name % 4))
        return name

    for count, name in enumerate(fetch_ahead(fetch, range(12), 2)):
        assert name == count
        with lock:
            assert max(started) <= count + 2
    assert sorted(started) == list(range(12))


def test_fetch_ahead_raises_where_the_file_is_due():
    """Guards against an error lost in its thread, or raised before the files that are there."""
    def fetch(name):
        if name == 2:
            raise ConnectionError("gone")
        return name
    stream = fetch_ahead(fetch, range(5), 2)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ConnectionError, match="gone"):
        next(stream)


def test_file_is_removed_when_its_last_row_is_read(files, tmp_path, monkeypatch):
    """Guards against a file that is removed under the threads that read it, or never."""
    def fetch(self, path):
        local = tmp_path / Path(path).name
        local.write_bytes(files[path])
        return str(local)
    monkeypatch.setattr(hub.HubFiles, "fetch", fetch)
    recorded = {"revision": COMMIT, "files": [*files]}
    source = HubSource(REPOSITORY, None, "text", recorded=recorded, folder=tmp_path)
    source.resolve()
    groups = list(source.batches())
    assert len(list(tmp_path.iterdir())) == 5
    for group in groups:
        assert Path(group.file.path).exists()
        list(group.documents())
    assert contents(tmp_path) == {}
