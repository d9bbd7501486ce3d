"""
python -m pytest tests/data/test_fineweb.py

The command: killed and run again, on a full disk, with wrong flags. On CPU and offline; what needs
the GPT-2 vocabulary is skipped if tiktoken can neither find nor download it.
"""

import argparse
import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest

from conftest import ROOT
from corpus import (assert_fails, contents, fineweb_command, fineweb_here, make_dataset,
                    openai_gpt2, python_text, some_documents, write_jsonl)

import fineweb
from fineweb import PrepareConfig
from gptlib.common import UserError
from gptlib.config import shown_default
from gptlib.data import tokenizing
from gptlib.data.parts import WHOLE
from gptlib.data.shards import list_shards, read_meta
from gptlib.data.sources import FINEWEB, HubSource
from gptlib.data.tokenizer import load_tokenizer
from gptlib.lock import lock_directory

BPE = {"tokenizer": "bpe", "vocab_size": 300}
BPE_FLAGS = ["--tokenizer", "bpe", "--vocab_size", 300]


@pytest.fixture(scope="module")
def gpt2():
    return openai_gpt2()


def modification_times(paths):
    """What changes when a file is written again: (inode, time)."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


# -----------------------------------------------------------------------------
# killed, run again, run with other settings


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import fineweb
from gptlib import common
from gptlib.data import shards
write = common.atomic_write
def slow(path, content):
    write(path, content)
    print(path, flush=True)
    time.sleep(0.05)
fineweb.atomic_write = shards.atomic_write = slow
if __name__ == "__main__":
    common.run_main(fineweb.main)
"""


def kill_after_files(script, args, data, num_files):
    """Run the slow program, and kill -9 it when it has written that many files."""
    command = [sys.executable, str(script), *map(str, args), "--data_root", str(data)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    lines = (line for line in child.stdout if line.startswith(str(data)))
    for _ in range(num_files):
        next(lines)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe"])
def test_kill_and_continue(tmp_path, tokenizer):
    """Guards against a killed run that ends with other bytes, or writes a shard again."""
    if tokenizer == "gpt2":
        openai_gpt2()
    flags = ["--tokenizer", "bpe", "--vocab_size", 400] if tokenizer == "bpe" else []
    documents = some_documents(200) + [python_text()] + some_documents(100, seed=1)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "slow.py").write_text(SLOW.format(root=str(ROOT)))
    args = ["--files", str(source), "--shard_size", 2500, *flags]
    assert fineweb_here(*args, "--data_root", tmp_path / "whole").returncode == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) > 8

    # at the tokenizer or meta.json, between meta.json and its shard, after shards
    data = tmp_path / "data"
    for num_files in (1, 3, 6, 7):
        kill_after_files(tmp_path / "slow.py", args, data, num_files)
        finished = modification_times(data.glob("*.npy"))
        for path in finished:
            assert path.read_bytes() == whole[path.name]
        assert len(finished) < len(whole) - 2
    assert len(finished) >= 4
    assert not read_meta(data)["complete"]

    result = fineweb_here(*args, "--data_root", data)
    assert result.returncode == 0, result.stderr
    assert contents(data) == whole
    assert modification_times(finished) == finished
    counts_of_all_runs = f"301 documents ({documents.count('')} empty, 3 with lone"
    assert counts_of_all_runs in result.stdout


def test_small_corpus_killed_between_its_shards(tmp_path):
    """Guards against a small corpus, killed between its shards, in another order."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(50))
    make_dataset(tmp_path / "data", files=source, **BPE)
    whole = contents(tmp_path / "data")
    (val,), (train,) = (list_shards(tmp_path / "data", split) for split in ("val", "train"))
    before = modification_times([val])
    train.unlink()
    make_dataset(tmp_path / "data", files=source, **BPE)
    assert contents(tmp_path / "data") == whole
    assert modification_times([val]) == before


def test_run_again_and_with_other_settings(tmp_path):
    """Guards against making a complete dataset again, and continuing one of other settings."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(50))
    data = tmp_path / "data"
    args = ["--files", source, *BPE_FLAGS]
    first = fineweb_here(*args, "--data_root", data)
    assert first.returncode == 0, first.stderr
    assert "50 documents" in first.stdout
    before = modification_times(data.iterdir())
    again = fineweb_here(*args, "--data_root", data)
    assert again.returncode == 0, again.stderr
    assert "complete" in again.stdout
    assert "Nothing to do" in again.stdout
    seed_7 = fineweb_here(*args, "--seed", 7, "--data_root", data)
    assert_fails(seed_7, data, "seed was 1337, is 7")
    larger = fineweb_here(*args[:-1], 301, "--data_root", data)
    assert_fails(larger, "vocab_size was 300, is 301")
    assert_fails(larger, "its 2 shards edufineweb_val_000000.npy to edufineweb_train_000001.npy",
                 "meta.json and tokenizer.tiktoken", "nothing else")
    write_jsonl(source, some_documents(51))
    assert_fails(fineweb_here(*args, "--data_root", data), "source was")
    assert modification_times(data.iterdir()) == before


