"""A dataset directory: shards of uint16 tokens and meta.json."""

import json
from pathlib import Path

import numpy as np

from gptlib.common import UserError, atomic_write

LLM_C_HEADER = [20240520, 1]  # magic number and version of llm.c's .bin shards


def list_shards(data_root, split):
    """Sorted paths of the "train" or "val" shards of a dataset directory.

    They are .npy, or .bin as llm.c writes it.
    """
    root = Path(data_root)
    found = [*root.glob(f"*_{split}_*.npy"), *root.glob(f"*_{split}_*.bin")]
    return sorted(found)


def open_shard(path):
    """Memory-map a shard as a 1-D uint16 array. Raises UserError for whatever is not a whole shard.

    A .bin has a header of 256 int32 (magic number, version, number of tokens), then the tokens, as
    in llm.c.
    """
    path = Path(path)
    tokens = None
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r")
            found, expected = f"{tokens.ndim}-D {tokens.dtype}", "1-D uint16"
        else:
            tokens, found, expected = open_bin(path)
    except (OSError, ValueError, EOFError) as error:
        found, expected = error, "a whole shard"
    if tokens is None or tokens.ndim != 1 or tokens.dtype != np.uint16:
        raise UserError(f"{path}: {found}; expected {expected}. Make it again with "
                        "python fineweb.py (see --help)")
    return tokens


def open_bin(path):
    """Returns (memory-mapped tokens or None, what was found, what was expected)."""
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


def save_shard(path, tokens):
    """Write uint16 tokens as .npy, whole or not at all."""
    def write(f):
        # The two parts of np.save, which itself does not tell why a write failed.
        header = np.lib.format.header_data_from_array_1_0(tokens)
        np.lib.format.write_array_header_1_0(f, header)
        f.write(tokens.data)
    atomic_write(path, write)


def read_meta(data_root):
    """The contents of meta.json as a dict, empty where there is no such file."""
    path = Path(data_root) / "meta.json"
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path} ({error}): remove {data_root} and make the dataset "
                        "again") from error
