"""The dev split: choices are made on text that a run neither trains on nor reports.

    python -m pytest tests/data/test_dev_split.py
"""

import numpy as np
import pytest
import torch
from conftest import EOT, TINY, english, flags, read_log, run, write_dataset

from gptlib.common import UserError
from gptlib.data.dev_split import PartLoader, open_splits
from gptlib.data.loader import TokenLoader
from gptlib.data.tokenizer import load_tokenizer
from train_gpt2 import GPT, TrainConfig, evaluate

LENGTHS = (300, 410, 290)  # the dev split, a tenth of them, lies in the last shard


def numbered_dataset(root, lengths):
    """A dataset each of whose training tokens tells its own place in the stream."""
    stream = np.arange(sum(lengths))
    return write_dataset(root, np.split(stream, np.cumsum(lengths)[:-1]), [stream[:50]])


def settings(data_root, **changes):
    return TrainConfig(**{**TINY, "data_root": str(data_root), "dev": True, **changes})


def read_epoch(loader, epoch):
    """{input: target} of one epoch of a loader whose tokens differ."""
    N = loader.n_tokens
    pairs = {}
    for x, y, _ in loader.batches(epoch * N, N, 3):
        counted = y >= 0
        pairs.update(zip(x[counted].tolist(), y[counted].tolist(), strict=True))
    return pairs


@pytest.mark.parametrize("first, last", [(0, 900), (0, 300), (120, 640), (700, 1000), (305, 307)])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_part_is_a_stream_of_its_own(tmp_path, first, last, epoch):
    """Tokens left out, read twice or taken from beyond the part, where shards or epochs meet."""
    root = numbered_dataset(tmp_path / "d", LENGTHS)
    part = PartLoader(root, "train", 32, first, last, seed=7, shuffle=True)
    expected = {i: i + 1 for i in range(first, last - 1)}
    assert read_epoch(part, epoch) == {**expected, last - 1: first}


def test_training_never_reads_the_dev_split(tmp_path):
    """A dev split that is trained on rewards memory, and chooses the wrong settings."""
    root = numbered_dataset(tmp_path / "d", LENGTHS)
    train, dev, _ = open_splits(settings(root))
    assert sorted(read_epoch(dev, 0)) == list(range(900, 1000))
    assert sorted(read_epoch(train, 0)) == list(range(900))
    assert max(read_epoch(train, 1).values()) == 899


def test_without_dev_the_splits_are_what_they_were(tmp_path):
    """The recipe's order of data must not change because a dev split exists."""
    root = numbered_dataset(tmp_path / "d", LENGTHS)
    train, val, _ = open_splits(settings(root, dev=False, shuffle=True))
    expected = TokenLoader(root, "train", 32, 1337, shuffle=True)
    batches = zip(train.batches(500, 2000, 4), expected.batches(500, 2000, 4), strict=True)
    assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in batches)
    assert sorted(read_epoch(val, 0)) == list(range(50))


def test_a_text_too_short_for_a_dev_split(tmp_path):
    """An empty dev split would end in a division by zero."""
    root = numbered_dataset(tmp_path / "d", (19,))
    with pytest.raises(UserError, match="19 training tokens: too few"):
        open_splits(settings(root))


def test_bytes_of_the_dev_split_are_those_of_its_text(tmp_path):
    """Bits per byte would be wrong where <|endoftext|> counts as text, or a byte is lost."""
    root = write_dataset(tmp_path / "d", [english(3000, 1)], [english(500, 2)])
    _, dev, tokens_per_byte = open_splits(settings(root))
    tokens = english(3000, 1)[2700:].tolist()
    text = load_tokenizer(root).decode([token for token in tokens if token != EOT])
    assert tokens_per_byte == 300 / len(text.encode())
    assert dev.n_tokens == 300


def test_a_run_reports_the_loss_of_the_dev_split(tmp_path):
    """--dev that is evaluated on the val split would choose on what is reported.

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
    loss = evaluate(model, TokenLoader(held_out, "val", 32), 1000, 4, torch.device("cpu"), autocast)
    assert float(read_log(tmp_path / "log")["val"][2]) == pytest.approx(loss, abs=1e-4)
