"""
python -m pytest tests/test_fineweb.py

Shards against a plain reference loop over tiktoken, against hand-built files, and against the uninterrupted run. All on
CPU and offline; what needs the GPT-2 vocabulary is skipped where tiktoken can neither find nor download it.
"""

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st



from conftest import ROOT

import fineweb
from fineweb import prepare
from gptlib import preparation
from gptlib.common import UserError
from gptlib.dataset import list_shards, open_shard, read_meta
from gptlib.tokenizer import EOT, load_tokenizer
from gptlib.common import atomic_write, run_main
from gptlib.tokenizer import tokenizer_to_dict, train_bpe
from gptlib.sources import open_source, read_file, stdlib_files

ODD = ["", "ordinary text", "it says <|endoftext|> here", "half \ud800 a pair", "中文没有空格。日本語もカタカナも。",
       "a\r\n\tb  \n\n c",
       "don't 'self' \u00a0 \u2003x\x1c \x1cy \x85 z", "ไม่มีช่องว่าง हिन्दी e\u0301 ¹²³ 1234567", "\ufeffBOM", "🙂 👩‍👩‍👧 𐐷"]


@pytest.fixture(scope="session")
def gpt2():
    """OpenAI's own Encoding, not ours."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        pytest.skip(f"no GPT-2 vocabulary: {type(error).__name__} (set TIKTOKEN_CACHE_DIR)")


@pytest.fixture(scope="session")
def ours(gpt2):
    return load_tokenizer("gpt2")


@pytest.fixture(scope="session")
def bpe():
    return train_bpe(iter([python_text(), *[clean(text) for text in ODD] * 50]), 400)


def python_text():
    return "".join((ROOT / name).read_text() for name in ("fineweb.py", "gptlib/preparation.py", "gptlib/tokenizer.py"))


def clean(text):
    """Lone surrogates to U+FFFD, by another way than the program."""
    return "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in text)


def some_documents(n, seed=0):
    """n documents of 0 to 60 words, every tenth of them odd."""
    rng, words = np.random.default_rng(seed), python_text().split(" ")
    return [ODD[i // 10 % len(ODD)] if i % 10 == 3 else " ".join(rng.choice(words, rng.integers(0, 60)))
            for i in range(n)]


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(documents)))
    return path


def reference_tokens(enc, documents):
    """What every shard is compared with: one document after the other, by tiktoken's plain method."""
    return [[enc.eot_token, *enc.encode_ordinary(text)] for text in documents]


def all_tokens(root, split=None):
    """Tokens of the shards in the order of their numbers."""
    paths = list_shards(root, split) if split else list_shards(root, "val") + list_shards(root, "train")
    return np.concatenate([open_shard(path) for path in paths]).tolist()


def contents(root):
    return {path.name: path.read_bytes() for path in Path(root).iterdir()}


def command(*args, **kwargs):
    """Run the program as a user would."""
    return subprocess.run([sys.executable, str(ROOT / "fineweb.py"), *map(str, args)], capture_output=True, text=True,
                          timeout=120, **kwargs)


def fails(result, *words):
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(str(word) in line for word in words), line


# -----------------------------------------------------------------------------
# tokenizers


@example(text=" ".join(ODD).replace("\ud800", ""))
@settings(max_examples=300, deadline=None, database=None)
@given(text=st.text(st.sampled_from(" \n\t\r\u00a0\u3000\x1cab'stdl19.,<|>中の") | st.characters(), max_size=60))
def test_gpt2_pieces_are_those_of_openai(gpt2, ours, text):
    """Our spelling of the split pattern and the one call for many documents change no token."""
    enc = ours
    tokens, marks = preparation.encode_chunk(enc, [text, "second", text])
    one = [50256, *gpt2.encode_ordinary(text)]
    assert tokens.tolist() == one + [50256, *gpt2.encode_ordinary("second")] + one
    assert (enc.eot_token, enc.n_vocab) == (50256, 50257) and len(marks) == 3


