"""
Text -> tokens -> uint16 shards. Owns the tokenizer and the shard format.

FineWeb-Edu, 10B tokens as 100 shards of the GPT-2 tokenizer (20 GB) in edu_fineweb10B/; its larger samples:
$ python fineweb.py
$ python fineweb.py --name sample-100BT --data_root edu_fineweb100B
Any other text on the Hugging Face Hub, or in a local directory of the same layout, here with its own tokenizer:
$ python fineweb.py --dataset wikimedia/wikipedia --name 20231101.ja --tokenizer bpe --vocab_size 32768 --data_root ja
Your own files (.txt and .md: a document a file; .jsonl, .json.gz and .parquet: a document a row):
$ python fineweb.py --files "books/**/*.txt" --data_root books
The same with the tokenizer of a checkpoint (or of another dataset, or a Hugging Face directory), to fine-tune it:
$ python fineweb.py --files "books/**/*.txt" --tokenizer log/latest_checkpoint.pt --data_root books_for_it
The sources of the Python standard library, about 9 MB that every installation carries:
$ python fineweb.py --source stdlib --tokenizer bpe --vocab_size 4096 --data_root stdlib

Every document begins with <|endoftext|>; an empty one is nothing but that. Shard 0 is the val split. A corpus smaller
than two shards is put in a seeded order first, and the last --val_fraction of its tokens is the val split. Killed
half-way? Run the same command again: it continues after the last whole shard, and the result is the same to the byte.
"""

import itertools
import json
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gptlib.common import ArgumentParser, UserError, atomic_write, run_main
from gptlib.dataset import list_shards, read_meta, save_shard
from gptlib.sources import FINEWEB, open_source
from gptlib.tokenizer import EOT, dump_ranks, load_tokenizer, train_bpe

# -----------------------------------------------------------------------------
# documents -> tokens

EMPTY, REPAIRED = 1, 2  # marks of a document
CHUNK = 2**20  # characters handed to a thread at a time


