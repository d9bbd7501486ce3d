"""Shards that others have made: GPT-2 tokens in llm.c's .bin format on the Hugging Face Hub.

Tokenizing 10 billion tokens takes an hour on a good host; fetching the same takes minutes.
"""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptlib.common import UserError, print0, warn
from gptlib.data.hub import HubFiles, fetch_ahead, hub_errors, list_files, with_retries
from gptlib.data.shards import (file_checksum, is_relative_path, list_shards, open_shard, read_meta,
                                write_meta)
from gptlib.data.tokenizer import byte_lengths, load_tokenizer
from gptlib.lock import lock_directory


class ReadySet(NamedTuple):
    dataset: str  # its name on the Hub
    text: str  # what was tokenized
    licence: str  # as the dataset's page says


# Layouts: llm.c's dev/data/edu_fineweb.sh and modded-nanogpt's data/cached_fineweb10B.py name the
# first two and their files, edu_fineweb_train_000001.bin (to 001001) and fineweb_train_000001.bin
# (to 000103), with a val shard 000000 each, of up to 100 million tokens a file. The text of both is
# under ODC-By 1.0.
READY_SETS = {
    "fineweb-edu-100B": ReadySet("karpathy/fineweb-edu-100B-gpt2-token-shards",
                                 "HuggingFaceFW/fineweb-edu, sample-100BT", "ODC-By 1.0"),
    "fineweb-10B": ReadySet("kjj0/fineweb10B-gpt2", "HuggingFaceFW/fineweb, sample-10BT", "MIT"),
    "fineweb-100B": ReadySet("kjj0/fineweb100B-gpt2", "HuggingFaceFW/fineweb, sample-100BT", "MIT"),
    "fineweb-edu-10B": ReadySet("kjj0/finewebedu10B-gpt2",
                                "HuggingFaceFW/fineweb-edu, sample-10BT", "see its page"),
}
AHEAD = 1  # shards that are fetched while one is checked: two at a time
PIECE = 2**20  # tokens that are counted at a time


def fetch_ready(data_root, name, max_tokens=None, revision=None):
    """Fetch shards of GPT-2 tokens from the Hub, or go on after a kill.

    name: a key of READY_SETS, or any dataset on the Hub with files like x_train_000001.bin.
    max_tokens: fetch the val shards and as many train shards, in order, as have so many tokens
    (default: all). revision: a commit, branch or tag. Each shard is checked before it counts.
    Returns the contents of meta.json. Raises UserError.
    """
    root = Path(data_root)
    ready = find_ready_set(name)
    meta = read_meta(root)
    check_place(root, meta, ready)
    enc = load_tokenizer("gpt2")
    with lock_directory(root):
        meta = meta or begin(ready, revision)
        hub = HubFiles(ready.dataset, meta["ready"]["revision"], root / "downloads")
        wanted = choose_files(meta["ready"], max_tokens)
        tell_room_needed(root, wanted)
        fetch_shards(root, meta, hub, wanted, enc)
        hub.drop_all()
    tokens = meta["tokens"]
    print0(f"{sum(tokens.values()):,} tokens in {len(meta['shards'])} shards, {tokens['val']:,} of "
           f"them for validation, in {root}")
    return meta


def find_ready_set(name):
    if name in READY_SETS:
        return READY_SETS[name]
    if is_relative_path(name) and name.count("/") == 1:
        return ReadySet(name, name, "see its page")
    raise UserError(f"--ready {name}: expected {', '.join(READY_SETS)}, or a dataset's name on "
                    "the Hub such as somebody/shards")


def check_place(root, meta, ready):
    """Raise UserError if the directory holds something else than these shards."""
    recorded = meta.get("ready", {}).get("dataset")
    if recorded == ready.dataset:
        return
    if meta or list_shards(root, "train") or list_shards(root, "val"):
        raise UserError(f"{root} holds {recorded or 'another dataset'}: choose another --data_root")


