"""The sharded tensors of a checkpoint directory, written and read by torch.distributed.checkpoint.

Importing that takes seconds, so whoever needs this module imports it when it is needed.
"""

import errno
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (ChunkStorageMetadata, Metadata, MetadataIndex,
                                                   TensorProperties, TensorStorageMetadata)

from gptlib.checkpoints.directory import (CHECKSUMS, METADATA, STATE, checksum, make_empty,
                                          not_readable, read_checksums, remove_directory,
                                          split_sharded)
from gptlib.common import UserError, first_line, sync_directory, write_synced
from gptlib.distributed import map_named

# -----------------------------------------------------------------------------
# save


class DirectoryWriter:
    """One checkpoint on its way to the disk. Collective: every rank makes one and calls finish().

    __init__ copies the tensors to CPU memory; finish(), which a thread can call, writes them.
    frozen: nothing changes the tensors until then, so those in CPU memory are not copied.
    process_group: a group for these threads alone, with a CPU backend.
    """

    def __init__(self, path, state, process_group, frozen=False):
        self.path, self.group = Path(path), process_group
        self.tmp = self.path.with_name(self.path.name + ".tmp")
        self.rank = dist.get_rank(process_group)
        self.tensors, self.skeleton = split_sharded(state)
        for name, tensor in self.tensors.items():
            if tensor.device.type != "cpu":
                self.tensors[name] = tensor.to("cpu")
            elif not frozen:
                self.tensors[name] = tensor.clone()
        error = report(lambda: make_empty(self.tmp)) if self.rank == 0 else None
        self.errors = self.share(error)

    def finish(self, publish):
        """Give the directory its name when all ranks have written their files, and call publish()
        on rank 0. Returns the path.

        Raises UserError on all ranks if one of them could not write.
        """
        self.raise_any(self.errors)
        self.raise_any(self.share(report(self.write_tensors)))
        mine = {}
        error = report(lambda: mine.update(self.checksums_of(f"__{self.rank}_*")))
        self.raise_any(self.share(error))
        checksums = {name: value for of_rank in self.share(mine) for name, value in of_rank.items()}
        error = report(lambda: self.complete(checksums, publish)) if self.rank == 0 else None
        self.raise_any(self.share(error))
        return self.path

    def write_tensors(self):
        # not async_save, which holds two copies of each sharded tensor in CPU memory
        writer = dcp.FileSystemWriter(self.tmp, per_thread_copy_ahead=0)
        dcp.save(self.tensors, process_group=self.group, storage_writer=writer)

    def checksums_of(self, pattern):
        return {path.name: checksum(path) for path in self.tmp.glob(pattern)}

    def complete(self, checksums, publish):
        """Write rank 0's files, and give the directory its name."""
        for name in checksums:
            if not (self.tmp / name).is_file():
                raise OSError(errno.ENOENT, f"{name} of another process is not in {self.tmp}")
        write_synced(self.tmp / STATE, lambda file: torch.save(self.skeleton, file))
        checksums |= self.checksums_of(STATE) | self.checksums_of(METADATA)
        text = json.dumps(checksums, indent=1).encode()
        write_synced(self.tmp / CHECKSUMS, lambda file: file.write(text))
        sync_directory(self.tmp)
        if self.path.exists():  # the run was here before, and was resumed from an earlier step
            remove_directory(self.path)
        os.replace(self.tmp, self.path)
        sync_directory(self.path.parent)
        publish()

    def share(self, value):
        """The values of all ranks, as a list on every rank."""
        values = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def raise_any(self, errors):
        """Raise a UserError with the first of the ranks' error texts, if there is one."""
        failed = [text for text in errors if text]
        if failed:
            if self.rank == 0:
                shutil.rmtree(self.tmp, ignore_errors=True)
            raise UserError(f"cannot write {self.path}: {failed[0]}. Make room or choose another "
                            "place; what was there before is intact")


def report(function):
    """Call function(); returns None, or one line that says which process failed and why."""
    try:
        function()
    except (Exception, CheckpointException) as error:  # a failed save must not end the run
        failures = getattr(error, "failures", {dist.get_rank(): error})
        rank, cause = next(iter(failures.items()))
        return f"process {rank}: {describe(cause)}"


