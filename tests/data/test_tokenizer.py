"""
python -m pytest tests/data/test_tokenizer.py

Tokenizers against OpenAI's own, and from and to every place where one is kept. What needs the GPT-2
vocabulary is skipped if tiktoken can neither find nor download it.
"""

import os

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from corpus import (ODD, assert_fails, clean, fineweb_command, fineweb_here, openai_gpt2,
                    python_text, small_bpe, some_documents)

from gptlib.common import UserError
from gptlib.data.tokenizer import load_tokenizer, tokenizer_to_dict, train_bpe

NO_SURROGATES = " ".join(ODD).replace("\ud800", "")


@pytest.fixture(scope="module")
def gpt2():
    return openai_gpt2()


@pytest.fixture(scope="module")
def bpe():
    return small_bpe()


def test_gpt2_on_real_text(gpt2):
    """Guards against a split pattern that cuts real text in other places than OpenAI's."""
    text = python_text() + (ROOT / "tests" / "corpus.py").read_text()
    assert load_tokenizer("gpt2").encode_ordinary(text) == gpt2.encode_ordinary(text)


@example(text=NO_SURROGATES)
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(text=st.text(st.sampled_from(" \n\t'sab1中の々ーカ\u0301")
                    | st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bpe_round_trip(bpe, text):
    """Guards against a character that is lost because no alternative of the pattern matches."""
    assert bpe.decode_bytes(bpe.encode_ordinary(text)) == text.encode()


def test_bpe_vocabulary(bpe):
    """Guards against a vocabulary that lacks a byte, or has learned nothing but bytes."""
    assert bpe.n_vocab == 400
    assert bpe.eot_token == 399
    assert all(bpe.encode_single_token(bytes([b])) < 256 for b in range(256))
    assert bpe.eot_token not in bpe.encode_ordinary("a <|endoftext|> b")
    assert len(bpe.encode_ordinary(python_text())) < 0.6 * len(python_text())
    learned = "".join(bpe.decode([i]) for i in range(256, 399))
    assert set(learned) & set("中文日本語カタ"), "no merge makes a whole character of its bytes"


def test_bpe_training_is_deterministic():
    """Guards against two runs of one command with different tokenizers, so different shards."""
    texts = some_documents(300)
    one, two = (tokenizer_to_dict(train_bpe(map(clean, texts), 600)) for _ in range(2))
    assert one == two


def test_tokenizer_from_dict_directory_and_file(bpe, tmp_path):
    """Guards against a saved tokenizer that comes back as another one."""
    saved = tokenizer_to_dict(bpe)
    assert set(saved) == {"name", "ranks"}
    assert isinstance(saved["ranks"], bytes)
    (tmp_path / "tokenizer.tiktoken").write_bytes(saved["ranks"])
    (tmp_path / "meta.json").write_text('{"tokenizer": "bpe"}')
    # tiktoken reads its own format
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "tokenizer.tiktoken"))
    assert sorted(ranks.values()) == list(range(399))
    text = python_text()[:3000]
    for spec in (saved, tmp_path, str(tmp_path)):
        enc = load_tokenizer(spec)
        assert enc.encode_ordinary(text) == bpe.encode_ordinary(text)
        assert enc.eot_token == 399
        assert tokenizer_to_dict(enc) == saved


def test_directory_without_meta_has_gpt2_tokens(gpt2, tmp_path):
    """Guards against refusing a dataset of build-nanogpt, which has no meta.json."""
    for spec in (tmp_path, {"name": "gpt2"}):
        enc = load_tokenizer(spec)
        assert enc.n_vocab == 50257
        assert tokenizer_to_dict(enc) == {"name": "gpt2"}


@pytest.mark.parametrize("spec", [
    "no/such/dir", {"name": "bpe", "ranks": b"!!! x\n"}, {"name": "bpe"}, {"name": "llama"}])
def test_unusable_tokenizers(spec):
    """Guards against a damaged tokenizer that ends in a traceback."""
    with pytest.raises(UserError):
        load_tokenizer(spec)


def test_a_deep_tokenizer_json(tmp_path):
    """Guards against a traceback for JSON that is nested deeper than Python's stack."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "tokenizer.json").write_text("[" * 200_000)
    result = fineweb_here("--files", tmp_path / "a.txt", "--tokenizer", tmp_path / "theirs",
                          "--data_root", tmp_path / "data")
    assert_fails(result, "tokenizer", "nested too deeply")


def test_gpt2_without_network(tmp_path):
    """Guards against an error that does not say how to go on without network and cache."""
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path),
           "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    (tmp_path / "a.txt").write_text("text")
    result = fineweb_command("--files", tmp_path / "a.txt", "--data_root", tmp_path / "data",
                             env=env)
    assert_fails(result, "TIKTOKEN_CACHE_DIR", "--tokenizer bpe --vocab_size")
