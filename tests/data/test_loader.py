"""Which tokens a step reads, the dev split, and the thread that reads ahead.

    python -m pytest tests/data/test_loader.py
"""

import contextlib
import json
import threading

import numpy as np
import pytest
import torch
from conftest import EOT, TINY, english, flags, read_log, run, write_dataset

from gptlib.common import UserError
from gptlib.data import loader as loader_module
from gptlib.data import tokenizer as tokenizer_module
from gptlib.data.loader import (AHEAD, MicroBatch, PartLoader, TokenLoader, open_dataset, prefetch)
from gptlib.data.shards import file_checksum
from gptlib.data.tokenizer import load_tokenizer
from gptlib.distributed import World
from gptlib.training.evaluation import Evaluator
from train_gpt2 import GPT, GPTConfig


def epoch_of(loader, epoch, world_size, batch_size, step_tokens):
    """All inputs and targets of one epoch, read by `world_size` ranks in steps of step_tokens."""
    pairs = []
    position, end = epoch * loader.n_tokens, (epoch + 1) * loader.n_tokens
    while position < end:
        n = min(step_tokens, end - position)
        read = 0
        for rank in range(world_size):
            world = World(rank, rank, world_size)
            for x, y, count, _ in loader.batches(position, n, batch_size, world):
                assert x.shape == y.shape
                assert len(x) <= batch_size
                assert x.size(1) == loader.block_size
                if count:
                    counted = y >= 0
                    pairs += zip(x[counted].tolist(), y[counted].tolist(), strict=True)
                read += count
        assert read == n
        position += n
    return pairs


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("lengths", [(640,), (100, 333, 7, 201), (31,), (64, 64, 64)])
@pytest.mark.parametrize("world_size,batch_size,step_tokens",
                         [(1, 4, 128), (2, 3, 128), (3, 2, 96), (4, 1, 50)])
def test_every_token_of_an_epoch_is_read_exactly_once(tmp_path, lengths, world_size, batch_size,
                                                      step_tokens, shuffle):
    """Guards against tokens skipped or read twice where shards, windows, steps or ranks meet."""
    total = sum(lengths)
    stream = np.arange(total) % 60000  # each token tells its own place
    shards = np.split(stream, np.cumsum(lengths)[:-1])
    root = write_dataset(tmp_path / "d", shards, [stream[:9]])
    loader = TokenLoader(root, "train", 32, seed=7, shuffle=shuffle)
    for epoch in range(3):
        pairs = epoch_of(loader, epoch, world_size, batch_size, step_tokens)
        assert sorted(pairs) == [(i, (i + 1) % total) for i in range(total)]


def test_epoch_0_is_file_order_and_later_ones_are_permuted(tmp_path):
    """Guards against the same order in every epoch, and against one that no seed repeats."""
    root = write_dataset(tmp_path / "d", [np.arange(0, 500), np.arange(500, 1000)], [np.arange(9)])

    def inputs(epoch, **settings):
        loader = TokenLoader(root, "train", 10, **settings)
        return [x for x, _ in epoch_of(loader, epoch, 1, 4, 100)]

    assert inputs(0) == list(range(1000))
    second = inputs(1)
    assert second != list(range(1000))
    assert second != inputs(2)
    assert second == inputs(1)
    assert second != inputs(1, seed=1)
    windows = [second[i:i + 10] for i in range(0, 1000, 10)]
    for window in windows:  # windows are moved as a whole
        assert window == [(window[0] + i) % 1000 for i in range(10)]
    shards = [w[0] // 500 for w in windows]
    changes = sum(a != b for a, b in zip(shards[:-1], shards[1:], strict=True))
    assert changes <= 2  # one shard at a time; the epoch begins inside of one, which counts as two
    assert {w[0] % 10 for w in windows} != {inputs(2)[0] % 10}  # other tokens in each epoch
    shuffled = inputs(0, shuffle=True)
    assert shuffled != list(range(1000))
    assert {x % 10 for x in shuffled[::10]} == {0}


def test_processes_and_micro_batches_do_not_change_the_tokens(tmp_path):
    """Guards against other losses on another number of GPUs, because a step reads other tokens."""
    root = write_dataset(tmp_path / "d", [np.arange(700)], [np.arange(9)])
    loader = TokenLoader(root, "train", 16, seed=3, shuffle=True)
    for step in range(6):
        def tokens(world_size, batch_size, at=step):
            found = []
            for rank in range(world_size):
                world = World(rank, rank, world_size)
                for x, y, n, _ in loader.batches(at * 200, 200, batch_size, world):
                    if n:
                        found += x[y >= 0].tolist()
            return sorted(found)

        expected = tokens(1, 4)
        assert tokens(2, 3) == expected
        assert tokens(5, 1) == expected
        assert tokens(40, 2) == expected


def test_shards_of_the_original_recipe_and_of_llm_c_agree(tmp_path):
    """Guards against a header read as tokens, and a directory without meta.json that is refused."""
    tokens = english(1000)
    tokens[tokens == 256] = 50256
    for split in ("train", "val"):
        np.save(tmp_path / f"edufineweb_{split}_000001.npy", tokens)
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "fineweb_train_000001.bin").write_bytes(header.tobytes() + tokens.tobytes())
    ours = epoch_of(TokenLoader(tmp_path, "train", 32), 1, 1, 4, 128)
    theirs = epoch_of(TokenLoader(tmp_path / "bin", "train", 32), 1, 1, 4, 128)
    assert ours == theirs
    assert sorted(x for x, _ in ours) == sorted(tokens.tolist())


