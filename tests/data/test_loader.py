"""Which tokens a step reads, and the thread that prefetches them.

    python -m pytest tests/data/test_loader.py
"""

import contextlib
import json
import threading

import numpy as np
import pytest
import torch
from conftest import TINY, english, flags, run, write_dataset

from gptlib.common import UserError
from gptlib.data.shards import file_checksum
from gptlib.data.loader import TokenLoader, prefetch
from gptlib.distributed import World
from train_gpt2 import GPT, GPTConfig, evaluate


def epoch_of(loader, epoch, world_size, batch_size, step_tokens):
    """All inputs and targets of one epoch, read as `world_size` processes would, in steps of step_tokens."""
    pairs = []
    position, end = epoch * loader.n_tokens, (epoch + 1) * loader.n_tokens
    while position < end:
        n = min(step_tokens, end - position)
        read = 0
        for rank in range(world_size):
            world = World(rank, rank, world_size)
            for x, y, count in loader.batches(position, n, batch_size, world):
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
    """Tokens are skipped or read twice where shards, windows, steps or ranks meet."""
    total = sum(lengths)
    stream = np.arange(total) % 60000  # each token tells its own place
    shards = np.split(stream, np.cumsum(lengths)[:-1])
    root = write_dataset(tmp_path / "d", shards, [stream[:9]])
    loader = TokenLoader(root, "train", 32, seed=7, shuffle=shuffle)
    for epoch in range(3):
        pairs = epoch_of(loader, epoch, world_size, batch_size, step_tokens)
        assert sorted(pairs) == [(i, (i + 1) % total) for i in range(total)]


def test_epoch_0_is_file_order_and_later_ones_are_permuted(tmp_path):
    """Every epoch reads the same windows in the same order, or an order that no seed repeats."""
    root = write_dataset(tmp_path / "d", [np.arange(0, 500), np.arange(500, 1000)], [np.arange(9)])

    def inputs(epoch, **settings):
        return [x for x, _ in epoch_of(TokenLoader(root, "train", 10, **settings), epoch, 1, 4, 100)]

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
    """A run on another number of GPUs reads other tokens in a step, and its losses differ."""
    root = write_dataset(tmp_path / "d", [np.arange(700)], [np.arange(9)])
    loader = TokenLoader(root, "train", 16, seed=3, shuffle=True)
    for step in range(6):
        def tokens(world_size, batch_size, at=step):
            found = []
            for rank in range(world_size):
                world = World(rank, rank, world_size)
                for x, y, n in loader.batches(at * 200, 200, batch_size, world):
                    if n:
                        found += x[y >= 0].tolist()
            return sorted(found)

        expected = tokens(1, 4)
        assert tokens(2, 3) == expected
        assert tokens(5, 1) == expected
        assert tokens(40, 2) == expected


def test_shards_of_the_original_recipe_and_of_llm_c_agree(tmp_path):
    """A header is read as tokens, or a directory without meta.json is refused."""
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
    """A damaged shard ends training with an index error deep inside of the model, or, on a GPU,
    with a failed assertion of a kernel that names nothing.
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
    """The training split was checked and the validation split was not: the same index error."""
    damaged = english(300, 3)
    damaged[7] = 60000
    root = write_dataset(tmp_path / "data", [english(300, 1)], [damaged])
    model = GPT(GPTConfig(block_size=32, vocab_size=320, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(UserError, match="tiny_val_000000.npy: token 7 is 60000"):
        evaluate(model, TokenLoader(root, "val", 32), 200, 4, torch.device("cpu"),
                 contextlib.nullcontext())


class FakeStream:
    def wait_stream(self, other):
        pass


def test_the_prefetching_thread_uses_the_gpu_of_its_rank(monkeypatch):
    """The current GPU belongs to a thread: every rank takes half a gigabyte of GPU 0."""
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
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    def micro_batches():
        for i in range(100):
            yield iter([(torch.tensor(i), torch.tensor(i + 1), 1)])

    steps = prefetch(micro_batches(), torch.device("cuda", 3))
    received = [next(steps)[0][0].item() for _ in range(5)]
    steps.close()
    assert received == [0, 1, 2, 3, 4]
    assert {index for index, _ in pinned_with} == {3}
    assert threading.get_ident() not in {thread for _, thread in pinned_with}
    assert not hasattr(current, "index")  # the thread that computes has its device already


def test_one_thread_alone_uses_an_apple_gpu(monkeypatch):
    """Two threads that use MPS at the same time crash the process, in the middle of training."""
    moved_by = []

    def to(tensor, device):
        assert device == torch.device("mps")
        moved_by.append(threading.get_ident())
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    micro_batches = (iter([(torch.tensor(i), torch.tensor(i + 1), 1)]) for i in range(100))
    steps = prefetch(micro_batches, torch.device("mps"))
    received = [next(steps)[0][0].item() for _ in range(5)]
    steps.close()
    assert received == [0, 1, 2, 3, 4]
    assert set(moved_by) == {threading.get_ident()}


def test_a_shard_that_changed_ends_the_run(tmp_path):
    """Guards against training on a shard whose bytes changed on the disk, without a word."""
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
