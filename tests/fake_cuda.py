"""A stand-in for torch.cuda on a machine without a GPU: it records which device each call concerns.

The current device belongs to a thread and is 0 at first, as with CUDA. Tensors stay on the CPU; a
captured graph is replayed by calling what was called while it was captured.
"""

import contextlib
import threading
import time
from dataclasses import dataclass

import torch

NAMES = ("device", "Stream", "stream", "current_stream", "Event", "CUDAGraph", "graph")


@dataclass
class Call:
    name: str
    current: int  # the thread's current device
    device: int  # the device of the stream that the call concerns


class FakeCuda:

    def __init__(self, monkeypatch):
        self.calls = []
        self.captured = None  # the graph that is being captured
        self.thread = threading.local()
        self.capture_stream = FakeStream(self, torch.device("cuda", 0))  # torch makes it once
        for name in NAMES:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @property
    def current(self):
        return getattr(self.thread, "current", 0)

    def note(self, name, device):
        self.calls.append(Call(name, self.current, device.index))

    @contextlib.contextmanager
    def device(self, device):
        previous, self.thread.current = self.current, torch.device(device).index
        yield
        self.thread.current = previous

    def stream(self, stream):
        return self.device(stream.device)  # torch.cuda.stream switches the device too

    def current_stream(self, device=None):
        return FakeStream(self, device or torch.device("cuda", self.current))

    def Stream(self, device=None):
        return FakeStream(self, device or torch.device("cuda", self.current))

    def Event(self, enable_timing=False):
        return FakeEvent(self)

    def CUDAGraph(self):
        return FakeGraph(self)

    @contextlib.contextmanager
    def graph(self, graph, stream=None):
        stream = stream or self.capture_stream
        with self.stream(stream):
            self.note("capture", stream.device)
            self.captured = graph
            yield
            self.captured = None

    def traced(self, forward):
        """forward, noted at every call and kept by the graph that is being captured."""
        def call(*args):
            self.note("forward", torch.device("cuda", self.current))
            output = forward(*args)
            if self.captured:
                self.captured.forward, self.captured.args = forward, args
                self.captured.output = output
            return output
        return call


class FakeStream:
    def __init__(self, cuda, device):
        self.cuda, self.device = cuda, device

    def wait_stream(self, stream):
        self.cuda.note("wait_stream", self.device)
        self.cuda.note("wait_stream", stream.device)


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self, stream=None):
        self.seconds = time.perf_counter()
        self.cuda.note("record", (stream or self.cuda.current_stream()).device)

    def synchronize(self):
        self.cuda.note("synchronize", torch.device("cuda", self.cuda.current))

    def elapsed_time(self, end):
        """Milliseconds from this event to another."""
        self.cuda.note("elapsed", torch.device("cuda", self.cuda.current))
        return (end.seconds - self.seconds) * 1000


class FakeGraph:
    def __init__(self, cuda):
        self.cuda = cuda

    def replay(self):
        self.cuda.note("replay", torch.device("cuda", self.cuda.current))
        self.output.copy_(self.forward(*self.args))
