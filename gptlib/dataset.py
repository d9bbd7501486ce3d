"""A dataset directory: shards of uint16 tokens and meta.json."""

import json
from pathlib import Path

import numpy as np

from gptlib.common import UserError, atomic_write


def list_shards(data_root, split):
    """Sorted paths of the "train" or "val" shards of a dataset directory: .npy, or .bin as llm.c writes it."""
    return sorted(path for kind in ("npy", "bin") for path in Path(data_root).glob(f"*_{split}_*.{kind}"))


def open_shard(path):
    """Memory-map a shard as a 1-D uint16 array. Raises UserError for whatever is not a whole shard.

    A .bin has a header of 256 int32 (magic 20240520, version 1, number of tokens), then the tokens, as in llm.c.
    """
    path, tokens = Path(path), None
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r")
            found, expected = f"{tokens.ndim}-D {tokens.dtype}", "1-D uint16"
        else:
            header = np.fromfile(path, dtype="<i4", count=256).tolist()
            found, expected = f"header {header[:2]}, {path.stat().st_size} bytes", "llm.c's header [20240520, 1]"
            if len(header) == 256:
                expected = f"header [20240520, 1], {1024 + 2 * header[2]} bytes"
                if found == expected:
                    tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(header[2],))
    except (OSError, ValueError, EOFError) as error:
        found, expected = error, "a whole shard"
    if tokens is None or tokens.ndim != 1 or tokens.dtype != np.uint16:
        raise UserError(f"{path}: {found}; expected {expected}. Make it again with python fineweb.py (see --help)")
    return tokens


def save_shard(path, tokens):
    """Write uint16 tokens as .npy, whole or not at all."""
    def write(f):  # np.save would not say why a write fell short
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(tokens))
        f.write(tokens.data)
    atomic_write(path, write)


def read_meta(data_root):
    """The contents of meta.json as a dict, empty where there is none."""
    path = Path(data_root) / "meta.json"
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path} ({error}): remove {data_root} and make the dataset again") from error
