"""
python -m pytest tests/data/test_shard_writer.py

Whole datasets against a plain reference loop over tiktoken: shards, splits, and what a tokenizer of
their own has seen. What needs the GPT-2 vocabulary is skipped if tiktoken can neither find nor
download it.
"""

import threading

import numpy as np
import pytest

from corpus import (all_tokens, clean, contents, make_dataset, openai_gpt2, python_text,
                    reference_tokens, small_bpe, some_documents, write_jsonl)

import fineweb
from gptlib.common import UserError
from gptlib.data import shard_writer, tokenizing
from gptlib.data.shard_writer import ShardWriter
from gptlib.data.shards import list_shards, read_meta
from gptlib.data.tokenizer import EOT, load_tokenizer, train_bpe
from gptlib.data.tokenizing import Chunk, encode_chunk

BPE = {"tokenizer": "bpe", "vocab_size": 300}


@pytest.fixture(scope="module")
def gpt2():
    return openai_gpt2()


def test_shards_of_the_original_recipe(gpt2, tmp_path):
    """Guards against shards with other names, sizes or tokens than the original script's."""
    documents = some_documents(400)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    make_dataset(tmp_path / "data", files=source, shard_size=3000, num_proc=2)
    stream = sum(reference_tokens(gpt2, map(clean, documents)), [])
    n = -(-len(stream) // 3000)
    names = [f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy" for i in range(n)]
    assert {path.name for path in (tmp_path / "data").glob("*.npy")} == set(names)
    for i, name in enumerate(names):
        shard = np.load(tmp_path / "data" / name)
        assert shard.dtype == np.uint16
        assert shard.tolist() == stream[3000 * i:3000 * (i + 1)]


def test_meta_json_counts_tokens_bytes_and_documents(gpt2, tmp_path):
    """Guards against wrong bits per byte because meta.json counts other tokens or bytes."""
    documents = some_documents(400)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    returned = make_dataset(tmp_path / "data", files=source, shard_size=3000, num_proc=2)
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
    """Guards against a small corpus that loses a document, keeps its order, or holds out another
    share than a tenth.
    """
    documents = some_documents(300)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    meta = make_dataset(tmp_path / "data", files=source, shard_size=10**5, seed=seed)
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
    """Guards against a seed without effect, and an order that depends on more than the seed."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(300))
    for seed in (1, 2):
        make_dataset(tmp_path / str(seed), files=source, shard_size=10**5, seed=seed)
    assert all_tokens(tmp_path / "1") != all_tokens(tmp_path / "2")
    make_dataset(tmp_path / "again", files=source, shard_size=10**5, seed=1, num_proc=1)
    assert contents(tmp_path / "1") == contents(tmp_path / "again")


def test_small_corpus_of_more_than_one_train_shard(gpt2, tmp_path):
    """Guards against a --shard_size that changes the order or the split of a small corpus."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(100))
    total = sum(make_dataset(tmp_path / "a", files=source)["tokens"].values())
    size, val_size = total // 2 + 1, round(total / 4)
    meta = make_dataset(tmp_path / "b", files=source, shard_size=size, val_fraction=0.25)
    expected = [val_size, size, total - val_size - size]
    assert [shard["tokens"] for shard in meta["shards"]] == expected
    one, two = (all_tokens(tmp_path / name, "train") + all_tokens(tmp_path / name, "val")
                for name in "ab")
    assert one == two


def test_tail_of_one_text_file_is_held_out(gpt2, tmp_path):
    """Guards against a single text that is reordered, or whose line ends change."""
    text = python_text().replace("\n", "\r\n")
    (tmp_path / "a.txt").write_bytes(text.encode())
    make_dataset(tmp_path / "data", files=tmp_path / "*.txt", val_fraction=0.2)
    tokens = all_tokens(tmp_path / "data", "train") + all_tokens(tmp_path / "data", "val")
    assert tokens == reference_tokens(gpt2, [text])[0]


def test_document_longer_than_a_shard(gpt2, tmp_path):
    """Guards against a long document that is cut short, or counted in each of its shards."""
    documents = ["short", python_text(), "", "short again"]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    meta = make_dataset(tmp_path / "data", files=source, shard_size=1000)
    assert all_tokens(tmp_path / "data") == sum(reference_tokens(gpt2, documents), [])
    assert [shard["documents"] for shard in meta["shards"]][1:4] == [0, 0, 0]


def test_tokenizing_goes_on_while_a_shard_is_written(bpe, tmp_path, monkeypatch):
    """Guards against a disk that holds up the tokenizing, and an error lost in its thread."""
    may_write = threading.Event()

    def slow_save(path, tokens):
        assert may_write.wait(60), "add waited for the shard to be written"
        raise UserError("no room")

    monkeypatch.setattr(shard_writer, "save_shard", slow_save)
    meta = {"settings": {"shard_size": 50, "prefix": "a"}, "order": None,
            "trained_within": {"head": None, "tail": None}}
    chunk = encode_chunk(small_bpe(), ["words of a document " * 10])
    with pytest.raises(UserError, match="no room"), \
            ShardWriter(tmp_path, meta, small_bpe(), []) as writer:
        writer.add(Chunk(chunk.tokens[:49], chunk.marks, 0))
        writer.add(Chunk(chunk.tokens[:51], b"", 0))  # two shards: one is written, one waits
        writer.add(Chunk(chunk.tokens[:49], b"", 0))
        may_write.set()
        writer.finish()


# -----------------------------------------------------------------------------
# a tokenizer trained on the corpus


@pytest.fixture
def training_text(monkeypatch):
    """The strings that prepare has trained a tokenizer on."""
    seen = []

    def train(texts, vocab_size, name):
        seen.extend(texts)
        return train_bpe(iter(seen), vocab_size, name)

    monkeypatch.setattr(fineweb, "train_bpe", train)
    return seen


@pytest.mark.parametrize("shard_size", [100, 1500, 4000, 6000, 10**8], ids=str)
def test_tokenizer_sees_the_train_split_only(tmp_path, training_text, shard_size):
    """Guards against a tokenizer trained on text of the val split, small corpus or large."""
    documents = [f"[{i}] " + f"words of document {i * 7919}, " * 3 for i in range(300)]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    meta = make_dataset(tmp_path / "data", files=source, shard_size=shard_size, **BPE)
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
    """Guards against a tokenizer that learns too little of a single text, or its val split."""
    (tmp_path / "a.txt").write_text(python_text())
    options = {"tokenizer": "bpe", "vocab_size": 500}
    meta = make_dataset(tmp_path / "data", files=tmp_path / "a.txt", **options)
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
    meta = make_dataset(tmp_path / "data", files=tmp_path / "a.txt", shard_size=shard_size, **BPE)
    enc = load_tokenizer(tmp_path / "data")
    val = enc.decode_bytes(all_tokens(tmp_path / "data", "val"))
    text, seen = text.encode(), "".join(training_text).encode()
    assert text.count(seen) == 1
    assert len(val) > 1000
    return meta, text, val, seen


def test_cut_moves_past_what_the_tokenizer_saw(tmp_path, training_text):
    """Guards against a val split of an uneven text that the tokenizer was trained on."""
    meta, text, val, seen = prepare_uneven_text(tmp_path, training_text, True, 10**8)
    assert meta["order"] == "seeded"
    assert len(text) - len(val) >= len(seen)
    assert meta["tokens"]["val"] < 0.1 * sum(meta["tokens"].values())


def test_shard_0_ends_before_what_the_tokenizer_saw(tmp_path, training_text):
    """Guards against a shard 0 of an uneven text that the tokenizer was trained on."""
    meta, text, val, seen = prepare_uneven_text(tmp_path, training_text, False, 20000)
    assert meta["order"] == "as read"
    assert len(val) - len(EOT) <= text.index(seen)
    assert meta["tokens"]["val"] < 20000
    assert sum(meta["tokens"].values()) >= 40000


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
    """Guards against a last document that is cut, one that fits and is left out, and a limit
    that is passed.
    """
    monkeypatch.setattr(tokenizing, "CHUNK", chunk)
    documents = some_documents(300)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    pieces = reference_tokens(gpt2, map(clean, documents[:150]))
    max_tokens = sum(map(len, pieces)) + more
    meta = make_dataset(tmp_path / "data", files=source, shard_size=700, max_tokens=max_tokens)
    expected = expected_prefix(gpt2, documents, max_tokens)
    assert all_tokens(tmp_path / "data") == expected
    assert sum(shard["documents"] for shard in meta["shards"]) == expected.count(50256)
    assert meta["complete"] is True


def test_max_tokens_of_a_small_corpus(gpt2, tmp_path):
    """Guards against a small limit whose corpus is not in a seeded order, or lacks a split."""
    documents = some_documents(300)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    meta = make_dataset(tmp_path / "data", files=source, max_tokens=3000)
    tokens = all_tokens(tmp_path / "data")
    assert meta["order"] == "seeded"
    assert sorted(tokens) == sorted(expected_prefix(gpt2, documents, 3000))
    assert meta["tokens"]["val"] == round(0.1 * len(tokens))


def test_max_tokens_continues_and_has_to_match(gpt2, tmp_path):
    """Guards against a continued run that ends in another place, or takes another limit."""
    source = write_jsonl(tmp_path / "a.jsonl", [*some_documents(100), python_text(), "the end"])
    data = tmp_path / "data"
    options = {"shard_size": 700, "max_tokens": 100_000}
    make_dataset(data, files=source, **options)
    whole = contents(data)
    train = list_shards(data, "train")
    for keep in (0, 3, len(train) - 1):  # the later ones end in the middle of the long document
        for path in train[keep:]:
            path.unlink()
        make_dataset(data, files=source, **options)
        assert contents(data) == whole
    with pytest.raises(UserError, match="max_tokens was 100000, is 5000"):
        make_dataset(data, files=source, shard_size=700, max_tokens=5000)


@pytest.mark.parametrize("max_tokens", [6000, 6001, 7000])
def test_max_tokens_keeps_val_from_the_tokenizer(tmp_path, training_text, max_tokens):
    """Guards against val text that trained the tokenizer, chosen from the whole corpus."""
    documents = [f"[{i}] " + f"words of document {i * 7919}, " * 3 for i in range(300)]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    # more than two shards, but few enough bytes that it might have been less
    options = {"shard_size": 3000, "max_tokens": max_tokens, **BPE}
    meta = make_dataset(tmp_path / "data", files=source, **options)
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
    """Guards against a dataset that is called complete although no document fits."""
    source = write_jsonl(tmp_path / "a.jsonl", [python_text(), "short"])
    with pytest.raises(UserError, match="0 tokens in whole documents within --max_tokens 100"):
        make_dataset(tmp_path / "data", files=source, max_tokens=100)