def test_gpt2_on_real_text(gpt2):
    text = python_text() + (ROOT / "tests" / "test_fineweb.py").read_text()
    assert load_tokenizer("gpt2").encode_ordinary(text) == gpt2.encode_ordinary(text)


@example(text=" ".join(ODD).replace("\ud800", ""))
@settings(max_examples=300, deadline=None, database=None)
@given(text=st.text(st.sampled_from(" \n\t'sab1中の々ーカ\u0301") | st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bpe_round_trip(bpe, text):
    assert bpe.decode_bytes(bpe.encode_ordinary(text)) == text.encode()


def test_bpe_vocabulary(bpe):
    assert (bpe.n_vocab, bpe.eot_token) == (400, 399)
    assert all(bpe.encode_single_token(bytes([b])) < 256 for b in range(256))
    assert bpe.eot_token not in bpe.encode_ordinary("a <|endoftext|> b")
    assert len(bpe.encode_ordinary(python_text())) < 0.6 * len(python_text())  # it has learned something
    assert any(c in bpe.decode([i]) for i in range(256, 399) for c in "中文日本語カタ")  # whole characters, of bytes


def test_bpe_training_is_deterministic():
    texts = some_documents(300)
    one, two = (tokenizer_to_dict(train_bpe(map(clean, texts), 600)) for _ in range(2))
    assert one == two


def test_tokenizer_from_dict_directory_and_file(bpe, tmp_path):
    saved = tokenizer_to_dict(bpe)
    assert set(saved) == {"name", "ranks"} and isinstance(saved["ranks"], bytes)
    (tmp_path / "tokenizer.tiktoken").write_bytes(saved["ranks"])
    (tmp_path / "meta.json").write_text('{"tokenizer": "bpe"}')
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "tokenizer.tiktoken"))  # tiktoken reads its own format
    assert sorted(ranks.values()) == list(range(399))
    text = python_text()[:3000]
    for spec in (saved, tmp_path, str(tmp_path)):
        enc = load_tokenizer(spec)
        assert enc.encode_ordinary(text) == bpe.encode_ordinary(text) and enc.eot_token == 399
        assert tokenizer_to_dict(enc) == saved


def test_tokenizer_of_a_directory_without_meta_is_gpt2(gpt2, tmp_path):
    for spec in (tmp_path, {"name": "gpt2"}):
        enc = load_tokenizer(spec)
        assert enc.n_vocab == 50257 and tokenizer_to_dict(enc) == {"name": "gpt2"}


@pytest.mark.parametrize("spec", ["no/such/dir", {"name": "bpe", "ranks": b"!!! x\n"}, {"name": "bpe"}, {"name": "llama"}])
def test_unusable_tokenizers(spec):
    with pytest.raises(UserError):
        load_tokenizer(spec)


def test_gpt2_without_network(tmp_path):
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    (tmp_path / "a.txt").write_text("text")
    result = command("--files", tmp_path / "a.txt", "--data_root", tmp_path / "data", env=env)
    fails(result, "TIKTOKEN_CACHE_DIR", "--tokenizer bpe --vocab_size")


# -----------------------------------------------------------------------------
# shards


