"""
python -m pytest tests/data/test_parts.py

A dataset made in parts, against the same dataset made by one run.
"""

import errno
import json
import shutil

import pytest

from corpus import all_tokens, assert_fails, fineweb_here, make_dataset, some_documents

from gptlib.data import merging
from gptlib.common import UserError
from gptlib.data.merging import merge_parts
from gptlib.data.parts import Part, parse_part
from gptlib.data.shards import list_shards, read_meta, verify_shard
from gptlib.data.tokenizer import export_tokenizer, train_bpe

OPTIONS = {"shard_size": 2000, "tokenizer": "bpe", "vocab_size": 300}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three parquet files of row groups of 16, of different lengths."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    root = tmp_path_factory.mktemp("text")
    documents = [text for text in some_documents(440) if "\ud800" not in text]
    for i, (begin, end) in enumerate([(0, 100), (100, 300), (300, len(documents))]):
        table = pa.table({"text": documents[begin:end]})
        pq.write_table(table, root / f"{i}.parquet", row_group_size=16)
    return root


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole") / "data"
    make_dataset(root, files=folder / "*.parquet", **OPTIONS)
    assert len(list_shards(root, "train")) > 5
    return root


def prepare_parts(data_root, count, folder, numbers=None):
    for number in numbers or range(1, count + 1):
        make_dataset(data_root, files=folder / "*.parquet", part=f"{number}/{count}", **OPTIONS)


def assert_same_dataset(root, whole, count):
    """The tokens of all shards one after the other, and all that is counted."""
    val, train = list_shards(root, "val"), list_shards(root, "train")
    assert [path.name for path in val] == ["edufineweb_val_000000.npy"]
    assert val[0].read_bytes() == list_shards(whole, "val")[0].read_bytes()
    assert all_tokens(root, "train") == all_tokens(whole, "train")
    meta, expected = read_meta(root), read_meta(whole)
    for key in expected.keys() - {"shards"}:
        assert meta[key] == expected[key], key
    for key in ("tokens", "bytes", "documents", "empty", "repaired"):
        sums = [sum(shard[key] for shard in m["shards"]) for m in (meta, expected)]
        assert sums[0] == sums[1], key
    names = [shard["name"] for shard in meta["shards"]]
    assert names == [path.name for path in val + train]
    for path, shard in zip(val + train, meta["shards"], strict=True):
        verify_shard(path, shard["crc32"])
    assert not list(root.glob("part_*"))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_merged_parts_equal_one_run(folder, whole, tmp_path, count):
    """Guards against a document at a border that is lost or in two parts, and another order."""
    prepare_parts(tmp_path, count, folder)
    merge_parts(tmp_path)
    assert_same_dataset(tmp_path, whole, count)


def test_part_continues_after_a_kill(folder, whole, tmp_path):
    """Guards against a continued part that skips rows of the whole source, not of its own."""
    prepare_parts(tmp_path, 3, folder)
    for number in (1, 2, 3):
        root = tmp_path / Part(number, 3).folder()
        meta = read_meta(root)
        (root / meta["shards"][-1]["name"]).unlink()
        (root / "meta.json").write_text(json.dumps(meta | {"complete": False}))
    with pytest.raises(UserError, match="part_0001_of_0003 is not complete"):
        merge_parts(tmp_path)
    prepare_parts(tmp_path, 3, folder)
    merge_parts(tmp_path)
    assert_same_dataset(tmp_path, whole, 3)


@pytest.mark.parametrize("moves", [0, 3])
def test_merge_continues_after_a_kill(folder, whole, tmp_path, monkeypatch, moves):
    """Guards against a killed merge that leaves shards which no later merge can find."""
    prepare_parts(tmp_path, 2, folder)
    replace, left = merging.os.replace, [moves]

    def replace_some(source, target):
        if str(source).endswith(".npy"):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(merging.os, "replace", replace_some)
    with pytest.raises(KeyboardInterrupt):
        merge_parts(tmp_path)
    assert read_meta(tmp_path)["complete"] is False
    monkeypatch.undo()
    merge_parts(tmp_path)
    assert_same_dataset(tmp_path, whole, 2)