def test_a_dataset_among_the_texts_is_warned_of(tmp_path):
    """Guards against texts that are removed with a dataset which was written into their folder."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(50))
    result = fineweb_here("--files", source, *BPE_FLAGS, "--data_root", tmp_path)
    assert result.returncode == 0
    assert "holds texts of --files, too" in result.stderr
    result = fineweb_here("--files", source, *BPE_FLAGS, "--data_root", tmp_path / "data")
    assert "holds texts" not in result.stderr


def test_shards_of_another_program_are_left_alone(tmp_path):
    """Guards against shards of the original script that are mixed with ours, or overwritten."""
    np.save(tmp_path / "edufineweb_val_000000.npy", np.arange(5, dtype=np.uint16))
    (tmp_path / "a.txt").write_text("text")
    result = fineweb_here("--files", tmp_path / "a.txt", "--data_root", tmp_path)
    assert_fails(result, "did not make")
    assert len(list(tmp_path.glob("*.npy"))) == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_start_methods(tmp_path, method):
    """Guards against a forked or spawned process that hangs, or makes other bytes."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(60))
    options = {"files": str(source), "num_proc": 2, **BPE}
    context = multiprocessing.get_context(method)
    child = context.Process(target=make_dataset, args=(tmp_path / "child",), kwargs=options)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    make_dataset(tmp_path / "here", **options)
    assert contents(tmp_path / "child") == contents(tmp_path / "here")


# -----------------------------------------------------------------------------
# the room that is needed


def test_room_for_downloads_is_told(tmp_path, monkeypatch, capsys):
    """Guards against downloads that fill a disk with room for the shards alone."""
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda root: types.SimpleNamespace(free=21e9))
    shards = types.SimpleNamespace(root=tmp_path, part=WHOLE,
                                   totals=lambda: {"tokens": 0})
    recorded = {"revision": "a", "files": ["a.parquet"]}
    for folder, fits in ((tmp_path / "downloads", False), (None, True)):
        source = HubSource(FINEWEB, "sample-10BT", "text", recorded=recorded, folder=folder)
        source.resolve()
        fineweb.tell_room_needed(shards, source, None, FINEWEB, "sample-10BT")
        printed = capsys.readouterr()
        assert "take up to 20.00 GB more" in printed.out
        assert ("downloads up to 8.60 GB" not in printed.out) == fits
        assert ("may not fit" not in printed.err) == fits


@pytest.mark.parametrize("free, warns", [(10**4, True), (10**6, False)])
def test_room_needed_is_told(gpt2, tmp_path, monkeypatch, capsys, free, warns):
    """Guards against a disk that turns out too small after hours, when it is full."""
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(300))
    make_dataset(tmp_path / "data", files=source, max_tokens=10**5)
    out, err = capsys.readouterr()
    assert "up to 0.00 GB more" in out
    assert ("may not fit" in err) == warns


# -----------------------------------------------------------------------------
# errors that the user can fix


def test_wrong_line_keeps_the_finished_shards(tmp_path, monkeypatch):
    """Guards against one bad line at the end of a source that costs all work before it."""
    monkeypatch.setattr(tokenizing, "CHUNK", 200)
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(500))
    data = tmp_path / "data"
    make_dataset(data, files=source, shard_size=2000, **BPE)
    whole, n = contents(data), len(list_shards(data, "train"))
    for path in list_shards(data, "train")[3:]:
        path.unlink()
    text = source.read_text()
    lines = text.splitlines(keepends=True)
    damaged = "{" + lines[-1][1:].replace(":", "!", 1)  # of the same length: the same source
    source.write_text("".join(lines[:-1]) + damaged)
    with pytest.raises(UserError, match="a.jsonl, line 500: "):
        make_dataset(data, files=source, shard_size=2000, **BPE)
    assert 3 < len(list_shards(data, "train")) < n
    source.write_text(text)
    make_dataset(data, files=source, shard_size=2000, **BPE)
    assert contents(data) == whole