def test_shards_of_the_original_recipe(gpt2, tmp_path):
    """Names, shard sizes, order and tokens as the original script leaves them, and what meta.json says of them."""
    documents = some_documents(400)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    returned = prepare(tmp_path / "data", "files", files=str(source), shard_size=3000, num_proc=2)
    stream = sum(reference_tokens(gpt2, map(clean, documents)), [])
    names = sorted(path.name for path in (tmp_path / "data").glob("*.npy"))
    n = -(-len(stream) // 3000)
    assert names == [f"edufineweb_train_{i:06d}.npy" for i in range(1, n)] + ["edufineweb_val_000000.npy"]
    for i in range(n):
        shard = np.load(tmp_path / "data" / f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy")
        assert shard.dtype == np.uint16 and shard.tolist() == stream[3000 * i:3000 * (i + 1)]

    meta = read_meta(tmp_path / "data")
    assert meta == returned and meta["complete"] is True
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"]) == ("gpt2", 50257, 50256)
    assert meta["tokens"] == {"train": len(stream) - 3000, "val": 3000}
    assert sum(meta["bytes"].values()) == sum(len(clean(text).encode()) for text in documents)
    assert meta["bytes"]["val"] == len(gpt2.decode_bytes([t for t in stream[:3000] if t != 50256]))
    assert sum(shard["documents"] for shard in meta["shards"]) == len(documents)
    assert sum(shard["empty"] for shard in meta["shards"]) == sum(text == "" for text in documents)
    assert sum(shard["repaired"] for shard in meta["shards"]) == sum("\ud800" in text for text in documents)


def test_small_corpus(gpt2, tmp_path):
    """Documents in an order that the seed decides; the last tenth of the tokens is val; nothing is lost."""
    documents = some_documents(300)
    source = str(write_jsonl(tmp_path / "a.jsonl", documents))
    metas = [prepare(tmp_path / str(seed), "files", files=source, shard_size=10**5, seed=seed) for seed in (1, 2)]
    for seed, meta in zip((1, 2), metas, strict=True):
        tokens = all_tokens(tmp_path / str(seed), "train") + all_tokens(tmp_path / str(seed), "val")
        assert meta["tokens"]["val"] == round(0.1 * len(tokens))
        starts = [i for i, token in enumerate(tokens) if token == 50256] + [len(tokens)]
        pieces = [tokens[a:b] for a, b in zip(starts, starts[1:], strict=False)]
        expected = reference_tokens(gpt2, map(clean, documents))
        assert pieces != expected and sorted(pieces) == sorted(expected)
        begin_in_val = [piece for at, piece in zip(starts, pieces, strict=False) if at >= meta["tokens"]["train"]]
        assert meta["shards"][0]["documents"] == len(begin_in_val)
        assert meta["shards"][0]["empty"] == begin_in_val.count([50256])
    assert all_tokens(tmp_path / "1") != all_tokens(tmp_path / "2")
    prepare(tmp_path / "again", "files", files=source, shard_size=10**5, seed=1, num_proc=1)
    assert contents(tmp_path / "1") == contents(tmp_path / "again")


def test_small_corpus_of_more_than_one_train_shard(gpt2, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(100))
    total = sum(prepare(tmp_path / "a", "files", files=str(source))["tokens"].values())
    meta = prepare(tmp_path / "b", "files", files=str(source), shard_size=total // 2 + 1, val_fraction=0.25)
    assert [shard["tokens"] for shard in meta["shards"]] == [
        round(total / 4), total // 2 + 1, total - round(total / 4) - total // 2 - 1]
    assert all_tokens(tmp_path / "a", "train") + all_tokens(tmp_path / "a", "val") == \
        all_tokens(tmp_path / "b", "train") + all_tokens(tmp_path / "b", "val")


def test_one_text_file_keeps_its_order_and_its_tail_is_held_out(gpt2, tmp_path):
    (tmp_path / "a.txt").write_bytes(python_text().replace("\n", "\r\n").encode())
    prepare(tmp_path / "data", "files", files=str(tmp_path / "*.txt"), val_fraction=0.2)
    tokens = all_tokens(tmp_path / "data", "train") + all_tokens(tmp_path / "data", "val")
    assert tokens == reference_tokens(gpt2, [python_text().replace("\n", "\r\n")])[0]


def test_document_longer_than_a_shard(gpt2, tmp_path):
    documents = ["short", python_text(), "", "short again"]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    meta = prepare(tmp_path / "data", "files", files=str(source), shard_size=1000)
    assert all_tokens(tmp_path / "data") == sum(reference_tokens(gpt2, documents), [])
    assert [shard["documents"] for shard in meta["shards"]][1:4] == [0, 0, 0]


def test_a_million_spaces(bpe):
    """GPT-2's pattern overflows the stack of tiktoken's regex here; the text must come through."""
    for text in (" " * 1_100_000 + "x", "x" + "\n" * 1_100_000):
        tokens, _ = preparation.encode_chunk(bpe, ["before", text, "after"])
        assert bpe.decode(tokens.tolist()) == EOT + "before" + EOT + text + EOT + "after"


def test_kinds_of_files(tmp_path):
    """Every kind gives the same documents; null is an empty one; a directory tree is walked in sorted order."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    documents = ["one", "zwei <|endoftext|>", "", "四"]
    rows = "".join(json.dumps({"body": text or None}) + "\n\n" for text in documents)
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(rows.encode()))
    pq.write_table(pa.table({"body": ["one", "zwei <|endoftext|>", None, "四"], "n": [1, 2, 3, 4]}), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json.gz", "c.parquet"):
        assert list(read_file(str(tmp_path / name), "body")) == documents
    (tmp_path / "d" / "e").mkdir(parents=True)
    for i, name in enumerate(("b.md", "a.txt", "e/c.txt")):
        (tmp_path / "d" / name).write_text(documents[i])
    _, read = open_source("files", str(tmp_path / "d" / "**"), None, None, "text")
    assert list(read(0)) == ["zwei <|endoftext|>", "one", ""] and list(read(2)) == [""]


def test_hub_layout_in_a_local_directory(gpt2, tmp_path):
    """The path that streams FineWeb-Edu, on a directory of the same layout: a folder of parquet files."""
    pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq
    documents = [text for text in some_documents(120) if "\ud800" not in text]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for i in range(3):
        pq.write_table(pa.table({"id": list(range(40))[:len(documents[i::3])], "text": documents[i::3]}),
                       tmp_path / "hub" / "data" / f"train-{i:05d}-of-00003.parquet")
    prepare(tmp_path / "data", dataset=str(tmp_path / "hub"), shard_size=700)
    documents = documents[0::3] + documents[1::3] + documents[2::3]
    assert all_tokens(tmp_path / "data") == sum(reference_tokens(gpt2, documents), [])

    whole = contents(tmp_path / "data")  # and continued: skip() finds the place
    for path in list_shards(tmp_path / "data", "train")[2:]:
        path.unlink()
    prepare(tmp_path / "data", dataset=str(tmp_path / "hub"), shard_size=700)
    assert contents(tmp_path / "data") == whole
    with pytest.raises(UserError, match="no column 'body' in .*'id', 'text'"):
        prepare(tmp_path / "other", dataset=str(tmp_path / "hub"), column="body")
    with pytest.raises(UserError, match="cannot read dataset"):
        prepare(tmp_path / "other", dataset=str(tmp_path / "nowhere"))


def test_stdlib(tmp_path):
    paths = stdlib_files()
    assert paths == sorted(paths) and 7e6 < sum(map(os.path.getsize, paths)) < 14e6
    names = {os.path.relpath(path, os.path.dirname(os.__file__)) for path in paths}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not any({"test", "tests", "site-packages", "idlelib"} & set(Path(name).parts) for name in names)


# -----------------------------------------------------------------------------
# a tokenizer of its own


def trained_on(monkeypatch):
    """Catch the text that the tokenizer is trained on."""
    seen, train = [], train_bpe
    monkeypatch.setattr(fineweb, "train_bpe", lambda texts, size: train((seen.append(t) or t for t in texts), size))
    return seen


@pytest.mark.parametrize("shard_size", [100, 1500, 4000, 6000, 10**8], ids=str)
def test_tokenizer_sees_the_train_split_only(tmp_path, monkeypatch, shard_size):
    """Documents are numbered; no number of the val split is in the training text, small corpus or large."""
    seen = trained_on(monkeypatch)
    documents = [f"[{i}] " + f"words of document {i * 7919}, " * 3 for i in range(300)]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    meta = prepare(tmp_path / "data", "files", files=str(source), tokenizer="bpe", vocab_size=300, shard_size=shard_size)
    enc = load_tokenizer(tmp_path / "data")
    val, train = (enc.decode(all_tokens(tmp_path / "data", split)) for split in ("val", "train"))
    assert sorted((train + val if meta["order"] == "seeded" else val + train).split(EOT)[1:]) == sorted(documents)
    held_out = [text for text in val.split(EOT) if text.endswith(", ") and text.startswith("[")]
    assert held_out and not any(text.split(" ")[0] in "".join(seen) for text in held_out)
    assert len("".join(seen)) > 0.3 * len("".join(documents)) or shard_size == 100
    total = sum(meta["tokens"].values())
    assert (meta["order"] == "seeded") == (total < 2 * shard_size)
    assert meta["tokens"]["val"] == (round(0.1 * total) if total < 2 * shard_size else shard_size)


def test_tokenizer_of_one_text_file(tmp_path, monkeypatch):
    seen = trained_on(monkeypatch)
    (tmp_path / "a.txt").write_text(python_text())
    meta = prepare(tmp_path / "data", "files", files=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=500)
    enc = load_tokenizer(tmp_path / "data")
    train = enc.decode(all_tokens(tmp_path / "data", "train"))
    assert train.removeprefix(EOT).startswith("".join(seen)) and len("".join(seen)) > 0.8 * len(python_text())
    assert meta["vocab_size"] == enc.n_vocab == 500 and meta["eot"] == enc.eot_token == 499
    tokens = all_tokens(tmp_path / "data", "train") + all_tokens(tmp_path / "data", "val")
    assert enc.decode(tokens) == EOT + python_text()


@pytest.mark.parametrize("shard_size, order", [(10**8, "seeded"), (20000, "as read")])
def test_the_cut_moves_when_the_tokenizer_has_seen_its_place(tmp_path, monkeypatch, shard_size, order):
    """Where text is very uneven, a tenth of the tokens (or a shard of them) reaches into what was trained on."""
    seen = trained_on(monkeypatch)
    random = "".join(map(chr, np.random.default_rng(0).integers(0x100, 0x2000, 12000)))
    text = random + "abcdefgh " * 5000 if order == "seeded" else "ab " * 13000 + "ab " * 1000 + random
    (tmp_path / "a.txt").write_text(text)
    meta = prepare(tmp_path / "data", "files", files=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=300,
                   shard_size=shard_size)
    val = load_tokenizer(tmp_path / "data").decode_bytes(all_tokens(tmp_path / "data", "val"))
    total, seen, text = sum(meta["tokens"].values()), "".join(seen).encode(), text.encode()
    assert meta["order"] == order and text.count(seen) == 1 and len(val) > 1000
    if order == "seeded":
        assert len(text) - len(val) >= len(seen) and meta["tokens"]["val"] < 0.1 * total
    else:
        assert len(val) - len(EOT) <= text.index(seen) and meta["tokens"]["val"] < shard_size <= total / 2


# -----------------------------------------------------------------------------
# killed, run again, run otherwise


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import fineweb
from gptlib import common, dataset, preparation
write = common.atomic_write
def slow(path, content):
    write(path, content)
    print(path, flush=True)
    time.sleep(0.05)
fineweb.atomic_write = dataset.atomic_write = preparation.atomic_write = slow
if __name__ == "__main__":
    common.run_main(fineweb.main)
"""


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe"])
def test_kill_and_continue(request, tmp_path, tokenizer):
    """kill -9 after the n-th file, for several n; the end is the same to the byte, and what was whole is not touched."""
    flags = ["--tokenizer", "bpe", "--vocab_size", 400] if tokenizer == "bpe" else request.getfixturevalue("gpt2") and []
    documents = some_documents(200) + [python_text()] + some_documents(100, seed=1)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "slow.py").write_text(SLOW.format(root=str(ROOT)))
    args = ["--files", str(source), "--shard_size", 2500, *flags]
    assert command(*args, "--data_root", tmp_path / "whole").returncode == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) > 8
    data = tmp_path / "data"
    for files in (1, 3, 6, 7):  # at the tokenizer or meta.json, between meta.json and its shard, after shards
        child = subprocess.Popen([sys.executable, str(tmp_path / "slow.py"), *map(str, args), "--data_root", str(data)],
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        lines = (line for line in child.stdout if line.startswith(str(data)))
        for _ in range(files):
            next(lines)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        there = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in data.glob("*.npy")}
        assert all(path.read_bytes() == whole[path.name] for path in there) and len(there) < len(whole) - 2
    assert len(there) >= 4 and not read_meta(data)["complete"]
    result = command(*args, "--data_root", data)
    assert result.returncode == 0, result.stderr
    assert contents(data) == whole
    assert there == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in there}
    assert f"301 documents ({documents.count('')} empty, 3 with lone" in result.stdout  # in both runs together


def test_small_corpus_killed_between_its_shards(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(50))
    kwargs = {"source": "files", "files": str(source), "tokenizer": "bpe", "vocab_size": 300}
    prepare(tmp_path / "data", **kwargs)
    whole = contents(tmp_path / "data")
    (val,), (train,) = (list_shards(tmp_path / "data", split) for split in ("val", "train"))
    before = val.stat().st_ino
    train.unlink()
    prepare(tmp_path / "data", **kwargs)
    assert contents(tmp_path / "data") == whole and val.stat().st_ino == before


def test_run_again_and_otherwise(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(50))
    args = ["--files", source, "--tokenizer", "bpe", "--vocab_size", 300, "--data_root", tmp_path / "data"]
    first = command(*args)
    assert first.returncode == 0 and "50 documents" in first.stdout
    stats = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    again = command(*args)
    assert again.returncode == 0 and "complete" in again.stdout and "Nothing to do" in again.stdout
    fails(command(*args[:-2], "--seed", 7, *args[-2:]), tmp_path / "data", "seed was 1337, is 7")
    fails(command(*args[:3], "bpe", "--vocab_size", 301, *args[-2:]), "vocab_size was 300, is 301")
    write_jsonl(source, some_documents(51))
    fails(command(*args), "source was")
    assert stats == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}


