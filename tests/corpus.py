"""What the tests of text and tokens share: documents, tokenizers, and readers of datasets."""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from conftest import ROOT

import fineweb
from fineweb import PrepareConfig, prepare
from gptlib.common import run_main
from gptlib.data.shards import list_shards, open_shard
from gptlib.data.tokenizer import train_bpe

ODD = [
    "", "ordinary text", "it says <|endoftext|> here", "half \ud800 a pair",
    "中文没有空格。日本語もカタカナも。", "a\r\n\tb  \n\n c",
    "don't 'self' \u00a0 \u2003x\x1c \x1cy \x85 z", "ไม่มีช่องว่าง हिन्दी e\u0301 ¹²³ 1234567",
    "\ufeffBOM", "🙂 👩‍👩‍👧 𐐷"]


@functools.cache
def openai_gpt2():
    """OpenAI's own Encoding, not ours. Skips the test where it can't be had."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        pytest.skip(f"no GPT-2 vocabulary: {type(error).__name__} (set TIKTOKEN_CACHE_DIR)")


@functools.cache
def small_bpe():
    """A tokenizer of 400 ids, trained on Python and on the odd documents."""
    return train_bpe(iter([python_text(), *[clean(text) for text in ODD] * 50]), 400)


@functools.cache
def python_text():
    names = ("fineweb.py", "gptlib/data/tokenizer.py", "gptlib/data/sources.py")
    return "".join((ROOT / name).read_text() for name in names)


@functools.cache
def split_words():
    return np.array(python_text().split(" "))  # an array, which choice would make anew each time


def clean(text):
    """Lone surrogates to U+FFFD, in another way than the program does it."""
    return "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in text)


def some_documents(n, seed=0):
    """n documents of 0 to 60 words, every tenth of them odd."""
    rng, words = np.random.default_rng(seed), split_words()
    documents = [" ".join(rng.choice(words, rng.integers(0, 60))) for _ in range(n)]
    for i in range(3, n, 10):
        documents[i] = ODD[i // 10 % len(ODD)]
    return documents


def write_jsonl(path, documents):
    rows = [json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(documents)]
    path.write_text("".join(rows))
    return path


def reference_tokens(enc, documents):
    """What shards are compared with: one document after the other, by tiktoken's plain method."""
    return [[enc.eot_token, *enc.encode_ordinary(text)] for text in documents]


def all_tokens(root, split=None):
    """Tokens of the shards of a split, or of val and then train."""
    splits = [split] if split else ["val", "train"]
    paths = [path for split in splits for path in list_shards(root, split)]
    return np.concatenate([open_shard(path) for path in paths]).tolist()


def contents(root):
    """{file name: bytes} of a directory, without the lock, which names the process that held it."""
    return {path.name: path.read_bytes() for path in Path(root).iterdir() if path.name != ".lock"}


def make_dataset(data_root, **options):
    """Prepare a dataset in this process; options: fields of PrepareConfig, and paths may be Paths.

    Returns the contents of meta.json.
    """
    paths = {key: str(value) for key, value in options.items() if isinstance(value, Path)}
    return prepare(PrepareConfig(str(data_root), **(options | paths)))


def fineweb_here(*args):
    """Run fineweb.py's main in this process, which saves the start of another.

    Returns what fineweb_command does.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    argv, sys.argv = sys.argv, ["fineweb.py", *map(str, args)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_main(fineweb.main)
    except SystemExit as end:
        code = 1 if isinstance(end.code, str) else end.code or 0
        if isinstance(end.code, str):
            err.write(end.code + "\n")
    finally:
        sys.argv = argv
    texts = []
    for file in (out, err):
        file.flush()
        texts.append(file.buffer.getvalue().decode())
    return subprocess.CompletedProcess(args, code, *texts)


def fineweb_command(*args, **options):
    """Run fineweb.py as a user would, in a process of its own."""
    options = {"env": os.environ} | options
    return subprocess.run([sys.executable, str(ROOT / "fineweb.py"), *map(str, args)],
                          capture_output=True, text=True, timeout=120, **options)


def assert_fails(result, *words):
    """A UserError: exit code 1, no traceback, and a last line with all these words."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: "), line
    for word in words:
        assert str(word) in line
