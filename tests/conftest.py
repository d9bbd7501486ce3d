"""What the tests share: a tiny dataset made by hand, and a way to run a script as its user would.

    python -m pytest                       # all of them, on a CPU, offline
    python -m pytest tests/checkpoints/test_resume.py  # one promise
"""

import base64
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes run tests: a core for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MOST_WORKERS = 4  # some tests need a gigabyte
EOT = 256  # the tiny tokenizer: a token a byte, then <|endoftext|>


def pytest_xdist_auto_num_workers(config):
    """How many processes run the tests: a few for the whole suite, else this one alone.

    Tests on a GPU would share its memory, and the campaign's draw a progress line.
    """
    import torch
    is_one_file = len(config.args) == 1 and ".py" in config.args[0]
    is_selection = "not campaign" not in config.option.markexpr
    if is_one_file or is_selection or torch.cuda.is_available():
        return 0
    return min(os.cpu_count() or 1, MOST_WORKERS)


# flags of a model that takes milliseconds a step
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, total_batch_size=256, batch_size=4,
            max_steps=12, warmup_steps=3, max_lr=1e-2, eval_interval=5, val_tokens=1000,
            hellaswag_examples=0, num_samples=1, sample_prompt="the ", sample_length=12,
            checkpoint_interval=4, device="cpu", dtype="float32", compile=False)


def write_dataset(root, train, val):
    """A dataset directory as DESIGN.md describes it, from lists of token arrays (a shard each)."""
    root.mkdir(parents=True)
    shards = []
    for split, arrays in (("val", val), ("train", train)):
        for tokens in arrays:
            name = f"tiny_{split}_{len(shards):06d}.npy"
            np.save(root / name, np.asarray(tokens, dtype=np.uint16))
            documents = int((np.asarray(tokens) == EOT).sum())
            shards.append(dict(name=name, tokens=len(tokens), documents=documents))
    splits = dict(train=np.concatenate(train), val=np.concatenate(val))
    count = {split: len(tokens) for split, tokens in splits.items()}
    text = {split: int((tokens != EOT).sum()) for split, tokens in splits.items()}
    (root / "tokenizer.tiktoken").write_bytes(
        b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    (root / "meta.json").write_text(json.dumps(dict(
        tokenizer="bpe", vocab_size=257, eot=EOT, source="made by a test", shards=shards,
        tokens=count, bytes=text, complete=True)))
    return root


def english(n, seed=0):
    """n tokens of documents with something to learn in them: words repeat, and spaces part them."""
    rng = np.random.default_rng(seed)
    words = ["the ", "cat ", "sat ", "on ", "a ", "mat ", "and ", "ran ", "home "]
    tokens = []
    while len(tokens) < n:
        tokens += [EOT, *"".join(rng.choice(words, size=rng.integers(3, 30))).encode()]
    return np.array(tokens[:n], dtype=np.uint16)


@pytest.fixture
def data_root(tmp_path):
    train = [english(3001, 1), english(2000, 2)]
    return write_dataset(tmp_path / "data", train, [english(1500, 3)])


def write_hellaswag(path):
    """Twenty questions in the words of the corpus."""
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "home"]
    with open(path, "w") as f:
        for i in range(20):
            endings = [" ".join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(4)]
            f.write(json.dumps(dict(ctx="the cat sat", endings=endings, label=i % 4)) + "\n")


def flags(**settings):
    """Settings as a command line: flags(max_steps=3, compile=False) is
    ['--max_steps=3', '--compile=False']."""
    return [f"--{k}={v}" for k, v in settings.items()]


def command(script, *args, nproc=0):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    launcher = [sys.executable, *torchrun] if nproc else [sys.executable]
    return [*launcher, str(ROOT / script), *map(str, args)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(script, *args, cwd, nproc=0):
    """Run a script to its end; returns the CompletedProcess with stdout and stderr as text."""
    return subprocess.run(command(script, *args, nproc=nproc), cwd=cwd, env=environment(),
                          text=True, capture_output=True, timeout=600)


def start(script, *args, cwd):
    """Start a script and leave it running."""
    return subprocess.Popen(command(script, *args), cwd=cwd, env=environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def free_ports(n):
    """n ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def read_log(log_dir):
    """log.txt as {kind: {step: value as text}}, every line of three fields and no step twice."""
    log = {}
    for line in (Path(log_dir) / "log.txt").read_text().splitlines():
        step, kind, value = line.split(" ")
        assert int(step) not in log.setdefault(kind, {}), f"{kind} of step {step} is there twice"
        log[kind][int(step)] = value
    return log


def load_gpt2_or_skip():
    """GPT-2's tokenizer; the test is skipped where its vocabulary can't be had."""
    from gptlib.common import UserError
    from gptlib.data.tokenizer import load_tokenizer
    try:
        return load_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(f"the GPT-2 vocabulary is not here: {error}")


@pytest.fixture(scope="module")
def one_thread():
    """A step of a tiny model is over before a second thread has started."""
    import torch
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def gpt2():
    return load_gpt2_or_skip()


@pytest.fixture(scope="module")
def bpe():
    """A small BPE of several languages; the tests of tokenizers have one of their own."""
    from interop_helpers import train_mixed_bpe
    return train_mixed_bpe()


@pytest.fixture
def checkpoint(bpe, tmp_path):
    """The path of a small model's checkpoint with that tokenizer."""
    from interop_helpers import write_checkpoint
    return write_checkpoint(bpe, tmp_path / "model_00001.pt")