def test_shards_of_another_program_are_left_alone(tmp_path):
    np.save(tmp_path / "edufineweb_val_000000.npy", np.arange(5, dtype=np.uint16))
    (tmp_path / "a.txt").write_text("text")
    fails(command("--files", tmp_path / "a.txt", "--data_root", tmp_path), "did not make")
    assert len(list(tmp_path.glob("*.npy"))) == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_start_methods(tmp_path, method):
    """The same bytes whatever the start method, in a process that was itself started so; no process is left over."""
    import multiprocessing as mp
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(60))
    kwargs = {"source": "files", "files": str(source), "tokenizer": "bpe", "vocab_size": 300, "num_proc": 2}
    child = mp.get_context(method).Process(target=prepare, args=(tmp_path / "child",), kwargs=kwargs)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    prepare(tmp_path / "here", **kwargs)
    assert contents(tmp_path / "child") == contents(tmp_path / "here")


# -----------------------------------------------------------------------------
# mistakes


def bad_files(tmp_path):
    good = json.dumps({"text": "x"})
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{good}\n{{torn\n")
    (tmp_path / "list.jsonl").write_text(f"{good}\n[1]\n")
    (tmp_path / "column.jsonl").write_text(f"{good}\n{json.dumps({'body': 'x'})}\n")
    (tmp_path / "number.jsonl").write_text(f"{good}\n{json.dumps({'text': 3})}\n")
    (tmp_path / "torn.json.gz").write_bytes(gzip.compress(good.encode() * 100)[:-12])
    (tmp_path / "not.json.gz").write_bytes(b"plain")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "latin1.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "a.docx").write_bytes(b"")


@pytest.mark.parametrize("name, words", [
    ("bad.jsonl", ["bad.jsonl, line 3"]), ("list.jsonl", ["list.jsonl, line 2", "'text'"]),
    ("column.jsonl", ["column.jsonl, line 2", "--column"]), ("number.jsonl", ["number.jsonl, line 2", "3"]),
    ("torn.json.gz", ["torn.json.gz"]), ("not.json.gz", ["not.json.gz"]), ("bad.parquet", ["bad.parquet"]),
    ("latin1.txt", ["latin1.txt", "utf-8"]), ("a.docx", ["a.docx", ".parquet"]), ("nothing*.txt", ["nothing*.txt"])])
def test_unreadable_files(tmp_path, name, words):
    bad_files(tmp_path)
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "data", "files", files=str(tmp_path / name), tokenizer="bpe", vocab_size=300)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_wrong_line_keeps_the_whole_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK", 200)
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(500))
    kwargs = {"source": "files", "files": str(source), "tokenizer": "bpe", "vocab_size": 300, "shard_size": 2000}
    prepare(tmp_path / "data", **kwargs)
    whole, n = contents(tmp_path / "data"), len(list_shards(tmp_path / "data", "train"))
    for path in list_shards(tmp_path / "data", "train")[3:]:
        path.unlink()
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join(lines[:-1]) + "{" + lines[-1][1:].replace(":", "!", 1))  # of the same length, but torn
    with pytest.raises(UserError, match="a.jsonl, line 500: "):
        prepare(tmp_path / "data", **kwargs)
    assert 3 < len(list_shards(tmp_path / "data", "train")) < n
    source.write_text("".join(lines))
    prepare(tmp_path / "data", **kwargs)
    assert contents(tmp_path / "data") == whole


