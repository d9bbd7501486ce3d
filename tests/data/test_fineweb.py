"""
python -m pytest tests/data/test_fineweb.py

Whole datasets against a plain reference loop over tiktoken, and against the uninterrupted run. All
on CPU and offline; what needs the GPT-2 vocabulary is skipped where tiktoken can neither find nor
download it.
"""

import json
import multiprocessing
import shutil
import signal
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from conftest import ROOT
from corpus import (all_tokens, assert_fails, clean, contents, fineweb_command, openai_gpt2,
                    python_text, reference_tokens, some_documents, write_jsonl)

import fineweb
from fineweb import prepare
from gptlib.data import preparation
from gptlib.common import UserError
from gptlib.data.shards import list_shards, read_checksums, read_meta
from gptlib.lock import lock_directory
from gptlib.data.parts import WHOLE
from gptlib.data.sources import FINEWEB, HubSource
from gptlib.data.tokenizer import EOT, load_tokenizer, train_bpe

BPE = {"tokenizer": "bpe", "vocab_size": 300}
BPE_FLAGS = ["--tokenizer", "bpe", "--vocab_size", 300]


@pytest.fixture(scope="module")
def gpt2():
    return openai_gpt2()


def prepare_files(data_root, path, **options):
    return prepare(data_root, "files", files=str(path), **options)


