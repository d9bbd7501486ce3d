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
# together, and now and then fails if two threads parse: "recursion depth mismatch".
npy_lock = threading.Lock()

WRITTEN_AT_ONCE = 2**19  # tokens of a shard
LLM_C_HEADER = [20240520, 1]  # magic number and version of llm.c's .bin shards


def list_shards(data_root, split):
    """Sorted paths of the "train" or "val" shards of a dataset directory.

    They are .npy, or .bin as llm.c writes it; tiny_shakespeare_train.bin of its starter pack has no
    number.
    """
    patterns = (f"*_{split}_*.npy", f"*_{split}_*.bin", f"*_{split}.bin")
    return sorted(path for pattern in patterns for path in Path(data_root).glob(pattern))


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
        # np.save would write the same bytes, but does not say why a write failed.
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

MAX_JSON = 2**28  # bytes; a meta.json of a million shards has as many


def read_json(path):
    """The contents of a JSON file that a stranger may have made. Raises OSError or ValueError."""
    size = os.path.getsize(path)
    if size > MAX_JSON:
        raise ValueError(f"{size} bytes, expected at most {MAX_JSON}")
    try:
        return json.loads(Path(path).read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_meta(data_root):
    """The contents of meta.json as a dict, empty if there is no such file. Raises UserError."""
    path = Path(data_root) / "meta.json"
    try:
        meta = dict(read_json(path))
        check_meta(meta)
        return meta
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}): remove it and the shards "
                        "beside it, and make the dataset again") from error


def tokens_per_byte(meta, split):
    """Tokens for each byte of text in a split: turns nats per token into bits per byte.

    meta: as read_meta returns it. None if it does not tell.
    """
    n_tokens, n_bytes = (meta.get(key, {}).get(split) for key in ("tokens", "bytes"))
    return n_tokens / n_bytes if n_tokens and n_bytes else None


def write_meta(data_root, meta):
    """Write meta.json, whole or not at all."""
    text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
    # a path may hold bytes that are no UTF-8: JSON spells them \udcXX, and reads them so again
    data = text.encode(errors="backslashreplace")
    atomic_write(Path(data_root) / "meta.json", lambda f: f.write(data))


def check_meta(meta):
    """Raise ValueError if meta.json has another form than this program writes.

    It has settings only if fineweb.py made the dataset, which then needs the rest to continue;
    "ready" only if it fetched the shards.
    """
    forms = {"tokenizer": str, "source": str, "shards": list, "tokens": dict, "bytes": dict,
             "settings": dict, "hub": dict, "ready": dict}
    for key, form in forms.items():
        if not isinstance(meta.get(key, form()), form):
            raise ValueError(f"{key} is {meta[key]!r:.200}")
    needed, counts = set(), set()
    if "settings" in meta:
        needed = {"trained_within", "order", "shards", "tokens", "bytes"}
        counts = {"tokens", "bytes", "documents", "empty", "repaired", "begun"}
        if type(meta["settings"].get("shard_size")) is not int:
            raise ValueError(f"settings is {meta['settings']!r:.200}")
    elif "ready" in meta:
        needed, counts = {"shards", "tokens", "bytes"}, {"tokens", "bytes"}
    missing = needed - meta.keys()
    if missing:
        raise ValueError(f"{' and '.join(sorted(missing))} is missing")
    for shard in meta.get("shards", []):
        check_shard_record(shard, counts)
    for key in ("tokens", "bytes"):
        found = meta.get(key, {"train": 0, "val": 0})
        if not all(isinstance(found.get(split), int) for split in ("train", "val")):
            raise ValueError(f"{key} is {meta[key]!r:.200}")
    for key in {"hub", "ready"} & meta.keys():
        check_hub_record(meta[key], key)


def check_shard_record(shard, counts):
    """Raise ValueError unless it is a dict with a plain name and whole numbers for `counts`."""
    has_name = isinstance(shard, dict) and isinstance(shard.get("name"), str)
    if not has_name or not all(isinstance(shard.get(key), int) for key in counts):
        raise ValueError(f"one of the shards is {shard!r:.200}")
    if not is_relative_path(shard["name"]) or "/" in shard["name"]:
        raise ValueError(f"a shard is called {shard['name']!r:.200}, which is no plain name")


def check_hub_record(record, key):
    """Raise ValueError unless it names a commit of the Hub and paths within that repository."""
    files, sizes = record.get("files", []), record.get("sizes", [])
    are_paths = isinstance(files, list) and all(map(is_relative_path, files))
    if not are_paths or not isinstance(record.get("revision"), str):
        raise ValueError(f"{key} is {record!r:.200}")
    if key == "ready":
        are_sizes = isinstance(sizes, list) and all(isinstance(size, int) for size in sizes)
        if not are_sizes or len(sizes) != len(files) or not isinstance(record.get("dataset"), str):
            raise ValueError(f"{key} is {record!r:.200}")


def is_relative_path(name):
    """Whether `name`, read from a file of a stranger, is a path that stays within a folder."""
    return (isinstance(name, str) and not set(name) & set("\\:\0")
            and not {"", ".", ".."} & set(name.split("/")))


def is_fineweb_edu(data_root, meta):
    """Whether a dataset's val split is FineWeb-Edu's, which published figures are about."""
    if "source" in meta:
        return meta["source"].startswith("HuggingFaceFW/fineweb-edu,")
    # what build-nanogpt, llm.c and modded-nanogpt call theirs
    prefixes = ("edufineweb_", "edu_fineweb_", "finewebedu_")
    return any(path.name.startswith(prefixes) for path in list_shards(data_root, "val"))
