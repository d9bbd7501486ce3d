"""The campaign: checkpoints, shards and the files beside them, damaged in every way at every
record.

    python -m pytest tests/campaign/test_campaign_damage.py -m campaign

Damaged bytes must be refused by a line that names the file, or change nothing of what is read.
"""

import itertools
import zipfile
from pathlib import Path

import campaign
import pytest
import torch
from campaign import scaled
from conftest import TINY, flags, run

from gptlib.checkpoints.formats import load_checkpoint
from gptlib.checkpoints.start import load_start
from gptlib.common import UserError
from gptlib.data.shards import checksums_of, read_meta, tokens_per_byte, verify_shard
from gptlib.data.loader import TokenLoader
from gptlib.distributed import World
from gptlib.data.tokenizer import load_tokenizer

pytestmark = campaign.marks
rng, progress = campaign.rng, campaign.progress

# -----------------------------------------------------------------------------
# damage to bytes begin..end of a file


def flip_bit(data, begin, end, rng):
    i = rng.randrange(begin, end)
    return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1:]


def zero(data, begin, end, rng):
    n = min(end - begin, rng.choice([1, 16, 4096]))
    i = rng.randrange(begin, end - n + 1)
    return data[:i] + bytes(n) + data[i + n:]


def scramble(data, begin, end, rng):
    n = min(end - begin, rng.choice([1, 16, 4096]))
    i = rng.randrange(begin, end - n + 1)
    return data[:i] + rng.randbytes(n) + data[i + n:]


def truncate(data, begin, end, rng):
    return data[:rng.randrange(begin, end)]


def remove(data, begin, end, rng):
    i = rng.randrange(begin, end)
    return data[:i] + data[i + rng.randint(1, 64):]


def insert(data, begin, end, rng):
    i = rng.randrange(begin, end)
    return data[:i] + rng.randbytes(rng.randint(1, 64)) + data[i:]


def swap(data, begin, end, rng):
    """Exchange the two halves of a piece, as a disk that writes blocks to each other's places."""
    middle = (begin + end) // 2
    end = 2 * middle - begin
    return data[:begin] + data[middle:end] + data[begin:middle] + data[end:]


def overwrite(data, begin, end, rng):
    """Let a piece come from elsewhere in the same file."""
    n = end - begin
    i = rng.randrange(0, len(data) - n + 1)
    return data[:begin] + data[i:i + n] + data[end:]


KINDS = [flip_bit, zero, scramble, truncate, remove, insert, swap, overwrite]


def parts_of_archive(path):
    """[(name, begin, end)]: each record's header and bytes, its entry in the directory, the end."""
    parts = []
    with zipfile.ZipFile(path) as archive:
        infos, size = archive.infolist(), Path(path).stat().st_size
        starts = sorted(info.header_offset for info in infos) + [archive.start_dir]
        for info in infos:
            following = starts[starts.index(info.header_offset) + 1]
            data = following - info.file_size - 64  # about: header and padding come first
            middle = max(info.header_offset + 30, data)
            parts.append((f"header of {info.filename}", info.header_offset, middle))
            parts.append((f"bytes of {info.filename}", middle, following))
        n = (size - 22 - archive.start_dir) // len(infos)
        for i, info in enumerate(infos):
            begin = archive.start_dir + i * n
            parts.append((f"entry of {info.filename}", begin, begin + n))
        parts.append(("end of the archive", size - 120, size))
    return parts


def flatten(nest, name=""):
    """{path: value} of a checkpoint, tensors as (dtype, shape, bytes)."""
    if isinstance(nest, dict):
        items = nest.items()
    elif isinstance(nest, (list, tuple)):
        items = enumerate(nest)
    elif torch.is_tensor(nest):
        return {name: (nest.dtype, tuple(nest.shape), nest.contiguous().numpy().tobytes())}
    else:
        return {name: repr(nest)}
    found = {name: len(nest)}
    for key, value in items:
        found |= flatten(value, f"{name}/{key}")
    return found


# -----------------------------------------------------------------------------
# checkpoints


