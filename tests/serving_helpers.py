"""What the tests of the server share: a tiny model behind a real process, and its clients.

A test file takes the fixtures over by name: `server = serving.server`. The model, its checkpoint
and the plain server are made once in a process, for all files.
"""

import atexit
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import requests
import torch
from conftest import ROOT, environment

from gptlib.data.tokenizer import make_encoding, tokenizer_to_dict
from train_gpt2 import GPT, GPTConfig


CONFIG = GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
LONG = 50000  # tokens: more than anybody waits for here
WAIT = 30  # seconds: what takes longer hangs
START = 120  # seconds: so does a start, whose imports take long on a machine that is busy
SMALL = dict(SLOTS="4", QUEUE_SIZE="4", MAX_LENGTH_LIMIT=str(LONG), DTYPE="float32", DEVICE="cpu")


at_exit = contextlib.ExitStack()
atexit.register(at_exit.close)


@functools.cache
def make_model():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        model.transformer.wte.weight[256] = 0  # it hardly ever ends by itself
        model.transformer.wte.weight[128:] *= 0.1  # and mostly writes ASCII
    model.tokenizer = make_encoding("bpe", {bytes([i]): i for i in range(256)})
    return model.eval().requires_grad_(False)


@functools.cache
def make_home():
    """A directory with log/model_40000.pt, as a run leaves it."""
    home = Path(at_exit.enter_context(tempfile.TemporaryDirectory()))
    model = make_model()
    (home / "log").mkdir()
    checkpoint = dict(model=model.state_dict(), config=dataclasses.asdict(CONFIG), step=40000,
                      train_config={}, tokenizer=tokenizer_to_dict(model.tokenizer))
    torch.save(checkpoint, home / "log" / "model_40000.pt")
    (home / "log" / "latest_checkpoint.pt").symlink_to("model_40000.pt")
    return home


@functools.cache
def plain_server():
    return at_exit.enter_context(run_server(make_home())).ready()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def home():
    return make_home()


@pytest.fixture(scope="module")
def server():
    return plain_server()


class Server:
    """A server process; `code` is run in it before it starts."""

    def __init__(self, home, code="", argv=None, **env):
        argv = argv or [
            sys.executable,
            "-c",
            f"import inference, serve, sys, time\n{code}\nserve.run_main(serve.main)",
        ]
        env = {"PORT": "0", **SMALL, **env}
        self.process = subprocess.Popen(
            argv,
            cwd=home,
            env={**environment(), **env, "PYTHONPATH": str(ROOT)},
            text=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.lines, self.headers = [], {"X-API-Key": env.get("API_KEY", "")}
        for pipe in (self.process.stderr, self.process.stdout):
            threading.Thread(
                target=lambda pipe=pipe: self.lines.extend(iter(pipe.readline, "")), daemon=True
            ).start()
        listening = r"(?:listening on|Listening at:) http://[\d.]+:(\d+)"
        match = self.wait_for(listening, START)
        self.port = int(match[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_for(self, pattern, seconds=WAIT):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if match := re.search(pattern, self.log()):
                return match
            assert self.process.poll() is None, self.log()
            time.sleep(0.02)
        raise AssertionError(f"no {pattern} in: {self.log()}")

    def log(self):
        return "".join(list(self.lines))

    def ready(self):
        health = f"{self.url}/health"
        self.until(lambda: requests.get(health, timeout=START).status_code == 200, START)
        return self

    @staticmethod
    def until(true, seconds=WAIT):
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "hung"
            time.sleep(0.02)

    def get(self, path, **how):
        return requests.get(self.url + path, headers=self.headers, timeout=WAIT, **how)

    def post(self, path="/generate", stream=False, headers=None, **body):
        return requests.post(
            self.url + path,
            json=body | (dict(stream=True) if stream else {}),
            stream=stream,
            timeout=WAIT,
            headers=headers or self.headers,
        )

    def metric(self, name, **labels):
        """The sum of a metric over those of its lines that have these labels."""
        lines = [
            line
            for line in self.get("/metrics").text.splitlines()
            if re.match(name + r"[{ ]", line)
        ]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if all(f'{k}="{v}"' in line for k, v in labels.items())
        )

    def idle(self):
        """Wait until no sequence has a slot or waits for one, as those do whose context is full."""

        def nothing_is_left():
            health = self.get("/health").json()
            return health["slots_in_use"] == health["queue"] == 0

        self.until(nothing_is_left)

    def stop(self):
        """SIGTERM; the exit code, when the whole process group is gone."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(WAIT)
        with pytest.raises(ProcessLookupError):  # no orphan
            os.killpg(self.process.pid, 0)
        return code


@contextlib.contextmanager
def run_server(*args, **env):
    server = Server(*args, **env)
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


def events(response):
    """The server-sent events of a response, without the [DONE] that has to be the last."""
    data = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
    assert data[-1] == b"[DONE]"
    return [json.loads(event) for event in data[:-1]]


def in_background(function, *args, **how):
    """A Future of function(), run in a thread that does not keep the tests alive."""
    future = concurrent.futures.Future()

    def work():
        try:
            future.set_result(function(*args, **how))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