@pytest.mark.parametrize("flags, words", [
    (["--vocab_size", 65537, "--tokenizer", "bpe"], ["65537", "65536"]),
    (["--tokenizer", "bpe"], ["--vocab_size"]),
    (["--vocab_size", 256, "--tokenizer", "bpe"], ["256", "257"]),
    (["--vocab_size", 999], ["--tokenizer gpt2"]),
    (["--shard_size", 0], ["--shard_size is 0", "at least 1"]),
    (["--num_proc", 0], ["--num_proc is 0"]),
    (["--seed", -1], ["--seed is -1"]),
    (["--source", "web"], ["--source is 'web'", "stdlib"]),
    (["--pattern", "gpt2"], ["--pattern gpt2", "bpe"]),
    ([*BPE_FLAGS, "--pattern", "other"], ["--pattern is 'other'"]),
    (["--part", "1/2", "--max_tokens", 999], ["--max_tokens", "--part"]),
    (["--val_fraction", 1], ["1.0"]),
    (["--max_tokens", 1], ["--max_tokens is 1", "at least 2"]),
    (["--max_tokens", 999, *BPE_FLAGS, "--shard_size", 500], ["--max_tokens is 999", "1000"]),
    (["--prefix", "my_val_set"], ["my_val_set"]),
    (["--prefix", "a/b"], ["a/b"]),
    (["--files", ""], ["no files"]),
    (["--files", "."], ["no files", "'./**'"]),
    (["--split_on", ""], ["--split_on is empty"]),
    (["--data_root", "file/data"], ["file/data"]),
], ids=lambda flags: " ".join(map(str, flags)))
def test_wrong_flags(tmp_path, monkeypatch, flags, words):
    """Guards against a wrong flag that ends in a traceback, or leaves a directory behind."""
    (tmp_path / "file").write_text("")
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert_fails(fineweb_here("--files", "a.txt", *flags), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "file"]


def test_corpora_of_nothing(tmp_path):
    """Guards against an empty split of no text at all, on which training then fails."""
    source = tmp_path / "a.jsonl"
    source.write_text("\n")
    with pytest.raises(UserError, match="0 tokens"):
        make_dataset(tmp_path / "data", files=source, **BPE)
    source.write_text('{"text": ""}\n{"text": ""}\n')
    meta = make_dataset(tmp_path / "data", files=source, **BPE)
    assert meta["tokens"] == {"train": 1, "val": 1}
    assert meta["bytes"] == {"train": 0, "val": 0}
    assert meta["vocab_size"] == 257


def test_full_disk(tmp_path):
    """Guards against a full disk that leaves half a shard, or damages finished ones."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    mount = subprocess.run(command, capture_output=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small disk: {mount.stderr.decode().strip()}")
    try:
        documents = [python_text()[i:i + 500] for i in range(0, 20000, 500)] * 10
        source = write_jsonl(tmp_path / "a.jsonl", documents)
        args = ["--files", source, "--shard_size", 8000, *BPE_FLAGS, "--data_root"]
        assert_fails(fineweb_here(*args, disk), "No space left", ".npy", "intact")
        assert not list(disk.glob("*.tmp"))
        assert len(list(disk.glob("*.npy"))) > 2
        found = contents(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    fineweb_here(*args, tmp_path / "data")
    whole = contents(tmp_path / "data")
    del found["meta.json"]
    assert found == {name: whole[name] for name in found}


# -----------------------------------------------------------------------------
# the script


def test_import_is_silent_and_light():
    """Guards against an import of seconds, for a heavy package that few commands need."""
    heavy = {"datasets", "tokenizers", "pyarrow", "tqdm", "torch"}
    code = f"import sys, fineweb; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_help():
    """Guards against a --help that fails, as it does for a bare percent sign in a text."""
    assert fineweb_here("--help").stdout.startswith("usage: fineweb.py")


def test_pattern_gpt2_trains_a_tokenizer_that_splits_like_gpt2(tmp_path, gpt2):
    """Guards against a tokenizer that a GGUF file can't express although it was asked for."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(200))
    root = tmp_path / "data"
    make_dataset(root, files=source, tokenizer="bpe", vocab_size=300, pattern="gpt2")
    enc = load_tokenizer(root)
    assert enc.name == "bpe-gpt2"
    text = "They've 1234567 words\n\n  in it"
    pieces = [enc.decode(enc.encode_ordinary(piece)) for piece in ("They", "'ve", " 1234567")]
    assert pieces == ["They", "'ve", " 1234567"]
    assert enc._pat_str == load_tokenizer("gpt2")._pat_str
    assert enc.decode(enc.encode_ordinary(text)) == text


def test_second_preparation_of_a_directory_is_refused(tmp_path):
    """Guards against two processes that write the shards of one directory."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(50))
    with lock_directory(tmp_path / "data"):
        done = fineweb_command("--files", source, "--tokenizer", "bpe", "--vocab_size", 300,
                               "--data_root", tmp_path / "data")
    assert_fails(done, "in use by", str(os.getpid()))


def test_table_of_flags_is_complete():
    """Guards against a flag that is added, renamed or explained anew but not in docs/data.md."""
    documented = {field.name: (field.metadata["help"], shown_default(field))
                  for field in dataclasses.fields(PrepareConfig)}
    expected = []
    for action in fineweb.make_parser()._actions:
        help, default = documented.get(action.dest, (action.help, ""))
        if action.help != argparse.SUPPRESS and action.dest != "help":
            expected.append(f"| `--{action.dest}` | {default} | {help} |")
    lines = (ROOT / "docs" / "data.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| `--")] == expected