@pytest.fixture
def trained(tmp_path, data_root):
    """The log directory of a short run, with checkpoints of step 8 and 12."""
    done = run("train_gpt2.py", *flags(**TINY, data_root=data_root), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path / "log"


def damages(data, parts, count, rng):
    """(kind, part, damaged bytes), `count` of them: each kind at each part in turn."""
    pairs = list(itertools.product(KINDS, parts))
    rng.shuffle(pairs)
    for kind, (name, begin, end) in itertools.islice(itertools.cycle(pairs), count):
        damaged = kind(data, begin, end, rng)
        if damaged != data:
            yield kind.__name__, name, damaged


def test_damaged_checkpoints(tmp_path, trained, rng, progress):
    """Guards against wrong weights, optimizer or position without a word; and against
    --auto_resume that gives up although the checkpoint before would do."""
    newest, before = trained / "model_00012.pt", trained / "model_00008.pt"
    data = newest.read_bytes()
    whole, older = flatten(load_checkpoint(newest)), flatten(load_checkpoint(before))
    of_model = {name: value for name, value in flatten(load_checkpoint(newest, mmap=True)).items()
                if not name.startswith(("/optimizer", "/rng"))}
    parts, count = parts_of_archive(newest), scaled(1600)
    n_refused = n_harmless = 0
    bar = progress(damages(data, parts, count, rng), f"checkpoints, {len(parts)} parts")
    for i, (kind, part, damaged) in enumerate(bar):
        newest.write_bytes(damaged)
        refused = 0
        for mmap in (False, True):
            what = f"{kind} in {part}, mmap={mmap}"
            try:
                loaded = flatten(load_checkpoint(newest, mmap=mmap))
            except UserError as error:
                refused += 1
                assert str(newest) in str(error), what
                assert "\n" not in str(error), what
                continue
            expected = of_model if mmap else whole
            wrong = [name for name, value in expected.items() if loaded.get(name) != value]
            assert wrong == [], what
        n_refused, n_harmless = n_refused + (refused > 0), n_harmless + (refused == 0)
        if i % 10 == 0:
            start = load_start(dict(auto_resume=True, log_dir=trained), World(), known=())
            found = flatten(start.checkpoint["model"], "/model") | {"/step": repr(start.step)}
            expected = [{name: value[name] for name in found} for value in (whole, older)]
            assert found in expected, f"--auto_resume after {kind} in {part}"
    progress.tell(f"{n_refused + n_harmless} damaged checkpoints ({len(KINDS)} kinds at "
                  f"{len(parts)} parts of the file): {n_refused} refused, {n_harmless} read as if "
                  "whole, none wrong")


# -----------------------------------------------------------------------------
# datasets


@pytest.fixture
def dataset(tmp_path):
    """Shards with checksums, as fineweb.py writes them."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the cat number {i} sat on the mat\n" for i in range(3000)))
    done = run("fineweb.py", f"--files={text}", "--data_root=data", "--tokenizer=bpe",
               "--vocab_size=300", "--shard_size=9000", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path / "data"


def read_all(root):
    """All that training reads of a dataset, and its checks."""
    found = []
    for split in ("train", "val"):
        loader = TokenLoader(root, split, 64)
        n_tokens = loader.n_tokens - 1
        found += [x.numpy().tobytes() for x, *_ in loader.batches(0, n_tokens, 64)]
        for check in loader.verifier.running:
            check.exception(timeout=60)
        loader.verifier.raise_if_damaged()
    return found


def test_damaged_shards(tmp_path, dataset, rng, progress):
    """Guards against training on tokens that are not those of the text, and a --verify that
    overlooks them."""
    shards, whole = sorted(dataset.glob("*.npy")), read_all(dataset)
    checksums, count, n_refused = checksums_of(read_meta(dataset)), scaled(400), 0
    assert len(checksums) == len(shards)
    for i in progress(range(count), f"shards, {len(shards)} files"):
        path, kind = shards[i % len(shards)], KINDS[i // len(shards) % len(KINDS)]
        data = path.read_bytes()
        begin, end = (0, 128) if rng.random() < 0.2 else (128, len(data))  # header or tokens
        damaged = kind(data, begin, end, rng)
        if damaged == data:
            continue
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=path.name):
            verify_shard(path, checksums[path.name])
        with pytest.raises(UserError, match=path.name):
            read_all(dataset)
        n_refused += 1
        path.write_bytes(data)
    assert read_all(dataset) == whole
    progress.tell(f"{n_refused} damaged shards ({len(KINDS)} kinds, header and tokens): all "
                  "refused, by --verify and in training")


def test_damaged_files_beside_the_shards(dataset, rng, progress):
    """Guards against a traceback if meta.json or tokenizer.tiktoken is damaged: they have no
    checksum, but what cannot be read has to be said in a line."""
    count, n_refused, n_read = scaled(1000), 0, 0
    for i in progress(range(count), "meta.json and tokenizer.tiktoken"):
        path = dataset / ("meta.json", "tokenizer.tiktoken")[i % 2]
        kind = KINDS[i // 2 % len(KINDS)]
        data = path.read_bytes()
        path.write_bytes(kind(data, 0, len(data), rng))
        try:
            load_tokenizer(dataset)
            read_all(dataset)
            tokens_per_byte(read_meta(dataset), "val")
            n_read += 1
        except UserError as error:
            n_refused += 1
            assert "\n" not in str(error)
        path.write_bytes(data)
    progress.tell(f"{count} damaged meta.json and tokenizer.tiktoken: {n_refused} refused in a "
                  f"line, {n_read} read, no traceback")