def describe(error):
    """The cause of an error in one line. torch wraps it in its own exceptions."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))
    if isinstance(error, tuple):  # (exception, where it was raised)
        error = error[0]
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return getattr(error, "strerror", None) or first_line(error)


# -----------------------------------------------------------------------------
# load


def fill_checkpoint(checkpoint, model_only=False):
    """Read the empty tensors of a checkpoint of read_checkpoint_directory into CPU memory.

    With model_only the tensors of the optimizers stay empty. Raises UserError if they are larger
    than the files that should hold them, before any memory is taken.
    """
    directory = checkpoint.pop("directory")
    tensors, shapes = {}, {}

    def find_empty(leaf, name):
        wanted = name.startswith("model.") or not model_only
        if torch.is_tensor(leaf) and leaf.is_meta and wanted:
            shapes.setdefault(id(leaf), (name, leaf))  # tied tensors have the name of the first
        return leaf

    map_named(checkpoint, find_empty)
    needed = sum(leaf.numel() * leaf.element_size() for _, leaf in shapes.values())
    available = sum(entry["size"] for entry in read_checksums(Path(directory)).values())
    if needed > available:
        raise not_readable(directory, f"its tensors take {needed:,} bytes, its files {available:,}")
    filled = {}
    for key, (name, leaf) in shapes.items():
        tensors[name] = filled[key] = torch.empty_like(leaf, device="cpu")
    checkpoint |= map_named(checkpoint, lambda leaf, name: filled.get(id(leaf), leaf))
    read_tensors(directory, tensors)
    return checkpoint


def read_tensors(directory, tensors):
    """Fill tensors, {name: tensor}, from a checkpoint directory; a rank reads its own rows of a
    DTensor. Raises UserError if a shape differs."""
    try:
        reader = SafeReader(directory)
        with warnings.catch_warnings():  # torch warns that a process reads for itself
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:
        raise UserError(f"{str(directory)!r} cannot be loaded: {describe(error)}") from error


# -----------------------------------------------------------------------------
# .metadata, a pickle that says which rows of which tensor lie where


class SafeReader(dcp.FileSystemReader):
    """torch's reader, with metadata that is made anew of the plain values in .metadata.

    torch would call what the pickle names, unpickle whatever it calls "bytes" without
    weights_only, and read any path that it gives.
    """

    def __init__(self, directory):
        super().__init__(directory)
        with open(self.path / METADATA, "rb") as file:
            found = MetadataUnpickler(file).load()
        self.metadata = rebuild_metadata(found, read_checksums(self.path))

    def read_metadata(self, *args, **kwargs):
        return self.metadata


class StandIn:
    """Stands in for a class or function that .metadata names: it keeps what it is given."""

    def __init__(self, *args):
        self.state = None

    def __setstate__(self, state):
        self.state = state


class MetadataUnpickler(pickle.Unpickler):
    """Makes a new StandIn of each class and function that torch's metadata needs, and calls
    nothing: a pickle can neither run nor change the real ones."""

    RECORDS = {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    }
    ALLOWED = {
        ("builtins", "getattr"),  # as which Python 3.11.2 pickles the members of an enum
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(("torch.distributed.checkpoint.metadata", name) for name in sorted(RECORDS)),
    }

    def find_class(self, module, name):
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in self.ALLOWED:
            return type(name, (StandIn,), {})
        raise pickle.UnpicklingError(f"it asks for {module}.{name} to be run, which is refused")


def rebuild_metadata(found, files):
    """torch's Metadata of a StandIn for it: shapes, and the rows that lie in `files` alone.

    Raises UnpicklingError, KeyError or TypeError for anything else.
    """
    fields = fields_of(found, "Metadata")
    tensors, places = {}, {}
    for name, entry in fields["state_dict_metadata"].items():
        entry = fields_of(entry, "TensorStorageMetadata")
        size = torch.Size(entry["size"])
        chunks = [fields_of(chunk, "ChunkStorageMetadata") for chunk in entry["chunks"]]
        chunks = [ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"]))
                  for chunk in chunks]
        require_all_rows(name, size, chunks)
        tensors[name] = TensorStorageMetadata(TensorProperties(), size, chunks)
    for index, place in fields["storage_data"].items():
        index, place = fields_of(index, "MetadataIndex"), fields_of(place, "_StorageInfo")
        if place["relative_path"] not in files:
            raise pickle.UnpicklingError(f"its {METADATA} names a file that is not of the "
                                         f"checkpoint: {place['relative_path']!r}")
        index = MetadataIndex(index["fqn"], torch.Size(index["offset"]), index["index"])
        places[index] = _StorageInfo(place["relative_path"], place["offset"], place["length"])
    return Metadata(tensors, storage_data=places)


def fields_of(record, name):
    """The fields, a dict, of the StandIn for a record of torch's with this name."""
    if type(record).__name__ != name or not isinstance(record.state, dict):
        raise pickle.UnpicklingError(f"its {METADATA} holds a {type(record).__name__}, expected "
                                     f"{name}")
    return record.state


def require_all_rows(name, size, chunks):
    """Raise UnpicklingError unless the chunks together are the rows of a tensor: rows that none
    holds would be what was in memory before."""
    next_row = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets):
        if chunk.offsets[0] == next_row and chunk.sizes[1:] == size[1:] and not any(
                chunk.offsets[1:]):
            next_row += chunk.sizes[0]
    if next_row != size[0]:
        raise pickle.UnpicklingError(f"its {METADATA} does not hold all rows of {name}")
