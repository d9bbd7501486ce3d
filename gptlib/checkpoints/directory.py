"""Checkpoints of models too large for one file: a directory, of which every rank writes its share.

    model_01000.pt/           the name of a file, so that the same commands take both
      state.pt                the dict of a checkpoint file, an empty tensor for each sharded one
      __0_0.distcp, ...       the sharded tensors, files of a rank: see sharded_tensors.py
      .metadata               which file holds which rows
      checksums.json          size and CRC-32 of each of these files

It has another name until all ranks have written, so a directory of that name is whole.
"""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gptlib.checkpoints.verified_file import describe_failure, load_without_executing
from gptlib.common import UserError, crc32_of_file, remove_leftover
from gptlib.distributed import is_sharded, map_named

STATE, CHECKSUMS, METADATA = "state.pt", "checksums.json", ".metadata"
FILE_NAMES = r"state\.pt|\.metadata|__\d+_\d+\.distcp"  # of the files in checksums.json

# -----------------------------------------------------------------------------
# save


def split_sharded(state):
    """({name: DTensor}, a copy of the state with an empty tensor in place of each DTensor).

    The empty tensors lie on the meta device: they have a shape and a dtype, and no numbers. Tied
    tensors, such as the embedding and the head, are saved once, under the name of the first.
    """
    tensors, skeletons = {}, {}

    def replace(leaf, name):
        if not is_sharded(leaf):
            return leaf.detach().to("cpu", copy=True) if torch.is_tensor(leaf) else leaf
        if id(leaf) not in skeletons:
            tensors[name] = leaf.detach()
            skeletons[id(leaf)] = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        return skeletons[id(leaf)]

    return tensors, map_named(state, replace)


def make_empty(folder):
    """Make an empty directory; what a killed process left there is removed."""
    remove_leftover(folder)
    folder.mkdir(parents=True)


def remove_directory(path):
    """Remove a checkpoint directory. It loses its name first: what has the name is always whole.
    """
    leaving = path.with_name(path.name + ".removed")
    remove_leftover(leaving)
    os.replace(path, leaving)
    shutil.rmtree(leaving)


# -----------------------------------------------------------------------------
# load


def is_checkpoint_directory(path):
    return (Path(path) / STATE).is_file()


def read_checkpoint_directory(path, verify=True):
    """What the state.pt of a directory holds, and the directory's path as "directory". Nothing is
    executed.

    The sharded tensors are empty (on the meta device) until `read_tensors` reads them from there.
    Raises UserError if a file is missing or damaged.
    """
    path = Path(path).resolve()
    try:
        if verify:
            verify_files(path)
        checkpoint = load_without_executing(path / STATE, "cpu", mmap=False)
    except UserError:
        raise
    except Exception as error:
        raise not_readable(path, describe_failure(error)) from error
    if not isinstance(checkpoint, dict):
        raise not_readable(path, f"its {STATE} holds no dict")
    return {**checkpoint, "directory": str(path)}


# -----------------------------------------------------------------------------
# verification


def read_checksums(path):
    """{name: {"size", "crc32"}} of a directory's files. Raises UserError for a name that leads
    elsewhere, or if the list is not whole."""
    checksums = json.loads((path / CHECKSUMS).read_bytes())
    if not isinstance(checksums, dict) or not {STATE, METADATA} <= checksums.keys():
        raise not_readable(path, f"its {CHECKSUMS} is no list of its files")
    for name, expected in checksums.items():
        if not re.fullmatch(FILE_NAMES, name):
            raise not_readable(path, f"its {CHECKSUMS} names {name!r}, which is no file of it")
        if not isinstance(expected, dict) or type(expected.get("size")) is not int:
            raise not_readable(path, f"its {CHECKSUMS} has no size for {name!r}")
    return checksums


def verify_files(path):
    """Compare every file with its size and checksum, several at a time. Raises UserError if one
    differs."""
    checksums = read_checksums(path)
    with ThreadPoolExecutor(8) as threads:  # the other ranks wait for rank 0, ten minutes at most
        list(threads.map(lambda item: verify_file(path, *item), checksums.items()))


def verify_file(path, name, expected):
    file = path / name
    if not file.is_file():
        raise damaged(path, name, "it is missing")
    if file.stat().st_size != expected["size"]:
        raise damaged(path, name, f"it has {file.stat().st_size} bytes, expected "
                      f"{expected['size']}")
    if checksum(file) != expected:
        raise damaged(path, name, "its bytes do not match their checksum")


def checksum(path):
    """{"size": bytes, "crc32": of a file}."""
    return {"size": path.stat().st_size, "crc32": crc32_of_file(path)}


def damaged(path, name, reason):
    return not_readable(path, f"its file {name!r} is damaged: {reason}")


def not_readable(path, reason):
    return UserError(f"{str(path)!r} is no checkpoint that can be read: {reason}")


def identity_of_directory(path):
    """Equal if two directories hold the same files: size and CRC-32 of the list of checksums."""
    checksums = Path(path) / CHECKSUMS
    return tuple(checksum(checksums).values()) if checksums.is_file() else None
