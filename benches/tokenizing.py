"""Text to tokens, beside tiktoken alone and the original script's pool of processes."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benches.turns import show_results, take_turns
from gptlib.data.sources import stdlib_files
from gptlib.data.tokenizer import load_tokenizer
from gptlib.data.tokenizing import encode_stream


def load_pool_tokenizer():
    """Load the tokenizer once in each process of the original's pool."""
    global enc
    enc = load_tokenizer("gpt2")


def tokenize_in_pool(text):
    """Tokenize as the original fineweb.py does, in a process of its pool."""
    tokens = np.array([enc.eot_token, *enc.encode_ordinary(text)])
    assert (0 <= tokens).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def bench_tokenize(args):
    """GPT-2 tokens per second of the Python standard library's text, four times over, to arrays."""
    tokenizer = load_tokenizer("gpt2")
    texts = [Path(path).read_text(errors="replace") for path in stdlib_files()]
    texts = [text for text in texts if 0 < len(text) < 200000] * 4
    n_processes = os.cpu_count()

    def ours():
        return sum(len(chunk.tokens) for chunk in encode_stream(tokenizer, texts, n_processes))

    def one_thread():
        return sum(len(tokenizer.encode_ordinary(text)) + 1 for text in texts)

    def count(text):
        return len(tokenizer.encode_to_numpy(text, disallowed_special=())) + 1

    def tiktoken_alone():  # the most that threads can do: nothing is kept of its tokens
        return sum(threads.map(count, texts))

    def original():
        return sum(map(len, pool.imap(tokenize_in_pool, texts, chunksize=16)))

    n_tokens = ours()
    context = multiprocessing.get_context("spawn")
    with (context.Pool(n_processes, load_pool_tokenizer) as pool,
          ThreadPoolExecutor(n_processes) as threads):
        results = take_turns({
            f"fineweb.py, {n_processes} threads": ours,
            "tiktoken, one thread": one_thread,
            f"tiktoken alone, {n_processes} threads": tiktoken_alone,
            f"the original's pool of {n_processes} processes": original,
        }, args.rounds, "tok")
    show_results(f"tokenizing {n_tokens:,} tokens", results)
    return {"tokenize": results}
