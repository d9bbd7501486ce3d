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
        self.default_streams = {}  # of each device
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

    @contextlib.contextmanager
    def stream(self, stream):
        previous, self.thread.stream = getattr(self.thread, "stream", None), stream
        with self.device(stream.device):  # torch.cuda.stream switches the device too
            yield
        self.thread.stream = previous

    def working_stream(self):
        """The stream that this thread's calls go to, on its current device."""
        stream = getattr(self.thread, "stream", None)
        if stream is not None and stream.device.index == self.current:
            return stream
        if self.current not in self.default_streams:
            device = torch.device("cuda", self.current)
            self.default_streams[self.current] = FakeStream(self, device)
        return self.default_streams[self.current]

    def current_stream(self, device=None):
        with self.device(device or torch.device("cuda", self.current)):
            return self.working_stream()

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
        working = self.cuda.working_stream()
        assert stream is None or stream is working, "the event is of a stream that does not work"
        self.seconds = time.perf_counter()
        self.cuda.note("record", (stream or self.cuda.current_stream()).device)

    def synchronize(self):
        self.cuda.note("synchronize", torch.device("cuda", self.cuda.current))

    def query(self):
        """Whether the device has reached this event."""
        self.cuda.note("query", torch.device("cuda", self.cuda.current))
        return True

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