def modification_times(paths):
    """What changes when a file is written again: (inode, time)."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


# -----------------------------------------------------------------------------
# shards


def test_shards_of_the_original_recipe(gpt2, tmp_path):
    """Names, sizes, order or tokens of shards differ from the original script's."""
    documents = some_documents(400)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    prepare_files(tmp_path / "data", source, shard_size=3000, num_proc=2)
    stream = sum(reference_tokens(gpt2, map(clean, documents)), [])
    n = -(-len(stream) // 3000)
    names = [f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy" for i in range(n)]
    assert {path.name for path in (tmp_path / "data").glob("*.npy")} == set(names)
    for i, name in enumerate(names):
        shard = np.load(tmp_path / "data" / name)
        assert shard.dtype == np.uint16
        assert shard.tolist() == stream[3000 * i:3000 * (i + 1)]


def test_meta_json_counts_tokens_bytes_and_documents(gpt2, tmp_path):
    """Loss in bits per byte is wrong because meta.json counts other tokens or bytes."""
    documents = some_documents(400)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    returned = prepare_files(tmp_path / "data", source, shard_size=3000, num_proc=2)
    stream = sum(reference_tokens(gpt2, map(clean, documents)), [])
    meta = read_meta(tmp_path / "data")
    assert meta == returned
    assert meta["complete"] is True
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"]) == ("gpt2", 50257, 50256)
    assert meta["tokens"] == {"train": len(stream) - 3000, "val": 3000}
    assert sum(meta["bytes"].values()) == sum(len(clean(text).encode()) for text in documents)
    val_text = gpt2.decode_bytes([token for token in stream[:3000] if token != 50256])
    assert meta["bytes"]["val"] == len(val_text)
    count = {key: sum(shard[key] for shard in meta["shards"])
             for key in ("documents", "empty", "repaired")}
    assert count["documents"] == len(documents)
    assert count["empty"] == sum(text == "" for text in documents)
    assert count["repaired"] == sum("\ud800" in text for text in documents)


@pytest.mark.parametrize("seed", [1, 2])
def test_small_corpus(gpt2, tmp_path, seed):
    """A small corpus loses a document, keeps its order, or holds out another share than a tenth."""
    documents = some_documents(300)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    meta = prepare_files(tmp_path / "data", source, shard_size=10**5, seed=seed)
    tokens = all_tokens(tmp_path / "data", "train") + all_tokens(tmp_path / "data", "val")
    assert meta["tokens"]["val"] == round(0.1 * len(tokens))
    starts = [i for i, token in enumerate(tokens) if token == 50256]
    pieces = [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]
    expected = reference_tokens(gpt2, map(clean, documents))
    assert pieces != expected
    assert sorted(pieces) == sorted(expected)
    in_val = [piece for start, piece in zip(starts, pieces, strict=True)
              if start >= meta["tokens"]["train"]]
    assert meta["shards"][0]["documents"] == len(in_val)
    assert meta["shards"][0]["empty"] == in_val.count([50256])


def test_seed_decides_the_order_of_a_small_corpus(gpt2, tmp_path):
    """The seed has no effect, or something besides the seed has one."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(300))
    for seed in (1, 2):
        prepare_files(tmp_path / str(seed), source, shard_size=10**5, seed=seed)
    assert all_tokens(tmp_path / "1") != all_tokens(tmp_path / "2")
    prepare_files(tmp_path / "again", source, shard_size=10**5, seed=1, num_proc=1)
    assert contents(tmp_path / "1") == contents(tmp_path / "again")


def test_small_corpus_of_more_than_one_train_shard(gpt2, tmp_path):
    """--shard_size changes the order or the split of a small corpus."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(100))
    total = sum(prepare_files(tmp_path / "a", source)["tokens"].values())
    size, val_size = total // 2 + 1, round(total / 4)
    meta = prepare_files(tmp_path / "b", source, shard_size=size, val_fraction=0.25)
    expected = [val_size, size, total - val_size - size]
    assert [shard["tokens"] for shard in meta["shards"]] == expected
    one, two = (all_tokens(tmp_path / name, "train") + all_tokens(tmp_path / name, "val")
                for name in "ab")
    assert one == two


def test_tail_of_one_text_file_is_held_out(gpt2, tmp_path):
    """A single text is put in another order, or its line ends change."""
    text = python_text().replace("\n", "\r\n")
    (tmp_path / "a.txt").write_bytes(text.encode())
    prepare_files(tmp_path / "data", tmp_path / "*.txt", val_fraction=0.2)
    tokens = all_tokens(tmp_path / "data", "train") + all_tokens(tmp_path / "data", "val")
    assert tokens == reference_tokens(gpt2, [text])[0]


def test_document_longer_than_a_shard(gpt2, tmp_path):
    """A document that fills several shards is cut short, or counted in each of them."""
    documents = ["short", python_text(), "", "short again"]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    meta = prepare_files(tmp_path / "data", source, shard_size=1000)
    assert all_tokens(tmp_path / "data") == sum(reference_tokens(gpt2, documents), [])
    assert [shard["documents"] for shard in meta["shards"]][1:4] == [0, 0, 0]


def test_hub_layout_in_a_local_directory(gpt2, tmp_path):
    """The code that streams FineWeb-Edu loses rows, or continues at the wrong one."""
    pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq
    documents = [text for text in some_documents(120) if "\ud800" not in text]
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    files = [documents[i::3] for i in range(3)]
    for i, texts in enumerate(files):
        table = pa.table({"id": list(range(len(texts))), "text": texts})
        pq.write_table(table, hub / "data" / f"train-{i:05d}-of-00003.parquet")
    data = tmp_path / "data"
    prepare(data, dataset=str(hub), shard_size=700)
    assert all_tokens(data) == sum(reference_tokens(gpt2, sum(files, [])), [])

    whole = contents(data)
    for path in list_shards(data, "train")[2:]:
        path.unlink()
    prepare(data, dataset=str(hub), shard_size=700)
    assert contents(data) == whole
    with pytest.raises(UserError, match="no column 'body' in .*'id', 'text'"):
        prepare(tmp_path / "other", dataset=str(hub), column="body")
    with pytest.raises(UserError, match="cannot read dataset"):
        prepare(tmp_path / "other", dataset=str(tmp_path / "nowhere"))


# -----------------------------------------------------------------------------
# a tokenizer trained on the corpus


@pytest.fixture
def training_text(monkeypatch):
    """The strings that prepare trains a tokenizer on, once it has done so."""
    seen = []

    def train(texts, vocab_size, name):
        seen.extend(texts)
        return train_bpe(iter(seen), vocab_size, name)

    monkeypatch.setattr(fineweb, "train_bpe", train)
    return seen


@pytest.mark.parametrize("shard_size", [100, 1500, 4000, 6000, 10**8], ids=str)
def test_tokenizer_sees_the_train_split_only(tmp_path, training_text, shard_size):
    """The tokenizer is trained on text of the val split, in a small corpus or a large one."""
    documents = [f"[{i}] " + f"words of document {i * 7919}, " * 3 for i in range(300)]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    meta = prepare_files(tmp_path / "data", source, shard_size=shard_size, **BPE)
    enc = load_tokenizer(tmp_path / "data")
    val, train = (enc.decode(all_tokens(tmp_path / "data", split)) for split in ("val", "train"))
    in_order = train + val if meta["order"] == "seeded" else val + train
    assert sorted(in_order.split(EOT)[1:]) == sorted(documents)

    seen = "".join(training_text)
    held_out = [text for text in val.split(EOT) if text.endswith(", ") and text.startswith("[")]
    assert held_out
    numbers = [text.split(" ")[0] for text in held_out]
    assert not [number for number in numbers if number in seen]
    if shard_size != 100:
        assert len(seen) > 0.3 * len("".join(documents))

    total = sum(meta["tokens"].values())
    is_small = total < 2 * shard_size
    assert (meta["order"] == "seeded") == is_small
    assert meta["tokens"]["val"] == (round(0.1 * total) if is_small else shard_size)


def test_tokenizer_of_one_text_file(tmp_path, training_text):
    """The only text there is teaches the tokenizer too little, or its own val split."""
    (tmp_path / "a.txt").write_text(python_text())
    meta = prepare_files(tmp_path / "data", tmp_path / "a.txt", tokenizer="bpe", vocab_size=500)
    enc = load_tokenizer(tmp_path / "data")
    train = enc.decode(all_tokens(tmp_path / "data", "train"))
    seen = "".join(training_text)
    assert train.removeprefix(EOT).startswith(seen)
    assert len(seen) > 0.8 * len(python_text())
    assert meta["vocab_size"] == enc.n_vocab == 500
    assert meta["eot"] == enc.eot_token == 499
    tokens = all_tokens(tmp_path / "data", "train") + all_tokens(tmp_path / "data", "val")
    assert enc.decode(tokens) == EOT + python_text()


def uneven_text(rare_first):
    """Text of which one part has many more tokens a byte than the other."""
    rare = "".join(map(chr, np.random.default_rng(0).integers(0x100, 0x2000, 12000)))
    return rare + "abcdefgh " * 5000 if rare_first else "ab " * 14000 + rare


def prepare_uneven_text(tmp_path, training_text, rare_first, shard_size):
    """Returns (meta, bytes of the text, bytes of val, bytes that the tokenizer has seen)."""
    text = uneven_text(rare_first)
    (tmp_path / "a.txt").write_text(text)
    meta = prepare_files(tmp_path / "data", tmp_path / "a.txt", shard_size=shard_size, **BPE)
    enc = load_tokenizer(tmp_path / "data")
    val = enc.decode_bytes(all_tokens(tmp_path / "data", "val"))
    text, seen = text.encode(), "".join(training_text).encode()
    assert text.count(seen) == 1
    assert len(val) > 1000
    return meta, text, val, seen


def test_cut_moves_past_what_the_tokenizer_saw(tmp_path, training_text):
    """A tenth of the tokens of an uneven text reaches into what the tokenizer was trained on."""
    meta, text, val, seen = prepare_uneven_text(tmp_path, training_text, True, 10**8)
    assert meta["order"] == "seeded"
    assert len(text) - len(val) >= len(seen)
    assert meta["tokens"]["val"] < 0.1 * sum(meta["tokens"].values())


def test_shard_0_ends_before_what_the_tokenizer_saw(tmp_path, training_text):
    """A shard of an uneven text reaches into what the tokenizer was trained on."""
    meta, text, val, seen = prepare_uneven_text(tmp_path, training_text, False, 20000)
    assert meta["order"] == "as read"
    assert len(val) - len(EOT) <= text.index(seen)
    assert meta["tokens"]["val"] < 20000
    assert sum(meta["tokens"].values()) >= 40000


# -----------------------------------------------------------------------------
# killed, run again, run with other settings


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import fineweb
from gptlib import common, dataset
write = common.atomic_write
def slow(path, content):
    write(path, content)
    print(path, flush=True)
    time.sleep(0.05)
fineweb.atomic_write = dataset.atomic_write = slow
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
    """A run that was killed ends with other bytes, or writes a finished shard again."""
    if tokenizer == "gpt2":
        openai_gpt2()
    flags = ["--tokenizer", "bpe", "--vocab_size", 400] if tokenizer == "bpe" else []
    documents = some_documents(200) + [python_text()] + some_documents(100, seed=1)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "slow.py").write_text(SLOW.format(root=str(ROOT)))
    args = ["--files", str(source), "--shard_size", 2500, *flags]
    assert fineweb_command(*args, "--data_root", tmp_path / "whole").returncode == 0
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

    result = fineweb_command(*args, "--data_root", data)
    assert result.returncode == 0, result.stderr
    assert contents(data) == whole
    assert modification_times(finished) == finished
    counts_of_all_runs = f"301 documents ({documents.count('')} empty, 3 with lone"
    assert counts_of_all_runs in result.stdout


def test_small_corpus_killed_between_its_shards(tmp_path):
    """A small corpus that lacks its train shard is written again in another order."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(50))
    prepare_files(tmp_path / "data", source, **BPE)
    whole = contents(tmp_path / "data")
    (val,), (train,) = (list_shards(tmp_path / "data", split) for split in ("val", "train"))
    before = modification_times([val])
    train.unlink()
    prepare_files(tmp_path / "data", source, **BPE)
    assert contents(tmp_path / "data") == whole
    assert modification_times([val]) == before


def test_run_again_and_with_other_settings(tmp_path):
    """A complete dataset is made again, or one of other settings is continued."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(50))
    data = tmp_path / "data"
    args = ["--files", source, *BPE_FLAGS]
    first = fineweb_command(*args, "--data_root", data)
    assert first.returncode == 0, first.stderr
    assert "50 documents" in first.stdout
    before = modification_times(data.iterdir())
    again = fineweb_command(*args, "--data_root", data)
    assert again.returncode == 0, again.stderr
    assert "complete" in again.stdout
    assert "Nothing to do" in again.stdout
    seed_7 = fineweb_command(*args, "--seed", 7, "--data_root", data)
    assert_fails(seed_7, data, "seed was 1337, is 7")
    larger = fineweb_command(*args[:-1], 301, "--data_root", data)
    assert_fails(larger, "vocab_size was 300, is 301")
    write_jsonl(source, some_documents(51))
    assert_fails(fineweb_command(*args, "--data_root", data), "source was")
    assert modification_times(data.iterdir()) == before


def test_shards_of_another_program_are_left_alone(tmp_path):
    """Shards of the original script are mixed with ours, or overwritten."""
    np.save(tmp_path / "edufineweb_val_000000.npy", np.arange(5, dtype=np.uint16))
    (tmp_path / "a.txt").write_text("text")
    result = fineweb_command("--files", tmp_path / "a.txt", "--data_root", tmp_path)
    assert_fails(result, "did not make")
    assert len(list(tmp_path.glob("*.npy"))) == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_start_methods(tmp_path, method):
    """A process that was itself forked or spawned hangs, or makes other bytes."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(60))
    kwargs = {"source": "files", "files": str(source), "num_proc": 2, **BPE}
    context = multiprocessing.get_context(method)
    child = context.Process(target=prepare, args=(tmp_path / "child",), kwargs=kwargs)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    prepare(tmp_path / "here", **kwargs)
    assert contents(tmp_path / "child") == contents(tmp_path / "here")


# -----------------------------------------------------------------------------
# --max_tokens


def expected_prefix(enc, documents, max_tokens):
    """Tokens of the first documents that together have at most max_tokens."""
    stream = []
    for piece in reference_tokens(enc, map(clean, documents)):
        if len(stream) + len(piece) > max_tokens:
            break
        stream += piece
    return stream


@pytest.mark.parametrize("chunk", [200, 2**20])
@pytest.mark.parametrize("more", [-1, 0, 1, 500])
def test_max_tokens_ends_on_a_whole_document(gpt2, tmp_path, monkeypatch, more, chunk):
    """The last document is cut, or one that fits exactly is left out, or the limit is passed."""
    monkeypatch.setattr(preparation, "CHUNK", chunk)
    documents = some_documents(300)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    pieces = reference_tokens(gpt2, map(clean, documents[:150]))
    max_tokens = sum(map(len, pieces)) + more
    meta = prepare_files(tmp_path / "data", source, shard_size=700, max_tokens=max_tokens)
    expected = expected_prefix(gpt2, documents, max_tokens)
    assert all_tokens(tmp_path / "data") == expected
    assert sum(shard["documents"] for shard in meta["shards"]) == expected.count(50256)
    assert meta["complete"] is True


def test_max_tokens_of_a_small_corpus(gpt2, tmp_path):
    """Fewer tokens than two shards are not put in a seeded order, or lack a split."""
    documents = some_documents(300)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    meta = prepare_files(tmp_path / "data", source, max_tokens=3000)
    tokens = all_tokens(tmp_path / "data")
    assert meta["order"] == "seeded"
    assert sorted(tokens) == sorted(expected_prefix(gpt2, documents, 3000))
    assert meta["tokens"]["val"] == round(0.1 * len(tokens))


def test_max_tokens_continues_and_has_to_match(gpt2, tmp_path):
    """A continued run ends in another place, or with another limit than the first one had."""
    source = write_jsonl(tmp_path / "a.jsonl", [*some_documents(100), python_text(), "the end"])
    data = tmp_path / "data"
    options = {"shard_size": 700, "max_tokens": 100_000}
    prepare_files(data, source, **options)
    whole = contents(data)
    train = list_shards(data, "train")
    for keep in (0, 3, len(train) - 1):  # the later ones end in the middle of the long document
        for path in train[keep:]:
            path.unlink()
        prepare_files(data, source, **options)
        assert contents(data) == whole
    with pytest.raises(UserError, match="max_tokens was 100000, is 5000"):
        prepare_files(data, source, shard_size=700, max_tokens=5000)


@pytest.mark.parametrize("max_tokens", [6000, 6001, 7000])
def test_max_tokens_keeps_val_from_the_tokenizer(tmp_path, training_text, max_tokens):
    """The text that the tokenizer is trained on was chosen from the whole corpus, and is in val."""
    documents = [f"[{i}] " + f"words of document {i * 7919}, " * 3 for i in range(300)]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    # more than two shards, but few enough bytes that it might have been less
    meta = prepare_files(tmp_path / "data", source, shard_size=3000, max_tokens=max_tokens, **BPE)
    assert meta["trained_within"]["head"] is not None
    assert meta["trained_within"]["tail"] is not None
    enc = load_tokenizer(tmp_path / "data")
    val = enc.decode(all_tokens(tmp_path / "data", "val"))
    numbers = [text.split(" ")[0] for text in val.split(EOT) if text.endswith(", ")]
    assert numbers
    seen = "".join(training_text)
    assert not [number for number in numbers if number in seen]
    assert meta["tokens"]["train"] > 0
    total = sum(meta["tokens"].values())
    assert max_tokens - 100 < total <= max_tokens, "the corpus should be longer than the limit"


def test_first_document_past_max_tokens(gpt2, tmp_path):
    """Nothing fits, and the dataset is called complete all the same."""
    source = write_jsonl(tmp_path / "a.jsonl", [python_text(), "short"])
    with pytest.raises(UserError, match="0 tokens in whole documents within --max_tokens 100"):
        prepare_files(tmp_path / "data", source, max_tokens=100)


def test_room_for_downloads_is_told(tmp_path, monkeypatch, capsys):
    """Downloads fill a disk that has room for the shards alone."""
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
    """A disk that is too small is told after hours, when it is full."""
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(300))
    prepare_files(tmp_path / "data", source, max_tokens=10**5)
    out, err = capsys.readouterr()
    assert "up to 0.00 GB more" in out
    assert ("may not fit" in err) == warns


# -----------------------------------------------------------------------------
# checksums


@pytest.fixture
def dataset(tmp_path):
    """(data_root, the command line that makes it) of a complete dataset of several shards."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(200))
    args = ["--files", source, "--shard_size", 2500, *BPE_FLAGS, "--data_root", tmp_path / "data"]
    result = fineweb_command(*args)
    assert result.returncode == 0, result.stderr
    assert len(list_shards(tmp_path / "data", "train")) > 3
    return tmp_path / "data", args


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
    return fineweb_command("--verify", "--data_root", root, *args)


def test_verify_whole_dataset(dataset):
    """A dataset as it was written is called damaged, or --verify changes it."""
    root, _ = dataset
    before = contents(root)
    result = verify(root)
    assert result.returncode == 0, result.stderr
    assert f"{len(before) - 2} shards, no damage found" in result.stdout
    assert "no checksum" not in result.stdout
    assert contents(root) == before


def test_verify_names_each_bad_shard(dataset):
    """A changed byte or a missing shard passes, or one bad shard hides the other."""
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
    assert fineweb_command(*args).returncode == 0
    assert contents(root) == whole
    assert verify(root).returncode == 0


def test_verify_interrupted_dataset(dataset):
    """The shard that is recorded but not yet written is called damaged after a kill."""
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
    """A dataset from before there were checksums is refused, or made again, or not continued."""
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
    assert fineweb_command(*args).returncode == 0
    assert {path.name: path.read_bytes() for path in root.glob("*.npy")} == shards
    assert set(read_checksums(root)) == {path.name for path in removed}
    assert f"{n - 2} of {n} shards have no checksum" in verify(root).stdout


def test_verify_shards_of_other_programs(tmp_path):
    """Shards of the original script, without meta.json, are refused; a truncated one passes."""
    np.save(tmp_path / "edufineweb_val_000000.npy", np.arange(5, dtype=np.uint16))
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(5, dtype=np.uint16))
    result = verify(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 of 2 shards have no checksum" in result.stdout
    path = tmp_path / "edufineweb_train_000001.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert_fails(verify(tmp_path), "1 of 2 shards")


def test_verify_nothing(tmp_path):
    """A wrong --data_root passes because it holds no bad shard."""
    assert_fails(verify(tmp_path / "nowhere"), "no shards in", tmp_path / "nowhere")


# -----------------------------------------------------------------------------
# errors that the user can fix


def test_wrong_line_keeps_the_finished_shards(tmp_path, monkeypatch):
    """One bad line at the end of a source costs all the work before it."""
    monkeypatch.setattr(preparation, "CHUNK", 200)
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(500))
    data = tmp_path / "data"
    prepare_files(data, source, shard_size=2000, **BPE)
    whole, n = contents(data), len(list_shards(data, "train"))
    for path in list_shards(data, "train")[3:]:
        path.unlink()
    text = source.read_text()
    lines = text.splitlines(keepends=True)
    damaged = "{" + lines[-1][1:].replace(":", "!", 1)  # of the same length: the same source
    source.write_text("".join(lines[:-1]) + damaged)
    with pytest.raises(UserError, match="a.jsonl, line 500: "):
        prepare_files(data, source, shard_size=2000, **BPE)
    assert 3 < len(list_shards(data, "train")) < n
    source.write_text(text)
    prepare_files(data, source, shard_size=2000, **BPE)
    assert contents(data) == whole