@pytest.mark.parametrize("left", ["a whole folder", "half a folder"])
def test_merge_killed_while_it_removes_folders(folder, whole, tmp_path, left):
    """Guards against "lacks 1 of 2 parts" for a dataset that is complete."""
    prepare_parts(tmp_path, 2, folder)
    shutil.copytree(tmp_path / Part(2, 2).folder(), tmp_path / "copy",
                    ignore=shutil.ignore_patterns("*.npy"))
    merge_parts(tmp_path)
    (tmp_path / "copy").rename(tmp_path / Part(2, 2).folder())
    if left == "half a folder":
        (tmp_path / Part(2, 2).folder() / "meta.json").unlink()
    result = fineweb_here("--merge", "--data_root", tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_dataset(tmp_path, whole, 2)


def test_merge_keeps_a_part_with_shards(folder, tmp_path):
    """Guards against removing shards that the complete dataset around them does not hold."""
    prepare_parts(tmp_path, 2, folder)
    shutil.copytree(tmp_path / Part(2, 2).folder(), tmp_path / "copy")
    merge_parts(tmp_path)
    (tmp_path / "copy").rename(tmp_path / Part(2, 2).folder())
    assert_fails(fineweb_here("--merge", "--data_root", tmp_path), "holds shards", "complete")
    assert list_shards(tmp_path / Part(2, 2).folder(), "train")


@pytest.mark.parametrize("name", [
    "../train_gpt2.py", "/tmp/x_train_000001.npy", "a/b_train_000001.npy", "..", "",
    "..\\x_train_000001.npy", "c:x_train_000001.npy"])
def test_merge_writes_inside_its_directory_alone(folder, tmp_path, name):
    """Guards against a part whose meta.json moves a file over a script, which the next run runs."""
    root = tmp_path / "data"
    prepare_parts(root, 2, folder)
    part = root / Part(2, 2).folder()
    meta = json.loads((part / "meta.json").read_text())
    meta["shards"][0]["name"] = name
    (part / "meta.json").write_text(json.dumps(meta))
    (root / "train_gpt2.py").write_text("theirs")  # beside the part, as the name says
    (tmp_path / "train_gpt2.py").write_text("ours")
    assert_fails(fineweb_here("--merge", "--data_root", root), "meta.json", "plain name")
    assert (tmp_path / "train_gpt2.py").read_text() == "ours"


def test_merge_across_disks_is_refused_in_a_line(folder, tmp_path, monkeypatch):
    """Guards against a traceback if a part lies on another disk."""
    prepare_parts(tmp_path, 2, folder)

    def replace(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))

    monkeypatch.setattr(merging.os, "replace", replace)
    result = fineweb_here("--merge", "--data_root", tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "Invalid cross-device link" in result.stderr


def test_merge_refuses(folder, tmp_path):
    """Guards against a dataset with a hole: parts that are missing or made in another way."""
    made = tmp_path / "made"
    prepare_parts(made, 3, folder)
    names = [Part(number, 3).folder() for number in (1, 2, 3)]

    def try_merge(change, words):
        root = tmp_path / "data"
        shutil.copytree(made, root)
        change(root)
        before = sorted(path.name for path in root.rglob("*.npy"))
        with pytest.raises(UserError, match=words):
            merge_parts(root)
        assert sorted(path.name for path in root.rglob("*.npy")) == before
        shutil.rmtree(root)

    def set_in_meta(root, **changes):
        meta = read_meta(root / names[1])
        meta["settings"] |= changes.pop("settings", {})
        (root / names[1] / "meta.json").write_text(json.dumps(meta | changes))

    try_merge(lambda root: shutil.rmtree(root / names[1]), f"lacks 1 of 3 parts: {names[1]}")
    try_merge(lambda root: (root / names[2]).rename(root / "part_0003_of_0004"), "0003 and of 0004")
    try_merge(lambda root: set_in_meta(root, settings={"seed": 7}), "seed is 7, not 1337")
    try_merge(lambda root: set_in_meta(root, hub={"revision": "b"}), "files on the Hub is .*'b'")
    try_merge(lambda root: (root / names[1] / "tokenizer.tiktoken").write_bytes(b"IQ== 0\n"),
              "contents of the tokenizer")
    try_merge(lambda root: list_shards(root / names[2], "train")[0].unlink(), f"{names[2]} lacks")
    with pytest.raises(UserError, match="no parts in"):
        merge_parts(tmp_path / "nowhere")


def test_command_line(folder, tmp_path, whole):
    """Guards against flags that do not reach the functions which the other tests call."""
    flags = ["--files", folder / "*.parquet", "--shard_size", 2000, "--tokenizer", "bpe",
             "--vocab_size", 300, "--data_root", tmp_path / "data"]
    assert_fails(fineweb_here(*flags, "--part", "3/2"), "--part 3/2", "1/8")
    assert_fails(fineweb_here(*flags, "--part", "1/2", "--max_tokens", 9999), "--max_tokens")
    assert not (tmp_path / "data").exists()
    assert_fails(fineweb_here("--merge", "--data_root", tmp_path / "data"), "no parts")
    for part in ("2/2", "1/2"):
        result = fineweb_here(*flags, "--part", part)
        assert result.returncode == 0, result.stderr
    result = fineweb_here("--merge", "--data_root", tmp_path / "data")
    assert result.returncode == 0, result.stderr
    assert_same_dataset(tmp_path / "data", whole, 2)
    again = fineweb_here(*flags, "--part", "1/2")
    assert_fails(again, "is a dataset already")


def test_files_that_are_not_parquet_stay_whole(tmp_path):
    """Guards against a text file that is cut by a part's border, or is in no part."""
    texts = [f"file {i} " * (300 + i) for i in range(7)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    options = OPTIONS | {"files": tmp_path / "*.txt", "shard_size": 500}
    make_dataset(tmp_path / "whole", **options)
    for number in (1, 2, 3):
        make_dataset(tmp_path / "data", part=f"{number}/3", **options)
    merge_parts(tmp_path / "data")
    assert_same_dataset(tmp_path / "data", tmp_path / "whole", 3)


def test_small_corpus_is_refused(tmp_path):
    """Guards against another order for a corpus that one machine would shuffle."""
    for name, words in (("a", 1500), ("b", 100)):
        (tmp_path / f"{name}.txt").write_text("x" * words)
    enc = train_bpe(["ab"], 257)
    (tmp_path / "bytes").mkdir()
    export_tokenizer(enc, tmp_path / "bytes", 1024)
    options = {"files": tmp_path / "*.txt", "tokenizer": tmp_path / "bytes"}
    with pytest.raises(UserError, match="1501 tokens in part 1, too few for 2 parts"):
        make_dataset(tmp_path / "large", part="1/2", shard_size=2000, **options)
    for part in ("1/2", "2/2"):
        make_dataset(tmp_path / "data", part=part, shard_size=1000, **options)
    with pytest.raises(UserError, match="1602 tokens in all parts, less than two shards of 1000"):
        merge_parts(tmp_path / "data")


@pytest.mark.parametrize("count", [1, 2, 3, 8, 64, 1000])
@pytest.mark.parametrize("rows", [(10,), (1000, 1, 0, 77), (5,) * 100])
def test_rows_are_in_one_part_each(rows, count):
    """Guards against a row in no part, in two, or in a part before that of an earlier row."""
    found = []
    for number in range(1, count + 1):
        part = Part(number, count)
        for i, num_rows in enumerate(rows):
            first, last = part.rows(i, len(rows), num_rows)
            assert part.touches(i, len(rows)) or first == last
            found += [(i, row) for row in range(first, last)]
    assert found == [(i, row) for i, num_rows in enumerate(rows) for row in range(num_rows)]


def test_names_of_parts_sort():
    """Guards against shards that share a name with, or sort before, those of an earlier part."""
    for count in (1, 3, 8, 64, 999):
        firsts = [Part(number, count).first_index() for number in range(1, count + 1)]
        room = Part(1, count).max_shards()
        assert all(b - a >= room for a, b in zip(firsts, firsts[1:], strict=False))
        assert firsts[-1] + room <= 10**6


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2", "1/10000", ""])
def test_wrong_parts(text):
    """Guards against a typo that prepares a part which does not exist."""
    with pytest.raises(UserError, match="--part .*expected"):
        parse_part(text)
