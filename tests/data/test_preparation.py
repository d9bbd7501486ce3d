"""
python -m pytest tests/data/test_preparation.py

Documents to tokens, chunk by chunk, against tiktoken's plain method.
"""

import threading
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpus import ODD, openai_gpt2, small_bpe

from gptlib.data import shards as dataset
from gptlib.data import preparation
from gptlib.common import UserError
from gptlib.data.preparation import Chunk, ShardWriter, byte_lengths, encode_chunk, encode_stream
from gptlib.data.tokenizer import EOT, load_tokenizer


@pytest.fixture(scope="module")
def gpt2():
    return openai_gpt2()


@pytest.fixture(scope="module")
def ours(gpt2):
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def bpe():
    return small_bpe()


@example(text=" ".join(ODD).replace("\ud800", ""))
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(text=st.text(st.sampled_from(" \n\t\r\u00a0\u3000\x1cab'stdl19.,<|>中の")
                    | st.characters(), max_size=60))
def test_gpt2_pieces_are_those_of_openai(gpt2, ours, text):
    """Our spelling of the split pattern, or the one call for many documents, changes a token."""
    tokens, marks, num_bytes = encode_chunk(ours, [text, "second", text])
    one = [50256, *gpt2.encode_ordinary(text)]
    assert tokens.tolist() == one + [50256, *gpt2.encode_ordinary("second")] + one
    assert ours.eot_token == 50256
    assert ours.n_vocab == 50257
    assert len(marks) == 3
    text_tokens = [token for token in tokens.tolist() if token != 50256]
    assert num_bytes == len(gpt2.decode_bytes(text_tokens))


def test_a_million_spaces(bpe):
    """GPT-2's pattern overflows the stack of tiktoken's regex, and the text is lost."""
    for text in (" " * 1_100_000 + "x", "x" + "\n" * 1_100_000):
        tokens, _, _ = encode_chunk(bpe, ["before", text, "after"])
        assert bpe.decode(tokens.tolist()) == EOT + "before" + EOT + text + EOT + "after"


def test_memory_is_bounded_by_chunks_in_flight(bpe):
    """The reader runs far ahead of the consumer, and a long corpus fills the memory."""
    read = 0

    def documents():
        nonlocal read
        for _ in range(200):
            read += 1
            yield "x y " * 2**18  # a chunk each

    stream = encode_stream(bpe, documents(), 2)
    for consumed in range(1, 6):
        next(stream)
        time.sleep(0.01)
        assert read <= consumed + 2 + 17
    stream.close()


def test_byte_lengths(gpt2, bpe):
    """bits per byte are told with wrong sizes of tokens."""
    for enc in (gpt2, bpe):
        sizes = byte_lengths(enc)
        expected = [len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)]
        expected[enc.eot_token] = 0
        assert sizes.tolist() == expected


def test_shard_in_pieces_is_what_numpy_writes(tmp_path, monkeypatch):
    """A shard that is written a piece at a time lacks or repeats some of it."""
    monkeypatch.setattr(dataset, "WRITTEN_AT_ONCE", 7)
    for size in (0, 1, 7, 20):
        tokens = np.arange(size, dtype=np.uint16)
        np.save(tmp_path / "numpy.npy", tokens)
        dataset.save_shard(tmp_path / "ours.npy", tokens)
        assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_tokenizing_goes_on_while_a_shard_is_written(bpe, tmp_path, monkeypatch):
    """The disk holds up the tokenizing, or its error is lost in the thread that writes."""
    may_write = threading.Event()

    def slow_save(path, tokens):
        assert may_write.wait(60), "add waited for the shard to be written"
        raise UserError("no room")

    monkeypatch.setattr(preparation, "save_shard", slow_save)
    meta = {"settings": {"shard_size": 50, "prefix": "a"}, "order": None,
            "trained_within": {"head": None, "tail": None}}
    chunk = encode_chunk(bpe, ["words of a document " * 10])
    with pytest.raises(UserError, match="no room"), \
            ShardWriter(tmp_path, meta, bpe, []) as writer:
        writer.add(Chunk(chunk.tokens[:49], chunk.marks, 0))
        writer.add(Chunk(chunk.tokens[:51], b"", 0))  # two shards: one is written, one waits
        writer.add(Chunk(chunk.tokens[:49], b"", 0))
        may_write.set()
        writer.finish()