@pytest.mark.parametrize("flags, words", [
    (["--vocab_size", 65537, "--tokenizer", "bpe"], ["65537", "65536"]),
    (["--tokenizer", "bpe"], ["--vocab_size"]),
    (["--vocab_size", 256, "--tokenizer", "bpe"], ["256", "257"]),
    (["--vocab_size", 999], ["--tokenizer gpt2"]),
    (["--shard_size", 0], ["--shard_size 0"]),
    (["--num_proc", 0], ["--num_proc 0"]),
    (["--val_fraction", 1], ["1.0"]),
    (["--max_tokens", 1], ["--max_tokens 1", "at least 2"]),
    (["--max_tokens", 999, *BPE_FLAGS, "--shard_size", 500], ["--max_tokens 999", "1000"]),
    (["--prefix", "my_val_set"], ["my_val_set"]),
    (["--prefix", "a/b"], ["a/b"]),
    (["--files", ""], ["no files"]),
    (["--data_root", "file/data"], ["file/data"]),
], ids=lambda flags: " ".join(map(str, flags)))
def test_wrong_flags(tmp_path, flags, words):
    """A wrong flag ends in a traceback, or leaves a directory behind."""
    (tmp_path / "file").write_text("")
    (tmp_path / "a.txt").write_text("text")
    assert_fails(fineweb_command("--files", "a.txt", *flags, cwd=tmp_path), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "file"]