def test_an_id_beyond_the_vocabulary_ends_the_run_in_one_line(tmp_path):
    """Guards against a damaged shard that ends training with an index error inside of the model
    or, on a GPU, with a failed assertion of a kernel that names nothing.
    """
    damaged = english(3001, 1)
    damaged[137] = 60000
    root = write_dataset(tmp_path / "data", [english(300, 2), damaged], [english(1500, 3)])
    done = run("train_gpt2.py", *flags(**{**TINY, "num_samples": 0}, data_root=root), cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.strip().endswith(errors[0])
    assert "tiny_train_000002.npy: token 137 is 60000" in errors[0]
    assert "the model's vocabulary has 257 tokens" in errors[0]


def test_an_id_beyond_the_vocabulary_in_validation(tmp_path):
    """Guards against that index error from the validation split."""
    damaged = english(300, 3)
    damaged[7] = 60000
    root = write_dataset(tmp_path / "data", [english(300, 1)], [damaged])
    model = GPT(GPTConfig(block_size=32, vocab_size=320, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(UserError, match="tiny_val_000000.npy: token 7 is 60000"):
        evaluator = Evaluator(model, torch.device("cpu"), contextlib.nullcontext(), batch_size=4)
        evaluator.validation_loss(TokenLoader(root, "val", 32), 200)


# -----------------------------------------------------------------------------
# steps of micro-batches


def steps_of(loader, position, world, n_steps=3, batch_size=2):
    """The micro-batches of the first steps, each step a list."""
    stream = loader.micro_batches(position, 100, batch_size, world)
    steps = [[]]
    while len(steps) <= n_steps:
        steps[-1].append(next(stream))
        if steps[-1][-1].is_last:
            steps.append([])
    return steps[:n_steps]


@pytest.mark.parametrize("world_size", [1, 3, 8, 20])
def test_every_rank_has_as_many_micro_batches(data_root, world_size):
    """Guards against a rank that waits for ever in an exchange that the others do not join."""
    loader = TokenLoader(data_root, "train", 16)
    ranks = [steps_of(loader, 50, World(rank, rank, world_size)) for rank in range(world_size)]
    for step in zip(*ranks, strict=True):
        assert len({len(micro_batches) for micro_batches in step}) == 1
        assert sum(batch.n_tokens for batches in step for batch in batches) == 100


def test_micro_batches_are_the_steps_one_after_the_other(data_root):
    """Guards against a stream that repeats or leaves out tokens between two steps."""
    loader = TokenLoader(data_root, "train", 16)
    for number, step in enumerate(steps_of(loader, 50, World())):
        expected = list(loader.batches(50 + 100 * number, 100, 2))
        assert len(step) == len(expected)
        for batch, other in zip(step, expected, strict=True):
            assert torch.equal(batch.x, other.x)
            assert torch.equal(batch.y, other.y)
            assert batch[2:] == other[2:]


def test_a_micro_batch_that_only_pads_has_targets(data_root):
    """Guards against NaN gradients: the mean loss of a batch without targets is 0/0."""
    loader = TokenLoader(data_root, "train", 16)
    batches = list(loader.batches(0, 16, 2, World(1, 1, 2)))
    assert [batch.n_tokens for batch in batches] == [0]
    assert (batches[0].y >= 0).any()


# -----------------------------------------------------------------------------
# reading ahead


def numbered(count=10**9):
    """Micro-batches that tell their number."""
    for i in range(count):
        yield MicroBatch(torch.tensor(i), torch.tensor(i + 1), 1, is_last=False)


def first_numbers(stream, count):
    return [next(stream).x.item() for _ in range(count)]


def test_prefetch_reads_a_few_micro_batches_ahead():
    """Guards against a start that waits until a whole step, or more, is in memory."""
    read = []

    def watched():
        for batch in numbered():
            read.append(batch)
            yield batch

    with contextlib.closing(prefetch(watched(), torch.device("cpu"))) as stream:
        assert first_numbers(stream, 5) == [0, 1, 2, 3, 4]
        assert len(read) <= 5 + AHEAD


def test_prefetch_ends_with_its_source():
    """Guards against a finite stream that ends in a RuntimeError, or loses its last ones."""
    received = [batch.x.item() for batch in prefetch(numbered(7), torch.device("cpu"))]
    assert received == [0, 1, 2, 3, 4, 5, 6]


class FakeStream:
    def wait_event(self, event):
        event.waits += 1


class FakeEvent:
    made = []

    def __init__(self):
        self.waits = 0
        self.made.append(self)

    def record(self):
        pass


def test_the_prefetching_thread_uses_the_gpu_of_its_rank(monkeypatch):
    """Guards against every rank taking half a gigabyte of GPU 0: the current GPU belongs to a
    thread.
    """
    current = threading.local()
    pinned_with = []  # the current GPU of the thread at each call

    def set_device(device):
        current.index = torch.device(device).index

    def pin_memory(tensor):
        index = getattr(current, "index", 0)
        pinned_with.append((index, threading.get_ident()))
        return tensor

    def to(tensor, device, non_blocking=False):
        assert device == torch.device("cuda", 3)
        assert non_blocking
        return tensor

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    with contextlib.closing(prefetch(numbered(), torch.device("cuda", 3))) as stream:
        received = first_numbers(stream, 5)
    assert received == [0, 1, 2, 3, 4]
    assert {index for index, _ in pinned_with} == {3}
    assert threading.get_ident() not in {thread for _, thread in pinned_with}
    assert not hasattr(current, "index")  # the thread that computes has its device already
    assert [event.waits for event in FakeEvent.made[:5]] == [1] * 5


def test_one_thread_alone_uses_an_apple_gpu(monkeypatch):
    """Guards against a crash in the middle of training: two threads that use MPS at a time."""
    moved_by = []

    def to(tensor, device):
        assert device == torch.device("mps")
        moved_by.append(threading.get_ident())
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    with contextlib.closing(prefetch(numbered(), torch.device("mps"))) as stream:
        received = first_numbers(stream, 5)
    assert received == [0, 1, 2, 3, 4]
    assert set(moved_by) == {threading.get_ident()}


def test_a_shard_that_changed_ends_the_run(tmp_path):
    """Guards against training in silence on a shard whose bytes changed on the disk."""
    root = write_dataset(tmp_path / "d", [np.arange(500), np.arange(500)], [np.arange(9)])
    meta = json.loads((root / "meta.json").read_text())
    for shard in meta["shards"]:
        shard["crc32"] = file_checksum(root / shard["name"])
    (root / "meta.json").write_text(json.dumps(meta))
    damaged = sorted(root.glob("*_train_*"))[1]
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)

    def read(position):
        loader = TokenLoader(root, "train", 10)
        list(loader.batches(position, 100, 4))
        loader.verifier.thread.shutdown()  # the check has ended
        list(loader.batches(position, 100, 4))

    read(0)  # the other shard is as it was
    with pytest.raises(UserError, match=damaged.name):
        read(500)


# -----------------------------------------------------------------------------
# a dataset, opened


def test_meta_json_is_read_once(data_root, monkeypatch):
    """Guards against a start that opens meta.json again for each thing it says."""
    reads = []

    def read_meta(root):
        reads.append(root)
        return real(root)

    real = loader_module.read_meta
    for module in (loader_module, tokenizer_module):
        monkeypatch.setattr(module, "read_meta", read_meta)
    data = open_dataset(data_root, 32)
    assert reads == [data_root]
    assert data.tokenizer.n_vocab == 257
    assert data.val_tokens_per_byte > 1
    assert "made by a test, 5,001 training tokens, tokenizer bpe" in data.description


def test_a_dataset_of_another_program_has_no_bytes(gpt2, tmp_path):
    """Guards against a traceback, or made-up bits per byte, for a directory without meta.json."""
    for split in ("train", "val"):
        np.save(tmp_path / f"edufineweb_{split}_000001.npy", np.arange(99, dtype=np.uint16))
    data = open_dataset(tmp_path, 32)
    assert data.tokenizer.name == "gpt2"
    assert data.val_tokens_per_byte is None
    assert data.description == str(tmp_path)
    assert data.is_fineweb_edu, "build-nanogpt's own name"
    assert not open_dataset(tmp_path, 8, dev=True).is_fineweb_edu


# -----------------------------------------------------------------------------
# the dev split: choices are made on text that a run neither trains on nor reports

LENGTHS = (300, 410, 290)  # the dev split, a tenth of them, lies in the last shard


def numbered_dataset(root, lengths):
    """A dataset each of whose training tokens tells its own place in the stream."""
    stream = np.arange(sum(lengths))
    return write_dataset(root, np.split(stream, np.cumsum(lengths)[:-1]), [stream[:50]])


def read_epoch(loader, epoch):
    """{input: target} of one epoch of a loader whose tokens differ."""
    N = loader.n_tokens
    pairs = {}
    for x, y, *_ in loader.batches(epoch * N, N, 3):
        counted = y >= 0
        pairs.update(zip(x[counted].tolist(), y[counted].tolist(), strict=True))
    return pairs


@pytest.mark.parametrize("first, last", [(0, 900), (0, 300), (120, 640), (700, 1000), (305, 307)])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_part_is_a_stream_of_its_own(tmp_path, first, last, epoch):
    """Guards against tokens left out, read twice or from beyond the part, where shards meet."""
    root = numbered_dataset(tmp_path / "d", LENGTHS)
    part = PartLoader(root, "train", 32, first, last, seed=7, shuffle=True)
    expected = {i: i + 1 for i in range(first, last - 1)}
    assert read_epoch(part, epoch) == {**expected, last - 1: first}


def test_training_never_reads_the_dev_split(tmp_path):
    """Guards against a dev split that is trained on, which rewards learning by heart."""
    root = numbered_dataset(tmp_path / "d", LENGTHS)
    data = open_dataset(root, 32, dev=True)
    assert sorted(read_epoch(data.val, 0)) == list(range(900, 1000))
    assert sorted(read_epoch(data.train, 0)) == list(range(900))
    assert max(read_epoch(data.train, 1).values()) == 899


def test_without_dev_the_splits_are_what_they_were(tmp_path):
    """Guards against another order of the recipe's data because a dev split exists."""
    root = numbered_dataset(tmp_path / "d", LENGTHS)
    data = open_dataset(root, 32, seed=1337, shuffle=True)
    expected = TokenLoader(root, "train", 32, 1337, shuffle=True)
    batches = zip(data.train.batches(500, 2000, 4), expected.batches(500, 2000, 4), strict=True)
    assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in batches)
    assert sorted(read_epoch(data.val, 0)) == list(range(50))


def test_a_text_too_short_for_a_dev_split(tmp_path):
    """Guards against a division by zero for an empty dev split."""
    root = numbered_dataset(tmp_path / "d", (19,))
    with pytest.raises(UserError, match="19 training tokens: too few"):
        open_dataset(root, 32, dev=True)


def test_bytes_of_the_dev_split_are_those_of_its_text(tmp_path):
    """Guards against wrong bits per byte: <|endoftext|> counted as text, or a byte lost."""
    root = write_dataset(tmp_path / "d", [english(3000, 1)], [english(500, 2)])
    data = open_dataset(root, 32, dev=True)
    tokens = english(3000, 1)[2700:].tolist()
    text = load_tokenizer(root).decode([token for token in tokens if token != EOT])
    assert data.val_tokens_per_byte == 300 / len(text.encode())
    assert data.val.n_tokens == 300


def test_a_run_reports_the_loss_of_the_dev_split(tmp_path):
    """Guards against --dev that is evaluated on the val split, which is what is reported.

    The val shards are not even there: a run with --dev has no business to open them.
    """
    root = write_dataset(tmp_path / "data", [english(3000, 1)], [english(500, 2)])
    for path in root.glob("*_val_*"):
        path.unlink()
    settings = {**TINY, "max_steps": 2, "checkpoint_interval": 2}
    done = run("train_gpt2.py", "--data_root=data", "--dev", *flags(**settings), cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    held_out = write_dataset(tmp_path / "held_out", [english(64)], [english(3000, 1)[2700:]])
    checkpoint = torch.load(tmp_path / "log" / "model_00002.pt", weights_only=True)
    model = GPT.from_checkpoint(checkpoint)
    autocast = torch.autocast("cpu", enabled=False)
    # the last token predicts what the held-out text begins with, so it is left out in both
    evaluator = Evaluator(model, torch.device("cpu"), autocast, batch_size=4)
    loss = evaluator.validation_loss(TokenLoader(held_out, "val", 32), 1000)
    assert float(read_log(tmp_path / "log")["val"][2]) == pytest.approx(loss, abs=1e-4)
