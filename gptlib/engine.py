"""The KV-cache engine: tokens in, tokens out, many sequences at a time; and their text as it comes."""

import codecs
import importlib
import math
import queue
import random
import types
from collections import deque

import torch

from gptlib.common import UserError, warn
from gptlib.packing import can_pack, pack
from gptlib.runtime import compile_model
from gptlib.sampling import sample_next


class Request:
    """A sequence to be continued, as the engine sees it. Other threads may read it while the engine's thread fills it.

    tokens: the continuation so far; events: the same tokens as they come, then None; finish_reason: None while it goes on,
    then "stop" (at the stop token, which is not in tokens), "length", "error" (the exception is in `error`), or what
    cancel() was told. Raises UserError for settings out of range. temperature 0 is greedy; without a seed it takes one, in
    `seed`, that repeats the sample.
    """

    def __init__(self, prompt, max_length=100, temperature=1.0, top_k=None, top_p=None, seed=None):
        def check(name, value, kinds, fits, expected):
            if type(value) not in kinds or not fits(value):
                raise UserError(f"{name} is {value!r}: expected {expected}")

        check("max_length", max_length, (int,), lambda n: n >= 1, "a whole number of at least 1")
        check("temperature", temperature, (int, float), lambda t: 0 <= t < math.inf, "0 (greedy) or above")
        if top_k is not None:
            check("top_k", top_k, (int,), lambda k: k >= 1, "a whole number of at least 1")
        if top_p is not None:
            check("top_p", top_p, (int, float), lambda p: 0 < p <= 1, "a number above 0 and up to 1")
        if seed is not None:
            check("seed", seed, (int,), lambda n: n >= 0, "a whole number of at least 0")
        temperature = float(temperature) if temperature > 1e-6 else 0.0  # logits / 1e-39 are no numbers any more
        self.prompt, self.max_length, self.how = list(prompt), max_length, (temperature, top_k, top_p)
        self.seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        self.noise = random.Random(self.seed)  # its own, a number a token: no neighbour can change what it draws
        self.tokens = []
        self.events = queue.SimpleQueue()
        self.finish_reason = self.error = None
        self.ended = False  # the engine is done with it, and has said so in events
        self.window = 0  # what is in the cache begins here in prompt + tokens,
        self.pos = 0  # and is so many tokens long
        self.drawn = 0  # tokens drawn, those that are still on the device included

    def cancel(self, reason="cancelled"):
        """Let the engine drop it before the next token; a request that has finished stays as it is."""
        self.finish_reason = self.finish_reason or reason


