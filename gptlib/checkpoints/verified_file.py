"""Reads the file that torch.save wrote, and verifies every record before it is used.

torch.save writes a zip archive: data.pkl holds the structure, data/0, data/1, ... hold the bytes
of one tensor each. The archive's directory keeps a CRC-32 for every record, and torch.load does
not look at it: without a check, damaged bytes become wrong weights, optimizer state or position in
silence.
"""

import mmap as memory_map
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

from gptlib.common import UserError, first_line

ZIP_SIGNATURE = b"PK\x03\x04"  # as torch.load decides; before torch 1.6 it wrote another format
DOS_FOLDER = 0x10  # the bit of an entry's attributes that says it is a folder
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field


class PickledConfig:
    """Stands in for the GPTConfig that build-nanogpt pickles: it takes the fields and runs
    nothing."""

    NAMES = ("__main__.GPTConfig", "train_gpt2.GPTConfig")


class Record(NamedTuple):
    """A record of the archive: where its bytes lie in the file, and the CRC-32 they should have."""

    name: str
    offset: int
    size: int
    crc: int


def read_checkpoint_file(path, mmap=False, model_only=False):
    """The object that was saved at `path`, its tensors in CPU memory; nothing in the file is
    executed.

    With mmap the tensors are mapped: one is read from disk when it is first used. With model_only
    the tensors outside of the entry "model" are not verified, and must not be used. Raises
    UserError naming the file, and the record where one is damaged.
    """
    path = Path(path)
    try:
        is_zip = has_zip_signature(path)
        if is_zip:
            verify_records(path, model_only)
        return load_without_executing(path, "cpu", mmap and is_zip)
    except UserError:
        raise
    except Exception as error:  # torch raises something else for each kind of damage
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
    """(size, CRC-32 of the archive's directory): equal where two files hold the same records.

    The directory holds the checksum of every record. None where the file is no archive or records
    no checksums.
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
    except Exception:  # whatever is wrong with the file is reported by those who load it
        return None


# -----------------------------------------------------------------------------
# verification


def verify_records(path, model_only=False):
    """Compare the records of an archive with their checksums; with model_only, of the tensors the
    model's alone."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        with memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_READ) as content:
            infos = archive.infolist()
            records = read_directory(path, infos, content)
            if not has_checksums(infos):
                return
            tensors = [record for record in records if record.name.startswith("data/")]
            others = [record for record in records if not record.name.startswith("data/")]
            # the structure first: it says which tensors the model has
            verify_checksums(path, others, content)
            if model_only:
                tensors = select_model_records(path, tensors)
            verify_checksums(path, tensors, content)


def has_checksums(infos):
    """torch.serialization.set_crc32_options(False) writes 0 for every record: that means "not
    recorded"."""
    return any(info.CRC != 0 for info in infos)


def read_directory(path, infos, content):
    """The records of an archive. Raises UserError where the directory contradicts itself or the
    record's own header."""
    records, names = [], set()
    for info in infos:
        name = info.orig_filename
        record_name = name.partition("/")[2]  # after the folder that all records lie in
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise damaged(path, record_name, "the archive says that it is compressed")
        if info.external_attr & DOS_FOLDER:  # torch.load would return uninitialized memory
            raise damaged(path, record_name, "the archive says that it is a folder")
        if name in names:
            raise damaged(path, record_name, "the archive has two of that name")
        names.add(name)

        start = info.header_offset
        end = start + LOCAL_HEADER.size
        if not 0 <= start <= end <= len(content):
            raise damaged(path, record_name, "it lies outside of the file")
        signature, name_length, extra_length = LOCAL_HEADER.unpack(content[start:end])
        if signature != ZIP_SIGNATURE or content[end:end + name_length] != name.encode():
            raise damaged(path, record_name, "its header is not where the archive's directory says")
        offset = end + name_length + extra_length
        if offset + info.file_size > len(content):
            raise damaged(path, record_name, "it reaches past the end of the file")
        records.append(Record(record_name, offset, info.file_size, info.CRC))
    return records


def verify_checksums(path, records, content):
    with memoryview(content) as view:
        for record in records:
            with view[record.offset:record.offset + record.size] as payload:
                if zlib.crc32(payload) != record.crc:
                    raise damaged(path, record.name, "its bytes do not match their checksum")


def select_model_records(path, records):
    """Of the tensors' records those that the checkpoint's "model" uses; all of them where that
    can't be told.

    On the meta device torch.load reads no tensor, and notes for each where its bytes begin in the
    file.
    """
    checkpoint = load_without_executing(path, "meta", mmap=False)
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict):
        return records
    by_offset = {record.offset: record for record in records if record.size > 0}
    selected = {}
    for tensor in model.values():
        if not torch.is_tensor(tensor):
            return records  # something nested: not a model that we know
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            continue
        record = by_offset.get(getattr(storage, "_checkpoint_offset", None))
        if record is None or record.size != storage.nbytes():
            return records
        selected[record.offset] = record
    return list(selected.values())


def damaged(path, record_name, reason):
    return UserError(f"{str(path)!r} is no checkpoint that can be read: "
                     f"its record {record_name!r} is damaged: {reason}")
