"""Reads the file that torch.save wrote, and verifies every record before it is used.

torch.save writes a zip archive: data.pkl holds the structure, data/0, data/1, ... hold the bytes
of one tensor each. The archive's directory keeps a CRC-32 of every record, and torch.load does
not compare it: without a check, damaged bytes would become wrong weights, optimizer state or
position in silence.
"""

import bisect
import pickle
import re
import zipfile
import zlib
from pathlib import Path

import torch

from gptlib.common import UserError, first_line

ZIP_SIGNATURE = b"PK\x03\x04"  # by which torch.load tells; before torch 1.6 it wrote another format
DOS_FOLDER = 0x10  # the bit of an entry's attributes that marks a folder
CHUNK = 1 << 20  # bytes of a record that are read at a time


class PickledConfig:
    """Takes the fields of the GPTConfig that build-nanogpt pickles, and runs nothing."""

    NAMES = ("__main__.GPTConfig", "train_gpt2.GPTConfig")


def read_checkpoint_file(path, mmap=False, model_only=False):
    """The object that was saved at `path`, its tensors in CPU memory. Nothing in the file is
    executed.

    With mmap the tensors are mapped: a tensor is read from disk when it is first used. With
    model_only the tensors outside of the entry "model" are not verified, and must not be used.
    Raises UserError, which names the file and a damaged record.
    """
    path = Path(path)
    try:
        is_zip = has_zip_signature(path)
        if is_zip:
            verify_records(path, model_only)
        return load_without_executing(path, "cpu", mmap and is_zip)
    except UserError:
        raise
    except Exception as error:  # torch raises a different one for each kind of damage
        reason = describe_failure(error)
        raise UserError(f"{str(path)!r} is no checkpoint that can be read: {reason}") from error


def load_without_executing(path, device, mmap):
    stand_ins = [(PickledConfig, name) for name in PickledConfig.NAMES]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)


def describe_failure(error):
    """Why a file could not be read, in one line."""
    forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
    if forbidden:
        return (f"it asks for {forbidden[1]} to be run, which is refused; "
                "only tensors and plain values are read")
    if isinstance(error, pickle.UnpicklingError):
        return "torch.save has not written it"
    if isinstance(error, zipfile.BadZipFile):
        return f"it is truncated or damaged ({first_line(error)})"
    return first_line(error)


def has_zip_signature(path):
    with open(path, "rb") as file:
        return file.read(len(ZIP_SIGNATURE)) == ZIP_SIGNATURE


def directory_identity(path):
    """(size, CRC-32 of the archive's directory): equal if two files hold the same records.

    The directory holds the checksum of every record. None if the file is no archive or has no
    checksums.
    """
    try:
        if not has_zip_signature(path):
            return None
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            if not has_checksums(archive.infolist()):
                return None
            file.seek(archive.start_dir)
            directory = file.read()
            return file.tell(), zlib.crc32(directory)
    except Exception:  # load_checkpoint reports what is wrong with the file
        return None


# -----------------------------------------------------------------------------
# verification


def verify_records(path, model_only=False):
    """Compare every record of an archive with its header and its checksum; with model_only, read
    none of the tensors that the model does not use."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        for info in infos:
            verify_record(path, archive, info, read=False)
        if not has_checksums(infos):
            return
        tensors = [info for info in infos if name_of_record(info).startswith("data/")]
        # the structure first: it says which tensors the model uses
        for info in infos:
            if info not in tensors:
                verify_record(path, archive, info)
        if model_only:
            tensors = select_model_records(path, infos, tensors)
        for info in tensors:
            verify_record(path, archive, info)


def has_checksums(infos):
    """Whether the archive has checksums: torch.serialization.set_crc32_options(False) writes 0 for
    every record."""
    return any(info.CRC != 0 for info in infos)


def name_of_record(info):
    return info.orig_filename.partition("/")[2]  # all records lie in one folder


def verify_record(path, archive, info, read=True):
    """Raise UserError unless a record is what its header and the archive's directory say.

    zipfile compares the two names and, when the record has been read, the checksum. It accepts
    what the first two checks refuse: for a record that is marked as a folder torch.load returns
    uninitialized memory, and of a compressed record it would map the compressed bytes.
    """
    try:
        if info.external_attr & DOS_FOLDER:
            raise zipfile.BadZipFile("the archive says that it is a folder")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise zipfile.BadZipFile("the archive says that it is compressed")
        with archive.open(info) as record:
            while read and record.read1(CHUNK):
                pass
    except Exception as error:  # zipfile raises a different one for each kind of damage
        raise UserError(f"{str(path)!r} is no checkpoint that can be read: its record "
                        f"{name_of_record(info)!r} is damaged: {first_line(error)}") from error


def select_model_records(path, infos, tensors):
    """Of the tensors' records those that the checkpoint's "model" uses, or all of them if torch
    does not tell.

    On the meta device torch.load reads no tensor, and notes where the bytes of each begin in the
    file.
    """
    checkpoint = load_without_executing(path, "meta", mmap=False)
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict):
        return tensors
    infos = sorted(infos, key=lambda info: info.header_offset)
    starts = [info.header_offset for info in infos]
    selected = {}
    for tensor in model.values():
        if not torch.is_tensor(tensor):
            return tensors  # something nested, which is no model that we know
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            continue
        # the record that holds these bytes is the last one that begins before them
        offset = getattr(storage, "_checkpoint_offset", None) or 0
        info = infos[max(bisect.bisect(starts, offset) - 1, 0)]
        if info not in tensors or info.file_size != storage.nbytes():
            return tensors
        selected[info.header_offset] = info
    return list(selected.values())