class Engine:
    """Continues up to `slots` sequences of tokens at a time, each by a token in one forward pass; more wait in a queue.

    submit() and Request.cancel() may be called from any thread, step() from one. Ids from n_vocab on (padding of the
    vocabulary) are never drawn; stop_token ends a sequence. The request live[i] has slot i of the KV cache. The model is
    left in eval mode. A request whose forward pass fails ends with "error", the others go on; should step() itself raise,
    abort() ends those that were live and leaves the engine fit to go on.

    compile=True fixes the shapes of the decode step, pads its rows to 1 or `slots`, and gives it to torch.compile. On CUDA
    it is recorded as a graph, and the next token is under way before the last is looked at: nothing waits for the host.
    """

    def __init__(self, model, slots=1, n_vocab=None, stop_token=None, compile=False):
        weight = model.eval().lm_head.weight
        self.device, self.block_size, self.slots = weight.device, model.config.block_size, slots
        self.n_vocab, self.stop_token = n_vocab or model.config.vocab_size, stop_token
        on_cpu = self.device.type == "cpu"
        # attention of a single query is several times faster in float32 on a CPU, and closer to the truth
        self.cache = model.new_cache(slots, dtype=torch.float32 if on_cpu else None)
        self.model = pack(model) if on_cpu and not compile and can_pack(weight.dtype) else model
        self.new = torch.zeros(slots, 1, dtype=torch.int64, device=self.device)  # the token drawn last in each slot
        self.live, self.waiting = [], deque()
        self.pending = deque()  # (requests, the token drawn for each, event of its copy to the host)
        self.lag = 1 if self.device.type == "cuda" else 0
        self.compiled = None
        if compile:
            if on_cpu:
                inductor = importlib.import_module("torch._inductor.config")
                inductor.freezing = True  # weights become constants, in the layout that suits the kernels
                inductor.cpp.min_chunk_size = 8192  # the activations of a few tokens are not worth a second thread
            # What was compiled is found again by code object and guards. Those on modules take longer to check than is won,
            # and without them the next engine would find the weights of this one: so each gets a code object of its own.
            code = Engine._forward.__code__.replace(co_name=f"_forward_{id(self)}")
            forward = types.MethodType(types.FunctionType(code, globals()), self)
            compiled = compile_model(forward, self.device,
                                     options={"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe})
            self.compiled = None if compiled is forward else compiled
        self.graphs = {}  # (rows, size): (graph, its input, its output)

    def submit(self, prompt, **settings):
        """Queue token ids to be continued; returns the Request. Of a long prompt the last block_size tokens count."""
        request = Request(prompt, **settings)
        assert request.prompt, "the first token has to follow from something"
        request.window = max(0, len(request.prompt) - self.block_size)
        self.waiting.append(request)
        return request

    def warm_up(self):
        """Have the decode step compiled or recorded before anybody waits for it."""
        for n in {1, self.slots}:
            for _ in range(n):
                self.submit([0], max_length=2, temperature=0)
            while self.step():
                pass

    @torch.inference_mode()
    def step(self):
        """Draw a token for every sequence, between tokens let go who has ended and let in who waits. False: all is done."""
        for slot in reversed(range(len(self.live))):
            if self.live[slot].finish_reason:
                self._remove(slot)
        for request in [r for r in list(self.waiting) if r.finish_reason]:
            self.waiting.remove(request)
            self._end(request)
        self._admit()
        self._slide()
        if self.live:
            try:
                logits = self._decode()
            except Exception:
                self._decode_alone()
            else:
                self._draw(0, logits)
        while len(self.pending) > (self.lag if self.live else 0):
            self._look()
        return bool(self.live or self.waiting)

    def abort(self, error):
        """End every request that has or had a slot with this error; those that wait may still be served."""
        for request in {id(r): r for r in [*self.live, *(r for requests, *_ in self.pending for r in requests)]}.values():
            self._fail(request, error)
            self._end(request)
        self.live.clear()
        self.pending.clear()

    def _fail(self, request, error):
        if not request.finish_reason:
            request.finish_reason, request.error = "error", error

    def _admit(self):
        last = None  # slot and logits of the request admitted last
        while self.waiting and len(self.live) < self.slots:
            request = self.waiting.popleft()
            if request.finish_reason:
                self._end(request)
                continue
            slot = len(self.live)
            self.live.append(request)
            try:
                if last and last[0].prompt == request.prompt:  # samples of one prompt: it is read once
                    request.pos = last[0].pos
                    self._copy(last[1], slot, request.pos)
                    logits = last[2]
                else:
                    logits = self._prefill(slot)
                self._draw(slot, logits)
                last = request, slot, logits
            except Exception as error:
                self._fail(request, error)
                self._remove(slot)

    def _slide(self):
        """Where a sequence fills the context drop its oldest half, and read the rest again."""
        slot = 0
        while slot < len(self.live):
            request = self.live[slot]
            if request.pos < self.block_size:
                slot += 1
                continue
            while self.pending:  # what it has drawn is part of what is read
                self._look()
            if request.finish_reason:
                self._remove(slot)
            else:
                request.window += max(1, self.block_size // 2)
                try:
                    self._draw(slot, self._prefill(slot))
                except Exception as error:
                    self._fail(request, error)
                    self._remove(slot)

    def _prefill(self, slot):
        """Read a sequence into its slot in one pass; the logits of its next token, (1, vocab_size)."""
        request = self.live[slot]
        tokens = (request.prompt + request.tokens)[request.window:]
        request.pos = len(tokens)
        idx = self._tensor([tokens])
        return self._forward(idx, None, self.cache.narrow(slot, 1, self.block_size))

    def _decode(self):
        """Feed each live sequence the token drawn last; the logits of its next, (live, vocab_size)."""
        B = len(self.live)
        rows, size = B, max(r.pos for r in self.live) + 1
        if self.compiled or self.device.type == "cuda":  # few shapes, so that few are compiled or recorded
            step = 256 if self.device.type == "cuda" else 64
            rows, size = 1 if B == 1 else self.slots, min(-(-size // step) * step, self.block_size)
        pos = self._tensor([[r.pos] for r in self.live] + [[0]] * (rows - B))
        for request in self.live:
            request.pos += 1
        if self.device.type == "cuda":
            return self._replay(rows, size, pos)[:B]
        cache = self.cache.narrow(0, rows, size)
        if self.compiled:
            for tensor in cache.keys + cache.values:
                torch._dynamo.mark_dynamic(tensor, 2)
        return (self.compiled or self._forward)(self.new[:rows], pos, cache)[:B]

    def _decode_alone(self):
        """Where the pass over all live sequences has failed, one for each: only those that fail by themselves end."""
        for slot in reversed(range(len(self.live))):  # from the last, which takes the place of one that leaves
            request = self.live[slot]
            at = len(request.prompt) + request.drawn - 1 - request.window
            try:
                request.pos = at + 1
                self._draw(slot, self._forward(self.new[slot:slot + 1], self._tensor([[at]]),
                                               self.cache.narrow(slot, 1, at + 1)))
            except Exception as error:
                self._fail(request, error)
                self._remove(slot)

    def _forward(self, idx, pos, cache):
        return self.model.lm_head(self.model.hidden(idx, cache, pos)[:, -1])

    def _replay(self, rows, size, pos):
        """The decode step as a CUDA graph: one launch in the place of hundreds."""
        if (rows, size) not in self.graphs:
            pos_in = pos.clone()
            args = self.new[:rows], pos_in, self.cache.narrow(0, rows, size)
            forward = self.compiled or self._forward
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                for _ in range(2):  # compile, choose kernels, allocate workspaces: none of that can be recorded
                    forward(*args)
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = forward(*args)
            self.graphs[rows, size] = graph, pos_in, logits
        graph, pos_in, logits = self.graphs[rows, size]
        pos_in.copy_(pos)
        graph.replay()
        return logits

    def _draw(self, first, logits):
        """Draw a token for the sequences from slot `first` on, a row of logits each; those that have all they want leave."""
        requests = self.live[first:first + logits.size(0)]
        logits = logits[:, :self.n_vocab]
        new = self.new[first:first + len(requests)]
        noise = self._tensor([[r.noise.random()] for r in requests])
        groups = {}
        for row, request in enumerate(requests):
            groups.setdefault(request.how, []).append(row)
            request.drawn += 1
        if len(groups) == 1:
            new.copy_(sample_next(logits, *requests[0].how, noise=noise))
        else:
            for how, rows in groups.items():
                rows = self._tensor(rows)
                new[rows] = sample_next(logits[rows], *how, noise=noise[rows])
        host, event = new.clone(), None
        if self.device.type == "cuda":
            host, event = new.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.pending.append((requests, host, event))
        for row in reversed(range(len(requests))):
            if requests[row].drawn == requests[row].max_length:
                self._remove(first + row)

    def _look(self):
        """Hand out the tokens that were drawn first of those not yet handed out."""
        requests, host, event = self.pending.popleft()
        if event:
            event.synchronize()
        for request, token in zip(requests, host[:, 0].tolist(), strict=True):
            if not request.finish_reason and token == self.stop_token:
                request.finish_reason = "stop"
            elif not request.finish_reason:
                request.tokens.append(token)
                request.events.put(token)
                if len(request.tokens) == request.max_length:
                    request.finish_reason = "length"
            if request.finish_reason:
                self._end(request)

    def _remove(self, slot):
        """Take a request out of its slot; that of the last slot moves there, so that the live ones stay side by side."""
        request, mover = self.live[slot], self.live.pop()
        if slot < len(self.live):
            self.live[slot] = mover
            self._copy(len(self.live), slot, mover.pos)
            self.new[slot] = self.new[len(self.live)]
        if request.finish_reason:
            self._end(request)

    def _copy(self, a, b, length):
        if a != b:
            for tensor in self.cache.keys + self.cache.values:
                tensor[b, :, :length] = tensor[a, :, :length]

    def _end(self, request):
        if not request.ended:
            request.ended = True
            request.events.put(None)

    def _tensor(self, values):
        return torch.tensor(values).to(self.device, non_blocking=True)


class TextStream:
    """Iterate over a request's text as it comes: whole characters only, up to a stop string and without it.

    step: what makes the engine go on where no other thread does. Afterwards `text` is all of it, n_tokens the tokens it
    took, and request.finish_reason says why it ended.
    """

    def __init__(self, request, tokenizer, stop=(), step=None):
        self.request, self.tokenizer, self.stop, self.step = request, tokenizer, [s for s in stop if s], step
        self.text, self.n_tokens = "", 0

    def __iter__(self):
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # keeps the bytes of half a character
        held = ""  # what may be the beginning of a stop string
        while True:
            while self.step and self.request.events.empty():
                self.step()
            token = self.request.events.get()
            last = token is None
            held += decoder.decode(b"" if last else self.tokenizer.decode_single_token_bytes(token), last)
            self.n_tokens += not last
            found = min((i for i in map(held.find, self.stop) if i >= 0), default=None)
            if found is not None:
                self.request.finish_reason = "stop"  # the engine drops it, if it has not already come to another end
                piece, last = held[:found], True
            else:
                keep = 0 if last else max((n for s in self.stop for n in range(1, len(s)) if held.endswith(s[:n])),
                                          default=0)
                piece, held = held[:len(held) - keep], held[len(held) - keep:]
            if piece:
                self.text += piece
                yield piece
            if last:
                return


def encode_prompt(model, tokenizer, prompt):
    """Token ids of a text; an empty one is <|endoftext|>, the beginning of a document. Says what the context cuts off."""
    tokens = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    cut = len(tokens) - model.config.block_size
    if cut > 0:
        warn(f"the prompt has {len(tokens)} tokens, the context {model.config.block_size}: the first {cut} are left out, "
            f"it begins at {tokenizer.decode(tokens[cut:cut + 12])!r}")
    return tokens
