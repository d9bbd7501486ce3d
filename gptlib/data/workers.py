"""Processes that read and tokenize row groups, and send arrays of tokens back.

Reading makes Python strings, which takes the interpreter lock for about a tenth of the time: enough
to hold back more than a few threads. Text never passes between processes, only tokens do. Workers
are plain child processes on pipes, so they start the same way on every platform, whatever the
script that is running, and end when their standard input does: when this process ends or is killed.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np

from gptlib.common import UserError

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A process that tokenizes one row group at a time.

    tokenizer: {"name", "ranks"}, as load_tokenizer takes it.
    """

    def __init__(self, tokenizer):
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.process = subprocess.Popen([sys.executable, "-m", "gptlib.data.worker_process"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self.send(tokenizer)

    def encode(self, row_group):
        """Returns (tokens, marks, bytes of text). Raises UserError, as reading here would."""
        file = row_group.file
        self.send((file.path, file.column, row_group.index, row_group.first, row_group.last))
        num_tokens, marks, num_bytes, error = self.receive()
        if error:
            raise UserError(error)
        tokens = np.empty(num_tokens, np.uint16)
        missing = memoryview(tokens).cast("B")
        while missing:
            count = self.process.stdout.readinto(missing)
            if not count:
                self.raise_died()
            missing = missing[count:]
        return tokens, marks, num_bytes

    def send(self, message):
        try:
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()
        except BrokenPipeError:
            self.raise_died()

    def receive(self):
        try:
            return pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):
            self.raise_died()

    def raise_died(self):
        code = self.process.wait()
        raise UserError(f"a tokenizing process ended with exit code {code}, perhaps for want of "
                        "memory: run the same command again, with a smaller --num_proc")

    def close(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
