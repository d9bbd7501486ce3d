"""A dataset directory: shards of uint16 tokens and meta.json."""

import io
import json
import os
import threading
import zlib
from pathlib import Path

import numpy as np

from gptlib.common import UserError, atomic_write, crc32_of_file, first_line

# np.load parses a header as Python code. Python 3.11's parser counts its depth for all threads
# together, and now and then fails where two threads parse: "recursion depth mismatch".
npy_lock = threading.Lock()

WRITTEN_AT_ONCE = 2**19  # tokens of a shard
LLM_C_HEADER = [20240520, 1]  # magic number and version of llm.c's .bin shards


def list_shards(data_root, split):
    """Sorted paths of the "train" or "val" shards of a dataset directory.

    They are .npy, or .bin as llm.c writes it.
    """
    root = Path(data_root)
    found = [*root.glob(f"*_{split}_*.npy"), *root.glob(f"*_{split}_*.bin")]
    return sorted(found)


def open_shard(path):
    """Memory-map a shard as a 1-D uint16 array. Raises UserError for anything but a whole shard.

    A .bin has a header of 256 int32 (magic number, version, number of tokens), then the tokens, as
    in llm.c.
    """
    path = Path(path)
    tokens = None
    try:
        if path.suffix == ".npy":
            with npy_lock:
                tokens = np.load(path, mmap_mode="r")
            found, expected = f"{tokens.ndim}-D {tokens.dtype}", "1-D uint16"
        else:
            tokens, found, expected = open_bin(path)
    except Exception as error:  # numpy raises something else for each kind of damaged header
        found, expected = first_line(error), "a whole shard"
    if tokens is None or tokens.ndim != 1 or tokens.dtype != np.uint16:
        raise UserError(f"{path}: {found}; expected {expected}. Make it again with "
                        "python fineweb.py (see --help)")
    return tokens


def open_bin(path):
    """Map a .bin. Returns (tokens, or None if it is damaged; what was found; what was expected)."""
    header = np.fromfile(path, dtype="<i4", count=256).tolist()
    found = f"header {header[:2]}, {path.stat().st_size} bytes"
    if len(header) < 256:
        return None, found, f"llm.c's header {LLM_C_HEADER}"
    num_tokens = header[2]
    expected = f"header {LLM_C_HEADER}, {1024 + 2 * num_tokens} bytes"
    if found != expected:
        return None, found, expected
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(num_tokens,))
    return tokens, found, expected


def npy_header(tokens):
    """The bytes before the data of a .npy file."""
    buffer = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(tokens)
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def save_shard(path, tokens):
    """Write uint16 tokens as .npy, whole or not at all."""
    def write(f):
        # The same bytes as np.save writes, which does not tell why a write failed.
        f.write(npy_header(tokens))
        for i in range(0, len(tokens), WRITTEN_AT_ONCE):
            f.write(tokens[i:i + WRITTEN_AT_ONCE].data)
            start_writing(f)
    atomic_write(path, write)


def start_writing(f):
    """Tell the disk to begin writing what f holds, and to free the cache of what is written.

    Otherwise a shard fills fresh memory of the disk cache, which takes three times as long as using
    the same memory again, and nothing reaches the disk before the end.
    """
    if hasattr(os, "posix_fadvise"):  # Linux
        f.flush()
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -----------------------------------------------------------------------------
# checksums
#
# CRC-32 of the whole file, as torch.save keeps for its records. It guards against damage by disks
# and copies, not against attackers, who would change meta.json as well: it finds any damage within
# 32 bits, and misses one in 4 billion of the others. One core reads 3.3 GB/s; with SHA-256, 1.2.


def shard_checksum(tokens):
    """The checksum of the file that save_shard makes of these tokens: 8 hexadecimal digits."""
    return f"{zlib.crc32(tokens.data, zlib.crc32(npy_header(tokens))):08x}"


def file_checksum(path):
    """The checksum of a file, in the same form."""
    return f"{crc32_of_file(path):08x}"


def checksums_of(meta):
    """{file name: checksum} of the shards for which meta.json keeps one.

    meta: as read_meta returns it. Datasets of the original script and of llm.c have no checksums.
    """
    shards = meta.get("shards", [])
    return {shard["name"]: shard["crc32"] for shard in shards if "crc32" in shard}


def verify_shard(path, checksum=None):
    """Raise UserError if a shard is damaged: if its bytes do not have the checksum.

    checksum: as checksums_of returns it. Without one, the format and the length are checked.
    """
    open_shard(path)
    if checksum is None:
        return
    try:
        found = file_checksum(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error
    if found != checksum:
        raise UserError(f"{path}: damaged; its CRC-32 is {found}, was {checksum} when it was made")


# -----------------------------------------------------------------------------
# meta.json


def read_meta(data_root):
    """The contents of meta.json as a dict, empty if there is no such file. Raises UserError."""
    path = Path(data_root) / "meta.json"
    try:
        meta = dict(json.loads(path.read_bytes()))
        check_meta(meta)
        return meta
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path} ({error}): remove {data_root} and make the dataset "
                        "again") from error


def tokens_per_byte(meta, split):
    """Tokens for each byte of text in a split: turns nats per token into bits per byte.

    meta: as read_meta returns it. None if it does not tell.
    """
    n_tokens, n_bytes = (meta.get(key, {}).get(split) for key in ("tokens", "bytes"))
    return n_tokens / n_bytes if n_tokens and n_bytes else None


def write_meta(data_root, meta):
    """Write meta.json, whole or not at all."""
    text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
    atomic_write(Path(data_root) / "meta.json", lambda f: f.write(text.encode()))


def check_meta(meta):
    """Raise ValueError if meta.json has another form than this program writes.

    It has settings only if fineweb.py made the dataset, which then needs the rest to continue.
    """
    forms = {"tokenizer": str, "shards": list, "tokens": dict, "bytes": dict, "settings": dict}
    for key, form in forms.items():
        if not isinstance(meta.get(key, form()), form):
            raise ValueError(f"{key} is {meta[key]!r}")
    is_ours = "settings" in meta
    missing = {"trained_within", "order", "shards"} - meta.keys()
    if is_ours and missing:
        raise ValueError(f"{' and '.join(sorted(missing))} is missing")
    counts = {"tokens", "bytes", "documents", "empty", "repaired", "begun"} if is_ours else set()
    for shard in meta.get("shards", []):
        has_name = isinstance(shard, dict) and isinstance(shard.get("name"), str)
        if not has_name or not all(isinstance(shard.get(key), int) for key in counts):
            raise ValueError(f"one of the shards is {shard!r}")
    for key in ("tokens", "bytes"):
        if not all(isinstance(count, int) for count in meta.get(key, {}).values()):
            raise ValueError(f"{key} is {meta[key]!r}")
