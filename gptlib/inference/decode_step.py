"""How the engine runs one decode step on its device: eagerly, compiled, or as a CUDA graph."""

import contextlib
import itertools
import math
import types
from dataclasses import dataclass

import torch

from gptlib.runtime import compile_model

_function_numbers = itertools.count()  # a number for each function given to torch.compile


def next_logits(model, idx, attention):
    """Logits (B, vocab_size) of the token that follows idx (B, T).

    attention: of a KVCache of B slots, such as cache.at(pos).
    """
    x = model.hidden(idx, attention)[:, -1]  # (B, n_embd)
    return project_to_logits(model.lm_head, x)


def decode(model, idx, cache, pos):
    """Logits (B, vocab_size) of the token that follows idx (B, 1).

    pos (B, 1): the positions of idx in the B slots of the cache.
    """
    return next_logits(model, idx, cache.at(pos))


def project_to_logits(lm_head, x):
    """Logits (B, vocab_size) of final hidden states x (B, n_embd), in float32 if that is cheap.

    bfloat16 logits of magnitude 64 to 128 are half a nat apart, so many tokens would seem equally
    likely. CUDA's products can return their float32 sums at no cost. On other devices torch has no
    such product, and float32 weights would double the bytes read for a token, so there the logits
    have the dtype of the weights.
    """
    if has_mixed_product(x):
        return torch.mm(x, lm_head.weight.t(), out_dtype=torch.float32)
    return lm_head(x)


def has_mixed_product(x):
    """Whether torch multiplies matrices of this device and dtype into a float32 result."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


class DecodeStep:
    """Feeds each sequence its last token and returns the logits of the next one.

    This one serves every device but CUDA. forward(idx, cache, pos): a model's decode, perhaps
    compiled. cache: the KVCache of all slots. last_tokens (slots, 1): the token that was sampled
    last in each slot. With fixed_shapes rows and sizes are rounded up, so that only a few shapes
    have to be compiled.
    """

    async_depth = 0  # how many steps may be under way before their tokens are collected
    size_multiple = 64  # fixed shapes: the cache is cut to a multiple of this many positions

    def __init__(self, forward, cache, last_tokens, device, fixed_shapes=False):
        self.forward = forward
        self.cache = cache
        self.last_tokens = last_tokens
        self.fixed_shapes = fixed_shapes
        self.slots, _, self.block_size, _ = cache.keys[0].shape
        self.device = device

    def device_context(self):
        """A context that makes the device this thread's current one, as its calls need."""
        return contextlib.nullcontext()

    def shape(self, n_sequences, n_positions):
        """The rows and cache positions that a step over so many sequences and positions takes."""
        if not self.fixed_shapes:
            return n_sequences, n_positions
        rows = 1 if n_sequences == 1 else self.slots
        size = math.ceil(n_positions / self.size_multiple) * self.size_multiple
        return rows, min(size, self.block_size)

    def fixed_shape_list(self):
        """All (rows, size) that shape() can return; none if the shapes are not fixed."""
        if not self.fixed_shapes:
            return []
        sizes = {self.shape(1, n + 1)[1] for n in range(0, self.block_size, self.size_multiple)}
        return [(rows, size) for rows in sorted({1, self.slots}) for size in sorted(sizes)]

    def run(self, rows, size, pos):
        """Logits (rows, vocab_size) after the last tokens of the first `rows` slots.

        pos (rows, 1): the positions of those tokens; size: how many positions are attended to.
        """
        cache = self.cache.narrow(0, rows, size)
        if self.fixed_shapes:  # one compilation serves all sizes
            for tensor in cache.keys + cache.values:
                torch._dynamo.mark_dynamic(tensor, 2)
        return self.forward(self.last_tokens[:rows], cache, pos)

    def copy_to_host(self, tensor):
        """A copy in host memory, and the event after which it may be read (None: at once)."""
        return tensor.clone(), None


@dataclass
class RecordedStep:
    """A CUDA graph, the tensor that it reads positions from and the tensor it leaves logits in."""
    graph: torch.cuda.CUDAGraph
    pos: torch.Tensor
    logits: torch.Tensor


class CudaDecodeStep(DecodeStep):
    """The decode step as CUDA graphs: one launch replaces hundreds, and the host never waits.

    While the tokens of one step travel to the host, the next step is under way already.
    """

    async_depth = 1
    size_multiple = 256

    def __init__(self, forward, cache, last_tokens, device, fixed_shapes=True):
        super().__init__(forward, cache, last_tokens, device, fixed_shapes=True)
        self.graphs = {}  # (rows, size): RecordedStep

    def device_context(self):
        # graphs, events and kernels go to the thread's current device, which is 0 on a new thread
        return torch.cuda.device(self.device)

    def run(self, rows, size, pos):
        if (rows, size) not in self.graphs:
            self.graphs[rows, size] = self._record(rows, size, pos)
        step = self.graphs[rows, size]
        step.pos.copy_(pos)
        step.graph.replay()
        return step.logits

    def _record(self, rows, size, pos):
        pos = pos.clone()
        args = self.last_tokens[:rows], self.cache.narrow(0, rows, size), pos
        stream = torch.cuda.current_stream(self.device)
        side_stream = torch.cuda.Stream(self.device)
        side_stream.wait_stream(stream)
        with torch.cuda.stream(side_stream):
            # the first calls compile and allocate memory, which a graph cannot record
            for _ in range(2):
                self.forward(*args)
        stream.wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        # torch's default stream for captures belongs to the device that captured first
        with torch.cuda.graph(graph, stream=side_stream):
            logits = self.forward(*args)
        return RecordedStep(graph, pos, logits)

    def copy_to_host(self, tensor):
        host = tensor.to("cpu", non_blocking=True, copy=True)  # into pinned memory
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))  # the stream that copies
        return host, event


def make_decode_step(forward, cache, last_tokens, device, fixed_shapes):
    """The DecodeStep for a device; arguments as there."""
    step_class = CudaDecodeStep if device.type == "cuda" else DecodeStep
    return step_class(forward, cache, last_tokens, device, fixed_shapes)


def compile_decode(model, device):
    """A model's decode under torch.compile; None, with a warning, if no compiler works."""
    if device.type == "cpu":
        set_inductor_options_for_few_tokens()
    forward = types.MethodType(copy_function(decode), model)
    # checking the guards on the model's modules at every token costs more than compiling gains
    options = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    compiled = compile_model(forward, device, options=options)
    return None if compiled is forward else compiled


def copy_function(function):
    """A copy of a function with a code object of its own.

    torch.compile looks compiled code up by code object and guards. Without guards on modules it
    would find the step of one model again for the next model, and run it with the first one's
    weights. A code object for each model keeps them apart.
    """
    name = f"{function.__name__}_{next(_function_numbers)}"
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__)


def set_inductor_options_for_few_tokens():
    """Set inductor's options that make its CPU code fast for a few tokens per forward pass."""
    from torch._inductor import config
    config.freezing = True  # weights become constants, in the layout that suits the kernels
    config.cpp.min_chunk_size = 8192  # a few tokens' activations are not worth a second thread