def test_corpora_of_nothing(tmp_path):
    """No text at all gives an empty split, on which training then fails."""
    source = tmp_path / "a.jsonl"
    source.write_text("\n")
    with pytest.raises(UserError, match="0 tokens"):
        prepare_files(tmp_path / "data", source, **BPE)
    source.write_text('{"text": ""}\n{"text": ""}\n')
    meta = prepare_files(tmp_path / "data", source, **BPE)
    assert meta["tokens"] == {"train": 1, "val": 1}
    assert meta["bytes"] == {"train": 0, "val": 0}
    assert meta["vocab_size"] == 257


def test_full_disk(tmp_path):
    """A full disk leaves half a shard behind, or the finished ones damaged."""
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
        assert_fails(fineweb_command(*args, disk), "No space left", ".npy", "intact")
        assert not list(disk.glob("*.tmp"))
        assert len(list(disk.glob("*.npy"))) > 2
        found = contents(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    fineweb_command(*args, tmp_path / "data")
    whole = contents(tmp_path / "data")
    del found["meta.json"]
    assert found == {name: whole[name] for name in found}


# -----------------------------------------------------------------------------
# the script


def test_import_is_silent_and_light():
    """import fineweb takes seconds, because it loads a heavy package that few commands need."""
    heavy = {"datasets", "tokenizers", "pyarrow", "tqdm", "torch"}
    code = f"import sys, fineweb; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_help():
    """--help fails, as it does when a help text holds a bare percent sign."""
    assert fineweb_command("--help").stdout.startswith("usage: fineweb.py")


def test_pattern_gpt2_trains_a_tokenizer_that_splits_like_gpt2(tmp_path, gpt2):
    """Guards against a tokenizer that a GGUF file can't express although it was asked for."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(200))
    root = tmp_path / "data"
    prepare(root, "files", files=str(source), tokenizer="bpe", vocab_size=300, pattern="gpt2")
    enc = load_tokenizer(root)
    assert enc.name == "bpe-gpt2"
    text = "They've 1234567 words\n\n  in it"
    pieces = [enc.decode(enc.encode_ordinary(piece)) for piece in ("They", "'ve", " 1234567")]
    assert pieces == ["They", "'ve", " 1234567"]
    assert enc._pat_str == load_tokenizer("gpt2")._pat_str
    assert enc.decode(enc.encode_ordinary(text)) == text


@pytest.mark.parametrize("options", [("--pattern", "gpt2"), ("--pattern", "other")])
def test_pattern_goes_with_bpe_alone(tmp_path, options):
    """Guards against a --pattern that is silently ignored."""
    assert_fails(fineweb_command("--source", "stdlib", "--data_root", tmp_path / "d", *options),
                 "--pattern")


def test_second_preparation_of_a_directory_is_refused(tmp_path):
    """Guards against two processes that write the shards of one directory."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(50))
    with lock_directory(tmp_path / "data"):
        done = fineweb_command("--files", source, "--tokenizer", "bpe", "--vocab_size", 300,
                               "--data_root", tmp_path / "data")
    assert_fails(done, "in use by", str(os.getpid()))


def test_table_of_flags_is_complete():
    """A flag is added, renamed or explained in another way, and docs/data.md is forgotten."""
    expected = []
    for action in fineweb.make_parser()._actions:
        name = action.option_strings[-1]
        default = "" if action.default is None else f"`{action.default}`"
        if name != "--help":
            expected.append(f"| `{name}` | {default} | {action.help} |")
    lines = (ROOT / "docs" / "data.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| `--")] == expected
