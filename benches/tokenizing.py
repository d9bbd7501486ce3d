"""Text to shards, beside the original script's pool of processes."""

import multiprocessing
import os
from pathlib import Path

import numpy as np

from benches.turns import show_results, take_turns
from gptlib.preparation import encode_stream
from gptlib.sources import stdlib_files
from gptlib.tokenizer import load_tokenizer


def load_pool_tokenizer():
    """In a process of the original's pool: load the tokenizer once."""
    global enc
    enc = load_tokenizer("gpt2")


def tokenize_in_pool(text):
    """Tokenize as the original fineweb.py does, in a process of its pool."""
    tokens = np.array([enc.eot_token, *enc.encode_ordinary(text)])
    assert (0 <= tokens).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def texts_to_tokenize():
    """The standard library's files, four times over."""
    texts = [Path(path).read_text(errors="replace") for path in stdlib_files()]
    return [text for text in texts if 0 < len(text) < 200000] * 4


def bench_tokenize(args):
    """GPT-2 tokens per second of the Python standard library's text, from memory to arrays."""
    tokenizer = load_tokenizer("gpt2")
    texts = texts_to_tokenize()
    n_processes = os.cpu_count()

    def ours():
        return sum(len(tokens) for tokens, _, _ in encode_stream(tokenizer, texts, n_processes))

    def one_thread():
        return sum(len(tokenizer.encode_ordinary(text)) + 1 for text in texts)

    n_tokens = ours()
    context = multiprocessing.get_context("spawn")
    with context.Pool(n_processes, load_pool_tokenizer) as pool:
        def original():
            return sum(map(len, pool.imap(tokenize_in_pool, texts, chunksize=16)))

        contenders = {
            f"fineweb.py, {n_processes} threads": ours,
            "tiktoken, one thread": one_thread,
            f"the original's pool of {n_processes} processes": original,
        }
        results = take_turns(contenders, args.rounds, "tok")
    show_results(f"tokenizing {n_tokens:,} tokens", results)
    return {"tokenize": results}