@pytest.mark.parametrize("flags, words", [
    (["--vocab_size", 65537, "--tokenizer", "bpe"], ["65537", "65536"]), (["--tokenizer", "bpe"], ["--vocab_size"]),
    (["--vocab_size", 256, "--tokenizer", "bpe"], ["256", "257"]), (["--vocab_size", 999], ["--tokenizer gpt2"]),
    (["--shard_size", 0], ["--shard_size 0"]), (["--num_proc", 0], ["--num_proc 0"]), (["--val_fraction", 1], ["1.0"]),
    (["--prefix", "my_val_set"], ["my_val_set"]), (["--prefix", "a/b"], ["a/b"]), (["--files", ""], ["no files"]),
    (["--data_root", "file/data"], ["file/data"])], ids=lambda flags: " ".join(map(str, flags)))
def test_wrong_flags(tmp_path, flags, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "a.txt").write_text("text")
    fails(command("--files", "a.txt", *flags, cwd=tmp_path), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "file"]


def test_corpora_of_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match="0 tokens"):
        prepare(tmp_path / "data", "files", files=str(tmp_path / "a.jsonl"), tokenizer="bpe", vocab_size=300)
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    meta = prepare(tmp_path / "data", "files", files=str(tmp_path / "a.jsonl"), tokenizer="bpe", vocab_size=300)
    assert meta["tokens"] == {"train": 1, "val": 1} and meta["bytes"] == {"train": 0, "val": 0}
    assert meta["vocab_size"] == 257


