"""Text to shards, beside the original script's pool of processes."""

import contextlib
import io
import itertools
import multiprocessing
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benches.turns import show_results, take_turns
from fineweb import write_documents
from gptlib.data.shard_writer import ShardWriter
from gptlib.data.sources import open_source, stdlib_files
from gptlib.data.tokenizer import load_tokenizer
from gptlib.data.tokenizing import encode_stream

SHARD_SIZE = 10**7  # tokens; smaller than the recipe's, so that several are written in a turn


def load_pool_tokenizer():
    """Load the tokenizer once in each process of the original's pool."""
    global enc
    enc = load_tokenizer("gpt2")


def tokenize_in_pool(text):
    """Tokenize as the original fineweb.py does, in a process of its pool."""
    tokens = np.array([enc.eot_token, *enc.encode_ordinary(text)])
    assert (0 <= tokens).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def tokenize_row_in_pool(row):
    return tokenize_in_pool(row["text"])


def count_tokens_alone(tokenizer, texts, n_threads):
    """The most that threads can reach: tiktoken on texts in memory, its tokens thrown away."""
    with ThreadPoolExecutor(n_threads) as pool:
        def count(text):
            return len(tokenizer.encode_to_numpy(text, disallowed_special=())) + 1
        return sum(pool.map(count, texts))


def texts_to_tokenize():
    """The standard library's files, four times over."""
    texts = [Path(path).read_text(errors="replace") for path in stdlib_files()]
    return [text for text in texts if 0 < len(text) < 200000] * 4


def bench_tokenize(args):
    """GPT-2 tokens per second of the Python standard library's text.

    --source memory: to arrays. --source parquet: from files like FineWeb-Edu's to shards.
    """
    if args.source == "parquet":
        return bench_parquet(args)
    tokenizer = load_tokenizer("gpt2")
    texts = texts_to_tokenize()
    n_processes = os.cpu_count()

    def ours():
        return sum(len(chunk.tokens) for chunk in encode_stream(tokenizer, texts, n_processes))

    def one_thread():
        return sum(len(tokenizer.encode_ordinary(text)) + 1 for text in texts)

    def tiktoken_alone():
        return count_tokens_alone(tokenizer, texts, n_processes)

    n_tokens = ours()
    context = multiprocessing.get_context("spawn")
    with context.Pool(n_processes, load_pool_tokenizer) as pool:
        def original():
            return sum(map(len, pool.imap(tokenize_in_pool, texts, chunksize=16)))

        contenders = {
            f"fineweb.py, {n_processes} threads": ours,
            "tiktoken, one thread": one_thread,
            f"tiktoken alone, {n_processes} threads": tiktoken_alone,
            f"the original's pool of {n_processes} processes": original,
        }
        results = take_turns(contenders, args.rounds, "tok")
    show_results(f"tokenizing {n_tokens:,} tokens", results)
    return {"tokenize": results}


# -----------------------------------------------------------------------------
# from parquet files to shards


def documents_like_fineweb(copies=2):
    """The standard library in documents about as long as FineWeb-Edu's, in a random order."""
    text = "\n".join(texts_to_tokenize()) * copies
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(7.9, 1.0, len(text) // 1000).astype(int) + 100  # of 4,500 characters
    ends = np.cumsum(sizes)
    cuts = [0, *ends[ends < len(text)].tolist(), len(text)]
    documents = [text[begin:end] for begin, end in itertools.pairwise(cuts)]
    rng.shuffle(documents)
    return documents


def write_parquet(folder, documents):
    """Write them as a local directory with FineWeb-Edu's columns, in row groups of 1,000."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder.mkdir()
    n = len(documents)
    score = np.linspace(2.5, 5, n)
    columns = {
        "text": documents,
        "id": [f"<urn:uuid:{i:032x}>" for i in range(n)],
        "dump": ["CC-MAIN-2024-10"] * n,
        "url": [f"http://www.example.org/{i:x}.html" for i in range(n)],
        "file_path": [f"s3://commoncrawl/crawl-data/CC-MAIN-2024-10/{i % 90}.gz" for i in range(n)],
        "language": ["en"] * n,
        "language_score": score / 5,
        "token_count": [len(text) // 4 for text in documents],
        "score": score,
        "int_score": np.round(score).astype(int),
    }
    table = pa.table(columns)
    half = n // 2
    for i, rows in enumerate((table[:half], table[half:])):
        pq.write_table(rows, folder / f"train-{i:05d}-of-00002.parquet", row_group_size=1000)


def write_like_original(arrays, folder):
    """Cut arrays of tokens into shards as the original does. Returns the number of tokens."""
    shard, filled, index, total = np.empty(SHARD_SIZE, np.uint16), 0, 0, 0
    for tokens in arrays:
        total += len(tokens)
        while filled + len(tokens) >= SHARD_SIZE:
            room = SHARD_SIZE - filled
            shard[filled:] = tokens[:room]
            np.save(folder / f"shard_{index:06d}", shard)
            tokens, filled, index = tokens[room:], 0, index + 1
        shard[filled:filled + len(tokens)] = tokens
        filled += len(tokens)
    np.save(folder / f"shard_{index:06d}", shard[:filled])
    return total


def new_meta():
    """The meta.json of a dataset that is about to be made."""
    settings = {"shard_size": SHARD_SIZE, "prefix": "bench"}
    return {"settings": settings, "trained_within": {"head": None, "tail": None}, "order": None}


def bench_parquet(args):
    """The steady rate: each contender has its tokenizer and its list of files before its turn."""
    from datasets import load_dataset
    tokenizer = load_tokenizer("gpt2")
    documents = documents_like_fineweb()
    n_processes = os.cpu_count()
    context = multiprocessing.get_context("spawn")
    with (tempfile.TemporaryDirectory() as folder,
          context.Pool(n_processes, load_pool_tokenizer) as pool):
        folder = Path(folder)
        write_parquet(folder / "hub", documents)
        # the original finds its download in Arrow files of `datasets`
        rows = load_dataset(str(folder / "hub"), split="train", cache_dir=str(folder / "cache"))

        def in_new_folder(work):
            def turn():
                # What earlier turns wrote stays to the end, so that no turn pays for removing it.
                data_root = Path(tempfile.mkdtemp(dir=folder))
                with contextlib.redirect_stdout(io.StringIO()), \
                        contextlib.redirect_stderr(io.StringIO()):
                    return work(data_root)
            return turn

        def tiktoken_alone():
            return count_tokens_alone(tokenizer, documents, n_processes)

        def from_memory():
            chunks = encode_stream(tokenizer, documents, n_processes)
            return sum(len(chunk.tokens) for chunk in chunks)

        text = open_source("fineweb", None, str(folder / "hub"), None, "text")
        text.resolve()

        def ours(data_root):
            writer = ShardWriter(data_root, new_meta(), tokenizer, [])
            with writer:
                write_documents(writer, tokenizer, text, n_processes)
            return writer.totals()["tokens"]

        def original(data_root):
            arrays = pool.imap(tokenize_row_in_pool, rows, chunksize=16)
            return write_like_original(arrays, data_root)

        n_tokens = from_memory()
        contenders = {
            f"the original: datasets, {n_processes} processes": in_new_folder(original),
            "fineweb.py, parquet files to shards": in_new_folder(ours),
            f"from memory, {n_processes} threads": from_memory,
            f"tiktoken alone, {n_processes} threads": tiktoken_alone,
        }
        results = take_turns(contenders, args.rounds, "tok")
    show_results(f"{n_tokens:,} tokens from parquet files to shards", results)
    return {"parquet": results}