def clean(text):
    """Replace lone surrogates, which UTF-8 cannot hold, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode_chunk(enc, texts):
    """Tokenize a list of documents. Returns their uint16 tokens, EOT before each, and a byte of marks for each."""
    try:
        if any(EOT in text for text in texts):
            raise ValueError("the separator is in the text")
        # one call for all: no Python object a token, and the interpreter lock is free while it works
        tokens = enc.encode_to_numpy(EOT.join(["", *texts]), allowed_special={EOT})
        return tokens.astype(np.uint16), bytes(EMPTY * (not text) for text in texts)
    except ValueError:  # that, or lone surrogates, or a million spaces that overflow the stack of the regex
        if len(texts) > 1:
            tokens, marks = zip(*[encode_chunk(enc, [text]) for text in texts], strict=True)
            return np.concatenate(tokens), b"".join(marks)
    text = clean(texts[0])
    parts = re.split(r"(\s{100000})", text)  # what would overflow, by itself
    tokens = [enc.encode_to_numpy(part, disallowed_special=()) for part in parts]
    return np.concatenate([[enc.eot_token], *tokens]).astype(np.uint16), bytes([REPAIRED * (text != texts[0])])


def encode_stream(enc, documents, num_proc):
    """Yield encode_chunk of about CHUNK characters of documents at a time, in order, from num_proc threads.

    Threads, not processes: tiktoken works outside the interpreter lock, so no text is copied to and fro, the platform's
    way to start processes does not matter, and nothing is left behind when this one dies.
    """
    with ThreadPoolExecutor(num_proc) as pool:
        queue, texts, size = deque(), [], 0
        for text in documents:
            texts.append(text)
            size += len(text) + 1
            if size >= CHUNK:
                queue.append(pool.submit(encode_chunk, enc, texts))
                texts, size = [], 0
                if len(queue) > num_proc + 16:  # enough to bridge the writing of a shard; bounds what is in memory
                    yield queue.popleft().result()
        if texts:
            queue.append(pool.submit(encode_chunk, enc, texts))
        while queue:
            yield queue.popleft().result()


def measure(token_sizes, tokens, limit=2**63 - 1):
    """Return how many of the first tokens fit into `limit` bytes of text, and how many bytes those are."""
    fit = size = 0
    for i in range(0, len(tokens), 2**20):  # in pieces, as numpy makes an int64 of every index
        ends = size + np.cumsum(token_sizes[tokens[i:i + 2**20]], dtype=np.int64)
        k = int(np.searchsorted(ends, limit, side="right"))
        fit, size = fit + k, int(ends[k - 1]) if k else size
        if k < len(ends):
            break
    return fit, size


def training_text(read, shard_size, val_fraction, seed, most=10**8):
    """Choose up to `most` bytes to train a tokenizer on, sure to be in the train split. Returns (strings, head, tail).

    Both the split and "smaller than two shards" are counted in tokens, which do not exist yet. Of a corpus that may
    fill two shards, the first half may be val; of one that may not, the tail of the seeded order may be. What is left
    is fit to train on, and the cut made later respects it: val lies within the first `head` bytes as read, or beyond
    the first `tail` bytes of the seeded order; None where that case is ruled out.
    """
    sizes, total = [], 0
    for text in read(0):
        sizes.append(len(text) if text.isascii() else len(clean(text).encode()))
        total += sizes[-1]
        if total > 12 * shard_size:  # two shards at six bytes a token: a large corpus, whatever the tokens will be
            break
    sizes = np.array(sizes, dtype=np.int64)
    first, last, head, tail = 0 * sizes, sizes.copy(), None, None
    if total + len(sizes) >= 2 * shard_size:  # no token but EOT is without a byte, so a smaller one cannot fill them
        head = total // 2
        first = np.clip(head - (np.cumsum(sizes) - sizes), 0, sizes)
    if total <= 12 * shard_size:
        tail = int(0.95 * (1 - val_fraction) * total)  # 0.95: so that the exact cut hardly ever has to move
        order = np.random.default_rng(seed).permutation(len(sizes))
        last[order] = np.clip(tail - (np.cumsum(sizes[order]) - sizes[order]), 0, sizes[order])
    wanted = np.maximum(last - first, 0)
    last = first + np.clip(most - (np.cumsum(wanted) - wanted), 0, wanted)

    def strings():  # piece by piece, as the trainer takes many bytes for each
        for text, a, b in zip(read(0), first, last, strict=False):
            data = clean(text).encode() if a < b else b""
            yield from (data[i:min(i + 2**20, b)].decode("utf-8", "ignore") for i in range(a, b, 2**20))
    return strings(), head, tail


# -----------------------------------------------------------------------------
# the command


def named_tokenizer(name):
    """The tokenizer of "gpt2", a checkpoint file, a dataset directory or a Hugging Face directory."""
    if not Path(name).is_file():
        return load_tokenizer(name)
    from gptlib.checkpoint import load_checkpoint  # torch takes a second to import, and nothing else here needs it
    return load_tokenizer(load_checkpoint(name, mmap=True)["tokenizer"])


def prepare(data_root, source="fineweb", files=None, dataset=FINEWEB, name=None, column="text", tokenizer="gpt2",
            vocab_size=None, shard_size=10**8, val_fraction=0.1, num_proc=None, seed=1337, prefix="edufineweb"):
    """Write the shards, meta.json and tokenizer of a dataset directory, or continue where it was killed.

    source: "fineweb" (dataset, name, column: on the Hub or a local directory), "files" (files: a glob) or "stdlib".
    tokenizer: "bpe" trains one of vocab_size, anything else is for find_tokenizer. shard_size is in tokens. Returns the
    contents of meta.json; raises UserError for whatever the user can mend.
    """
    from tqdm import tqdm
    root, num_proc = Path(data_root), os.cpu_count() if num_proc is None else num_proc
    if (vocab_size is not None) != (tokenizer == "bpe"):
        raise UserError(f"--tokenizer {tokenizer} --vocab_size {vocab_size}: a size goes with bpe, and bpe with a size")
    if vocab_size is not None and not 257 <= vocab_size <= 65536:
        raise UserError(f"--vocab_size {vocab_size}: expected 257 (the bytes and {EOT}) to 65536 (uint16 shards)")
    if shard_size < 1 or num_proc < 1 or not 0 < val_fraction < 1:
        raise UserError(f"--shard_size {shard_size} --num_proc {num_proc} --val_fraction {val_fraction}: expected at "
                        "least 1, at least 1, and between 0 and 1")
    if not prefix or re.search(r"_(train|val)_|[/\\]", f"{prefix}_"):
        raise UserError(f"--prefix {prefix!r}: expected part of a file name, without _train_ or _val_")
    if source == "fineweb" and dataset == FINEWEB:
        name = name or "sample-10BT"
    description, read = open_source(source, files, dataset, name, column)

    # what is here already?
    settings = {"source": description, "tokenizer": tokenizer, "vocab_size": vocab_size, "shard_size": shard_size,
                "val_fraction": val_fraction, "seed": seed, "prefix": prefix}
    meta = read_meta(root)
    if "settings" not in meta and list_shards(root, "train") + list_shards(root, "val"):
        raise UserError(f"{root} holds shards that this program did not make: choose another --data_root")
    there = list(itertools.takewhile(lambda shard: (root / shard["name"]).exists(), meta.get("shards", [])))
    old = meta.get("settings", {})
    changed = [f"{key} was {old.get(key)!r}, is {now!r}" for key, now in settings.items() if now != old.get(key)]
    if there and changed:
        raise UserError(f"{root} was made otherwise ({'; '.join(changed)}): remove it or choose another --data_root")
    if meta.get("complete") and len(there) == len(meta["shards"]):
        print(f"{root} is complete: {sum(meta['tokens'].values()):,} tokens in {len(there)} shards. Nothing to do")
        return meta
    fresh = not old or changed  # else the tokenizer is there: meta.json is written after it
    enc = (named_tokenizer(tokenizer) if fresh else load_tokenizer(root)) if tokenizer != "bpe" or not fresh else None
    if enc and enc.n_vocab > 65536:
        raise UserError(f"--tokenizer {tokenizer} has {enc.n_vocab} tokens: uint16 shards hold 65536")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {root} ({error.strerror}): choose another --data_root") from error

    if fresh:
        head = tail = None
        if tokenizer == "bpe":
            print(f"training a tokenizer of {vocab_size} tokens on the text")
            strings, head, tail = training_text(read, shard_size, val_fraction, seed)
            enc = train_bpe(strings, vocab_size)
            if enc.n_vocab < vocab_size:
                print(f"the text is too short for that many: {enc.n_vocab}")
        if enc.name != "gpt2":
            atomic_write(root / "tokenizer.tiktoken", lambda f: f.write(dump_ranks(enc._mergeable_ranks)))
        meta = {"tokenizer": enc.name, "vocab_size": enc.n_vocab, "eot": enc.eot_token, "source": description,
                "settings": settings, "trained_within": {"head": head, "tail": tail}, "order": None}
    else:
        head, tail = meta["trained_within"].values()
    token_sizes = np.array([len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)], dtype=np.uint16)
    token_sizes[enc.eot_token] = 0

    # a large corpus continues after its last whole shard; a small one, at most two shards, is tokenized again
    shards = there if meta["order"] == "as read" else []
    large = bool(shards) or (head is not None and tail is None)
    skip, begun = (sum(shard["documents"] for shard in shards) - 1, shards[-1]["begun"]) if shards else (0, 0)
    held, count, marks = [], 0, bytearray()

    def save_meta(complete=False):
        for unit in ("tokens", "bytes"):
            meta[unit] = {split: sum(shard[unit] for shard in shards if f"_{split}_" in shard["name"])
                          for split in ("train", "val")}
        text = json.dumps(meta | {"shards": shards, "complete": complete}, indent=2, ensure_ascii=False) + "\n"
        atomic_write(root / "meta.json", lambda f: f.write(text.encode()))

    def write_shards(tokens, least, val_size=shard_size):
        """Write shards while there are `least` tokens; returns the others."""
        while len(tokens) >= least:
            size = shard_size if shards else val_size
            if not shards and large and head is not None:  # the tokenizer may have seen what follows
                size = max(1, min(size, measure(token_sizes, tokens, head)[0]))
            shard, tokens = tokens[:size], tokens[size:]
            starts = np.flatnonzero(shard == enc.eot_token)
            n, before = len(starts), shards[-1]["begun"] if shards else 0
            shards.append({"name": f"{prefix}_{'train' if shards else 'val'}_{len(shards):06d}.npy",
                           "tokens": len(shard), "bytes": measure(token_sizes, shard)[1],
                           "documents": n, "empty": marks.count(EMPTY, 0, n), "repaired": marks.count(REPAIRED, 0, n),
                           # tokens so far of the last document: where a run that continues takes it up
                           "begun": len(shard) - int(starts[-1]) if n else before + len(shard)})
            del marks[:n]
            save_meta()  # before the shard: one that is there is always accounted for
            path = root / shards[-1]["name"]
            if not path.exists():
                save_shard(path, shard)
        return tokens

    save_meta()
    with tqdm(desc="tokenizing", unit="tok", unit_scale=True, initial=sum(meta["tokens"].values())) as bar:
        for tokens, chunk_marks in encode_stream(enc, read(skip), num_proc):
            if begun:  # the last document of the last shard, of which that much is there
                tokens, chunk_marks, begun = tokens[begun:], chunk_marks[1:], 0
            held.append(tokens)
            marks += chunk_marks
            count += len(tokens)
            bar.update(len(tokens))
            if count >= shard_size * (1 if large and shards else 2):
                large, meta["order"] = True, "as read"
                tokens = write_shards(np.concatenate(held), shard_size)
                held, count = [tokens.copy()], len(tokens)  # a copy: the slice would keep the shards in memory
    tokens = np.concatenate([np.empty(0, np.uint16), *held])
    if large:
        meta["order"] = "as read"
        write_shards(tokens, 1)
    else:
        meta["order"] = "seeded"
        if len(tokens) < 2:
            raise UserError(f"{description}: {len(tokens)} tokens in all, too few for two splits")
        documents = np.split(tokens, np.flatnonzero(tokens == enc.eot_token)[1:])
        order = np.random.default_rng(seed).permutation(len(documents))
        tokens = np.concatenate([documents[i] for i in order])
        cut = len(tokens) - round(val_fraction * len(tokens))
        if tail is not None:  # forward to the end of the token that ends what the tokenizer has seen
            cut = max(cut, measure(token_sizes, tokens, tail - 1)[0] + 1)
        cut = min(max(cut, 1), len(tokens) - 1)  # something for either split
        n = np.count_nonzero(tokens[:cut] == enc.eot_token)
        marks = bytearray(marks[i] for i in [*order[n:], *order[:n]])
        write_shards(np.concatenate([tokens[cut:], tokens[:cut]]), 1, val_size=len(tokens) - cut)
    save_meta(complete=True)
    total = {key: sum(shard[key] for shard in shards) for key in ("documents", "empty", "repaired", "tokens", "bytes")}
    print("{documents:,} documents ({empty:,} empty, {repaired:,} with lone surrogates replaced): {tokens:,} tokens, "
          "{bytes:,} bytes of text".format(**total), f"in {len(shards)} shards, the first is val, in {root}")
    return read_meta(root)


def main():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data_root", default="edu_fineweb10B", help="dataset directory to write")
    add("--source", choices=["fineweb", "files", "stdlib"], help="default: fineweb, or files where --files is given")
    add("--files", metavar="GLOB", help="text files, quoted: .txt .md .jsonl .json.gz .parquet; ** means any folders")
    add("--dataset", default=FINEWEB, help="name on the Hugging Face Hub, or a local directory")
    add("--name", help="its configuration; of FineWeb-Edu sample-10BT (default), sample-100BT or sample-350BT")
    add("--column", default="text", help="column or key that holds the text")
    add("--tokenizer", default="gpt2", help="gpt2; bpe: train one on the text; or a checkpoint, a dataset directory, a "
        "Hugging Face directory: the tokenizer of that (default: gpt2)")
    add("--vocab_size", type=int, help="of bpe, with its <|endoftext|>: 257 to 65536")
    add("--shard_size", type=int, default=10**8, help="tokens in a shard")
    add("--val_fraction", type=float, default=0.1, help="held out of a corpus smaller than two shards")
    add("--num_proc", type=int, help="tokenizing threads; default: one a core")
    add("--seed", type=int, default=1337, help="of the order of documents of a corpus smaller than two shards")
    add("--prefix", default="edufineweb", help="begins the names of the shards")
    args = vars(parser.parse_args())
    args["source"] = args["source"] or ("fineweb" if args["files"] is None else "files")
    prepare(**args)


if __name__ == "__main__":
    run_main(main)