def test_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small disk: {mount.stderr.decode().strip()}")
    try:
        documents = [python_text()[i:i + 500] for i in range(0, 20000, 500)] * 10
        source = write_jsonl(tmp_path / "a.jsonl", documents)
        args = ["--files", source, "--shard_size", 8000, "--tokenizer", "bpe", "--vocab_size", 300, "--data_root"]
        fails(command(*args, disk), "No space left", ".npy", "intact")
        assert not list(disk.glob("*.tmp")) and len(list(disk.glob("*.npy"))) > 2
        whole = contents(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    command(*args, tmp_path / "data")
    assert all(contents(tmp_path / "data")[name] == data for name, data in whole.items() if name != "meta.json")


# -----------------------------------------------------------------------------
# files and the rest


def test_atomic_write_keeps_what_was_there(tmp_path):
    path = tmp_path / "a"
    atomic_write(path, lambda f: f.write(b"old"))

    def full(f):
        f.write(b"new")
        raise OSError(28, "No space left on device")

    def full_as_torch_says_it(f):
        try:
            full(f)
        except OSError:
            raise RuntimeError("unexpected pos")  # noqa: B904

    for write in (full, full_as_torch_says_it):
        with pytest.raises(UserError, match="a: No space left"):
            atomic_write(path, write)
    with pytest.raises(RuntimeError, match="a bug"):
        atomic_write(path, lambda f: (_ for _ in ()).throw(RuntimeError("a bug")))
    assert contents(tmp_path) == {"a": b"old"}


def test_open_shard(tmp_path):
    tokens = np.array([50256, 1, 65535], dtype=np.uint16)
    np.save(tmp_path / "x_val_000000.npy", tokens)
    header = struct.pack("<3i", 20240520, 1, 3) + bytes(4 * 253)
    (tmp_path / "x_val_000001.bin").write_bytes(header + struct.pack("<3H", *tokens))
    (tmp_path / "x_train_000002.npy.tmp").write_bytes(b"")
    paths = list_shards(tmp_path, "val")
    assert [path.name for path in paths] == ["x_val_000000.npy", "x_val_000001.bin"] and not list_shards(tmp_path, "train")
    for path in paths:
        shard = open_shard(path)
        assert isinstance(shard, np.memmap) and shard.dtype == np.uint16 and shard.tolist() == tokens.tolist()


@pytest.mark.parametrize("name, data", [
    ("a.bin", struct.pack("<3i", 20240520, 1, 4) + bytes(4 * 253) + bytes(6)), ("a.bin", b"short"),
    ("a.bin", struct.pack("<3i", 20240520, 2, 3) + bytes(4 * 253) + bytes(6)),
    ("a.bin", struct.pack("<3i", 20240801, 1, 3) + bytes(4 * 253) + bytes(6)),
    ("a.npy", b"\x93NUMPY torn"), ("a.npy", b""), ("a.npy", np.zeros(9, np.int64)),
    ("a.npy", np.zeros((3, 3), np.uint16)), ("missing.npy", None)])
def test_open_shard_refuses(tmp_path, name, data):
    if isinstance(data, np.ndarray):
        np.save(tmp_path / name, data)
    elif data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}.*python fineweb.py"):
        open_shard(tmp_path / name)


def test_truncated_npy(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(100, np.uint16))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:-2])
    with pytest.raises(UserError, match="a.npy.*whole shard"):
        open_shard(tmp_path / "a.npy")


def test_read_meta(tmp_path):
    assert read_meta(tmp_path) == {} and read_meta(tmp_path / "missing") == {}
    for text in ("{torn", "3", '"text"'):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(UserError, match="meta.json"):
            read_meta(tmp_path)


def test_import_is_silent_and_light():
    code = "import sys, fineweb; print(sorted({'datasets', 'tokenizers', 'pyarrow', 'tqdm', 'torch'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_ctrl_c_and_help():
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as leaving:
        run_main(interrupted)
    assert leaving.value.code == 130
    assert command("--help").stdout.startswith("usage: fineweb.py")


def test_memory_is_bounded_by_chunks_in_flight(bpe):
    """The reader is never far ahead of the consumer, whatever the length of the corpus."""
    read = 0

    def documents():
        nonlocal read
        for _ in range(200):
            read += 1
            yield "x y " * 2**18  # a chunk each

    stream = preparation.encode_stream(bpe, documents(), 2)
    for consumed in range(1, 6):
        next(stream)
        time.sleep(0.01)
        assert read <= consumed + 2 + 17
    stream.close()