def begin(ready, revision):
    """The first contents of meta.json. The list of files is asked for once, and then kept."""
    with hub_errors(ready.dataset):
        commit, sizes = with_retries(ready.dataset, lambda: list_files(ready.dataset, revision))
    files = sorted(name for name in sizes if is_shard_name(name))
    if not any(is_val(name) for name in files) or all(map(is_val, files)):
        raise UserError(f"{ready.dataset} has no files like x_val_000000.bin and "
                        "x_train_000001.bin: it is no set of ready shards")
    return {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256,
            "source": f"{ready.text}, as GPT-2 tokens in {ready.dataset}",
            "ready": {"dataset": ready.dataset, "revision": commit, "licence": ready.licence,
                      "files": files, "sizes": [sizes[name] for name in files]},
            "shards": [], "tokens": {"train": 0, "val": 0}, "bytes": {"train": 0, "val": 0},
            "complete": False}


def is_shard_name(name):
    is_plain = is_relative_path(name) and "/" not in name
    return is_plain and name.endswith(".bin") and ("_train_" in name or "_val_" in name)


def is_val(name):
    return "_val_" in name


def choose_files(ready, max_tokens):
    """{name: size in bytes} of the files to have: val, then train in order up to max_tokens."""
    sizes = dict(zip(ready["files"], ready["sizes"], strict=True))
    wanted = {name: size for name, size in sizes.items() if is_val(name)}
    num_tokens = 0
    for name, size in sizes.items():
        if is_val(name):
            continue
        if max_tokens is not None and num_tokens >= max_tokens:
            break
        wanted[name] = size
        num_tokens += (size - 1024) // 2  # a header, then two bytes a token
    return wanted


def tell_room_needed(root, wanted):
    needed = sum(size for name, size in wanted.items() if not (root / name).exists())
    free = shutil.disk_usage(root).free
    print0(f"{len(wanted)} shards, {needed / 1e9:.2f} GB of them to fetch into {root}, where "
           f"{free / 1e9:.2f} GB are free")
    if needed > free:
        warn("that may not fit: make room, or choose a smaller --max_tokens or another --data_root")


def fetch_shards(root, meta, hub, wanted, enc):
    """Fetch the shards that are not there, check each, and record it in meta.json."""
    from tqdm import tqdm
    records = {shard["name"]: shard for shard in meta["shards"]}
    missing = [name for name in wanted if name not in records or not (root / name).exists()]
    if missing:
        meta["complete"] = False
    sizes = byte_lengths(enc)
    fetched = fetch_ahead(hub.fetch, missing, AHEAD)
    total = sum(wanted[name] for name in missing)
    with (tqdm(desc="fetching", unit="B", unit_scale=True, total=total) as bar,
          hub_errors(hub.dataset)):
        for name, path in zip(missing, fetched, strict=True):
            records[name] = check_shard(Path(path), name, sizes)
            record(root, meta, records)  # before the shard, so that every shard has its record
            os.replace(path, root / name)
            bar.update(wanted[name])
    meta["complete"] = True
    record(root, meta, records)


def record(root, meta, records):
    """Write meta.json with these shards."""
    meta["shards"] = [records[name] for name in sorted(records)]
    for unit in ("tokens", "bytes"):
        counts = {"train": 0, "val": 0}
        for shard in meta["shards"]:
            counts["val" if is_val(shard["name"]) else "train"] += shard[unit]
        meta[unit] = counts
    write_meta(root, meta)


def check_shard(path, name, token_sizes):
    """What meta.json keeps of a shard. Raises UserError for a token outside of the vocabulary.

    token_sizes: bytes of text of each token; the text itself is not there, but its length is.
    """
    try:
        tokens = open_shard(path)
        counts = np.zeros(2**16, dtype=np.int64)
        for i in range(0, len(tokens), PIECE):
            counts += np.bincount(tokens[i:i + PIECE], minlength=2**16)
        largest = int(np.flatnonzero(counts)[-1]) if len(tokens) else 0
        if largest >= len(token_sizes):
            raise UserError(f"{name}: token {largest}, but GPT-2 has {len(token_sizes)} tokens")
    except UserError as error:
        path.unlink(missing_ok=True)
        raise UserError(f"{name} on the Hub is no shard of GPT-2 tokens: {error}") from error
    return {"name": name, "tokens": len(tokens),
            "bytes": int(counts[:len(token_sizes)] @ token_sizes.astype(np.int64)),
            "documents": int(counts[len(token_sizes) - 1]), "crc32": file_checksum(path)}
