"""Checkpoint files: what is damaged is refused, and the record that is damaged is named.

    python -m pytest tests/checkpoints/test_verified_file.py
"""

import copy
import struct
import zipfile

import numpy as np
import pytest
import torch
from interop_helpers import assert_same_nest, training_state

from gptlib.checkpoints import verified_file
from gptlib.checkpoints.formats import load_checkpoint
from gptlib.common import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(its bytes, what is in it, {record name: (offset, size)}, the model's record names) of a
    small checkpoint."""
    path = tmp_path_factory.mktemp("saved") / "model_00003.pt"
    state = training_state()
    torch.save(state, path)
    content = path.read_bytes()
    records = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name_length, extra_length = struct.unpack_from("<HH", content, info.header_offset + 26)
            offset = info.header_offset + 30 + name_length + extra_length
            records[info.filename.partition("/")[2]] = (offset, info.file_size)
    # the model comes first: a record for each of its tensors, but the head, which is the embedding
    n_tensors = len(state["model"]) - 1
    return content, state, records, [f"data/{i}" for i in range(n_tensors)]


def damage(content, start, size, kind, rng):
    """The bytes with `size` of them from `start` on damaged, or None if that changes nothing."""
    damaged = bytearray(content)
    if kind == "flip":
        damaged[start + rng.integers(size)] ^= 1 << rng.integers(8)
    elif kind == "zero":
        damaged[start:start + size] = bytes(size)
    else:
        damaged[start:start + size] = rng.bytes(size)
    return bytes(damaged) if damaged != content else None


@pytest.mark.parametrize("kind", ["flip", "zero", "random"])
def test_every_damaged_record_is_refused(saved, tmp_path, kind):
    """Guards against damaged weights, optimizer state or positions that load in silence: torch.load
    does not look at the checksums."""
    content, _, records, model_records = saved
    rng = np.random.default_rng(0)
    path = tmp_path / "model_00003.pt"
    n_refused = 0
    for name, (offset, size) in records.items():
        damaged = damage(content, offset, size, kind, rng) if size else None
        if damaged is None:
            continue
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is no checkpoint that can be read") as error:
            load_checkpoint(path)
        assert f"'{path}'" in str(error.value)
        assert f"record '{name}'" in str(error.value)
        n_refused += 1
        if name in model_records or not name.startswith("data/"):
            with pytest.raises(UserError, match=f"record '{name}'"):
                load_checkpoint(path, mmap=True)
    assert n_refused > len(model_records) * 2, "the optimizer's records are not among them"


@pytest.mark.parametrize("kind", ["flip", "random"])
def test_mapped_loading_needs_the_model_alone(saved, tmp_path, kind):
    """Guards against inference that reads, or refuses for, the optimizer's state, which is twice
    the weights."""
    content, state, records, model_records = saved
    rng = np.random.default_rng(0)
    path = tmp_path / "model_00003.pt"
    others = [name for name in records if name.startswith("data/") and name not in model_records]
    assert others
    for name in others:
        path.write_bytes(damage(content, *records[name], kind, rng))
        assert_same_nest(load_checkpoint(path, mmap=True)["model"], state["model"])


@pytest.mark.parametrize("mmap", [False, True])
def test_a_damaged_container_is_refused_or_loads_equal(saved, tmp_path, mmap):
    """Guards against a size, name or place of a record that makes another tensor of the same
    bytes."""
    content, state, records, _ = saved
    payload = np.zeros(len(content), dtype=bool)
    for offset, size in records.values():
        payload[offset:offset + size] = True
    rng = np.random.default_rng(1)
    container = np.flatnonzero(~payload)
    directory = container[container > max(offset + size for offset, size in records.values())]
    positions = [*rng.choice(directory, 150, replace=False),
                 *rng.choice(container, 50, replace=False)]
    path = tmp_path / "model_00003.pt"
    n_refused = 0
    for position in positions:
        path.write_bytes(damage(content, position, 1, "flip", rng))
        try:
            checkpoint = load_checkpoint(path, mmap=mmap)
        except UserError:
            n_refused += 1
            continue
        assert_same_nest(checkpoint, state, f"checkpoint with byte {position} changed")
    assert n_refused > 75, "of the directory's fields most matter"


@pytest.mark.parametrize("mmap", [False, True])
def test_a_record_marked_as_a_folder_is_refused(saved, tmp_path, mmap):
    """Guards against one bit of the directory for which torch.load takes uninitialized memory, and
    which zipfile accepts."""
    content, *_ = saved
    content = bytearray(content)
    entry = content.index(b"model_00003/data/2PK") - 46  # the name follows the entry's 46 bytes
    content[entry + 38] |= 0x10
    path = tmp_path / "model_00003.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="'data/2' is damaged: .* says that it is a folder"):
        load_checkpoint(path, mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_compressed_archive_is_refused(saved, tmp_path, mmap):
    """Guards against mapping compressed bytes as weights, if a tool has packed the file anew."""
    content, *_ = saved
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    plain.write_bytes(content)
    with zipfile.ZipFile(plain) as a, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name))
    with pytest.raises(UserError, match="the archive says that it is compressed"):
        load_checkpoint(packed, mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_truncated_files_are_refused(saved, tmp_path, mmap):
    """Guards against more than one line after a disk that filled, or a copy that was cut short."""
    content, *_ = saved
    path = tmp_path / "model_00003.pt"
    for length in [*range(0, len(content), len(content) // 20), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="is no checkpoint that can be read") as error:
            load_checkpoint(path, mmap=mmap)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("mmap", [False, True])
def test_swapped_records_are_refused(saved, tmp_path, mmap):
    """Guards against two entries of the directory that have exchanged their names: every checksum
    is right, but of another tensor's bytes."""
    content, _, records, _ = saved
    first, second = b"/data/2PK", b"/data/3PK"  # in the directory the next entry follows the name
    assert records["data/2"][1] == records["data/3"][1]
    assert content.count(first) == content.count(second) == 1
    swapped = content.replace(first, b"/data/xPK").replace(second, first)
    path = tmp_path / "model_00003.pt"
    path.write_bytes(swapped.replace(b"/data/xPK", second))
    with pytest.raises(UserError, match="File name in directory .* and header .* differ"):
        load_checkpoint(path, mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_checksums_that_were_not_recorded_pass(tmp_path, mmap):
    """Guards against calling a file damaged in which torch was told to write no checksums."""
    state = training_state()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert verified_file.directory_identity(tmp_path / "a.pt") is None
    assert_same_nest(load_checkpoint(tmp_path / "a.pt", mmap=mmap), state)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_in_the_format_of_old_torch_loads(tmp_path, mmap):
    """Guards against refusing files from before torch 1.6, which are no zip archives."""
    state = training_state()
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_same_nest(load_checkpoint(tmp_path / "a.pt", mmap=mmap), state)


def test_without_offsets_every_record_is_verified(saved, tmp_path, monkeypatch):
    """Guards against a damaged record that slips through if torch does not tell which records the
    model uses."""
    content, state, records, model_records = saved
    path = tmp_path / "model_00003.pt"
    rng = np.random.default_rng(0)
    path.write_bytes(damage(content, *records[model_records[-1]], "flip", rng))
    load = verified_file.load_without_executing

    def load_without_offsets(path, device, mmap):
        return copy.deepcopy(state) if device == "meta" else load(path, device, mmap)

    monkeypatch.setattr(verified_file, "load_without_executing", load_without_offsets)
    with pytest.raises(UserError, match=f"record '{model_records[-1]}'"):
        load_checkpoint(path, mmap=True)
