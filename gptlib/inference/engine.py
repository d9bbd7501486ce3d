"""The KV-cache engine: it continues many sequences of tokens at a time, and knows no text."""

import math
import queue
import random
import statistics
import time
from collections import deque
from dataclasses import dataclass

import torch

from gptlib.inference.decode_step import compile_decode, decode, make_decode_step, next_logits
from gptlib.inference.float32_head import Float32Head, can_give_float32
from gptlib.inference.grouped_attention import group_attention
from gptlib.inference.kv_cache import KVCache
from gptlib.inference.packing import can_pack, pack
from gptlib.inference.prefill_pace import MIN_CHUNK, PASS_COST, PrefillPace
from gptlib.inference.sampling import SamplingParams, sample_next
from gptlib.runtime import without_cudnn_attention
from gptlib.inference.prefix_cache import Slots


class Request:
    """A sequence to be continued. Other threads may read it while the engine's thread fills it.

    tokens: the continuation so far. events: the same tokens as they come, then None.
    finish_reason: None while it goes on; then "stop" (at the stop token, which is not in tokens),
    "length", "error" (the exception is in `error`), or the reason that was given to cancel().
    seed repeats the sample. n_reused: tokens of the prompt that were in the cache already.
    """

    def __init__(self, prompt, params):
        self.prompt = list(prompt)
        self.max_length = params.max_length
        self.sampling = (params.temperature, params.top_k, params.top_p)
        self.seed = params.seed
        # one number a token from a generator of its own: neighbours cannot change the sample
        self.random = random.Random(self.seed)
        self.tokens = []
        self.events = queue.SimpleQueue()
        self.finish_reason = None
        self.error = None
        self.ended = False  # the engine has finished with it and has put None into events
        self.window_start = 0  # the cache holds prompt + tokens from this index on,
        self.pos = 0  # and this many tokens of it
        self.n_reused = 0
        self.n_sampled = 0  # tokens sampled, including those not collected yet

    def window(self):
        """The tokens from window_start on: what the model is to read of the sequence."""
        return (self.prompt + self.tokens)[self.window_start:]

    def cancel(self, reason="cancelled"):
        """Have the engine drop it before the next token; no effect on a finished request."""
        self.finish_reason = self.finish_reason or reason

    def fail(self, error):
        """End it with an exception, unless it has finished already."""
        if not self.finish_reason:
            self.finish_reason = "error"
            self.error = error

    def end(self):
        """Tell the reader of events, once, that no more tokens will come."""
        if not self.ended:
            self.ended = True
            self.events.put(None)


@dataclass
class Filling:
    """The sequence whose tokens are being read into a slot; None as long as it has no slot yet."""
    request: Request
    tokens: list
    slot: int = None
    n_read: int = 0  # tokens that were not in the cache already


@dataclass
class SampledTokens:
    """Tokens that were sampled for these requests and are on their way to the host."""
    requests: list
    host: torch.Tensor  # (len(requests), 1)
    event: object  # the torch.cuda.Event after which host may be read; None: at once


class Engine:
    """Continues up to `slots` sequences of tokens at a time; further requests wait in a queue.

    Each step gives every live sequence one more token, in one forward pass for all. submit() and
    Request.cancel() may be called from any thread, step() from one at a time. The request live[i]
    has slot i of the KV cache. Ids from n_vocab on (padding of the vocabulary) are never sampled;
    stop_token ends a sequence. The model is left in eval mode. A request whose forward pass fails
    ends with "error" and the others go on; should step() itself raise, abort() ends the live
    requests and leaves the engine usable.

    compile=True rounds the shapes of the decode step up to a few and gives it to torch.compile. On
    CUDA the step is recorded as graphs. async_depth is how many steps may be under way before
    their tokens are collected (default: 1 on CUDA, so that the GPU never waits, else 0).

    prefill_chunk: how many tokens of prompts are read in a step while other sequences are live,
    so that these wait only for so long (default: whole prompts); choose_prefill_chunk() has it
    follow from what steps and chunks take. With prefix_reuse the beginning
    of a prompt that a slot holds already, of a sequence that is live or has ended, is copied from
    there. Neither changes the text, except where rounding decides between tokens about equally
    likely: the last bits of keys and values depend on how many tokens were read at a time.
    """

    def __init__(self, model, slots=1, n_vocab=None, stop_token=None, compile=False,
                 async_depth=None, prefill_chunk=None, prefix_reuse=True):
        weight = model.eval().lm_head.weight
        self.device = weight.device
        self.block_size = model.config.block_size
        self.slots = slots
        self.n_vocab = n_vocab or model.config.vocab_size
        self.stop_token = stop_token
        self.prefill_chunk = prefill_chunk
        self.pace = None
        self.live = []
        self.filling = None
        self.waiting = deque()
        self.pending = deque()  # SampledTokens, oldest first

        on_cpu = self.device.type == "cpu"
        # on a CPU attention of one query is several times faster in float32, and more accurate
        self.cache = KVCache.of_model(model, slots, dtype=torch.float32 if on_cpu else None)
        self.contents = Slots(self.cache, keep=prefix_reuse)
        self.last_tokens = torch.zeros(slots, 1, dtype=torch.int64, device=self.device)
        use_packed = on_cpu and not compile and can_pack(weight.dtype)
        self.model = pack(model) if use_packed else model
        if use_packed and can_give_float32(model.lm_head):
            self.model.lm_head = Float32Head(model.lm_head)
        if on_cpu and not compile:
            self.model = group_attention(self.model)
        self.decode_step = self._make_decode_step(compile)
        depth = self.decode_step.async_depth if async_depth is None else async_depth
        self.async_depth = depth

    def _make_decode_step(self, compile):
        compiled = compile_decode(self.model, self.device) if compile else None
        return make_decode_step(compiled or self._decode_eagerly, self.cache, self.last_tokens,
                                self.device, fixed_shapes=compiled is not None)

    def submit(self, prompt, params=None, **settings):
        """Queue token ids to be continued; returns the Request.

        params: SamplingParams, or its fields by name. Of a prompt that is longer than the context
        the last block_size tokens count. Raises UserError for settings out of range.
        """
        request = Request(prompt, params or SamplingParams(**settings))
        assert request.prompt, "a prompt needs at least one token"
        request.window_start = max(0, len(request.prompt) - self.block_size)
        self.waiting.append(request)
        return request

    def warm_up(self):
        """Compile and record the decode step in every shape, so that no request waits for it.

        To be called before the first request is submitted.
        """
        assert not self.live, "the warm-up writes into the cache"
        with torch.inference_mode(), self.decode_step.device_context():
            for rows, size in self.decode_step.fixed_shape_list():
                pos = self._to_device([[0]] * rows)
                self.decode_step.run(rows, size, pos)
        for n in {1, self.slots}:
            for _ in range(n):
                self.submit([0], max_length=2, temperature=0)
            while self.step():
                pass
        self.contents.forget_all()

    def choose_prefill_chunk(self):
        """Have prefill_chunk keep the gaps between tokens within two usual ones.

        The size to begin with is measured: as many tokens as are read in the time of a step of
        all slots, in the worst case, which is steps at the beginning of the context, where they
        are the shortest, and tokens read at its end. On a CPU a PrefillPace then adjusts it to
        what steps and chunks really take. Elsewhere it stays; and where even a few tokens take
        longer than a step, as on a GPU, whose decode step is recorded, it is as many as take
        hardly longer than a few. To be called before the first request is submitted.
        """
        assert not self.live, "the measurement writes into the cache"
        if self.block_size < 2 * MIN_CHUNK:
            self.prefill_chunk = self.block_size  # there is nothing to divide
            return
        self.prefill_chunk, seconds = self._measure_prefill_chunk()
        if self.device.type == "cpu":
            self.pace = PrefillPace(self.prefill_chunk, seconds, self.block_size)

    def _measure_prefill_chunk(self):
        """The chunk to begin with, and the seconds that it took."""
        rows, size = self.decode_step.shape(self.slots, min(16, self.block_size))
        positions = self._to_device([[0]] * rows)

        def read(n):
            end = self.block_size - 1  # the last one is left out, so that no logits are made
            self._read([0] * self.block_size, end - n, end, slot=0)

        with torch.inference_mode(), self.decode_step.device_context():
            limit = self._time(lambda: self.decode_step.run(rows, size, positions))
            largest = self.block_size // 2
            chunk = n = MIN_CHUNK
            seconds = self._time(lambda: read(chunk))
            limit = max(limit, 1.2 * seconds)
            while n < largest and n == chunk:
                n = min(n + n // 4, largest)
                longer = self._time(lambda n=n: read(n))
                if longer <= limit:
                    chunk, seconds = n, longer
        return chunk, seconds

    def _time(self, work):
        """Seconds that work takes, the median of three times after a first one."""
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            work()
            self.last_tokens.tolist()  # waits until the device is done
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])

    def step(self):
        """Retire finished requests, admit waiting ones, sample one token for each.

        Returns False when idle.
        """
        with torch.inference_mode(), self.decode_step.device_context():
            self._retire_finished()
            self._admit_at_pace()
            self._roll_contexts()
            if self.live:
                start = time.perf_counter()
                self._decode_and_sample()
                if self.pace:
                    self.pace.note_step(time.perf_counter() - start)
            allowed = self.async_depth if self.live else 0
            while len(self.pending) > allowed:
                self._collect()
        return bool(self.live or self.filling or self.waiting)

    def abort(self, error):
        """End all requests that have or had a slot with this error; waiting ones stay queued."""
        requests = list(self.live)
        if self.filling:
            requests.append(self.filling.request)
        for sampled in self.pending:
            requests += sampled.requests
        for request in requests:
            request.fail(error)
            request.end()
        self.live.clear()
        self.pending.clear()
        self.filling = None
        self.contents.forget_all()  # the step may have failed while it moved them

    def _retire_finished(self):
        for slot in reversed(range(len(self.live))):
            if self.live[slot].finish_reason:
                self._retire(slot)
        if self.filling and self.filling.request.finish_reason:
            self.filling.request.end()
            self.filling = None  # its slot holds what has been read so far
        for request in list(self.waiting):
            if request.finish_reason:
                self.waiting.remove(request)
                request.end()

    def _admit_at_pace(self):
        """_admit() as much as the others can wait for; notes how long it took."""
        others_wait = bool(self.live)
        if self.pace:
            self.prefill_chunk = self.pace.next_chunk()
        start = time.perf_counter()
        n_tokens, n_passes = self._admit()
        if self.pace and others_wait and n_tokens:
            self.pace.note_read(n_tokens, n_passes, time.perf_counter() - start)

    def _admit(self):
        """Read prompts while there are slots, and sample the first token of each.

        While other sequences are live, no more is read than prefill_chunk allows; the next step
        goes on from there. Returns how many tokens were read, and in how many passes.
        """
        budget = self.prefill_chunk + PASS_COST if self.prefill_chunk else math.inf
        n_tokens = n_passes = 0
        previous = None  # tokens, slot and logits of the sequence admitted before
        while self._take_waiting():
            filling = self.filling
            try:
                if previous and previous[0] == filling.tokens:
                    # several samples of one prompt: it is read once
                    logits = previous[2]
                    self._claim_slot(previous[1], len(filling.tokens))
                else:
                    n = len(filling.tokens) - filling.request.pos
                    if self.live:
                        n = min(n, budget - PASS_COST)
                        budget -= n + PASS_COST
                    if n <= 0:
                        break
                    n_passes += 1
                    n_tokens -= filling.n_read
                    logits = self._fill(n)
                    n_tokens += filling.n_read
                if logits is not None:
                    slot = self._make_live()
                    previous = filling.tokens, slot, logits
                    self._sample(slot, logits)
            except Exception as error:
                self._drop(filling.request, error)
                previous = None  # this one may have written into its slot
        return n_tokens, n_passes

    def _take_waiting(self):
        """Have a sequence to fill, if any waits and there is a slot; returns whether there is."""
        while not self.filling and self.waiting and len(self.live) < self.slots:
            request = self.waiting.popleft()
            if request.finish_reason:
                request.end()
            else:
                self.filling = Filling(request, request.window())
        return self.filling is not None

    def _claim_slot(self, source, n_shared):
        """Give the sequence a slot, which begins with n_shared tokens of the slot `source`."""
        filling, request = self.filling, self.filling.request
        filling.slot = len(self.live)
        self.contents.claim(filling.slot, source, n_shared)
        request.pos = n_shared
        if not request.n_sampled:
            request.n_reused = n_shared

    def _fill(self, n):
        """Read up to n more tokens; returns the next logits, (1, vocab_size), after the last."""
        filling, request = self.filling, self.filling.request
        if filling.slot is None:
            self._claim_slot(*self.contents.find(filling.tokens, self.live))
        end = min(request.pos + n, len(filling.tokens))
        logits = self._read(filling.tokens, request.pos, end, filling.slot)
        filling.n_read += end - request.pos
        request.pos = end
        self.contents.hold(filling.slot, request)
        return logits

    def _read(self, tokens, start, end, slot):
        """Fill a slot with tokens[start:end]; returns the next logits, None before the last."""
        idx = self._to_device([tokens[start:end]])
        # nearly every prompt has a length of its own
        with without_cudnn_attention(self.device):
            if start == 0:
                attention = self.cache.narrow(slot, 1, self.block_size).from_start()
            else:
                pos = torch.arange(start, end, device=self.device)[None]  # (1, end - start)
                attention = self.cache.narrow(slot, 1, end).at(pos)
            if end == len(tokens):
                return next_logits(self.model, idx, attention)
            self.model.hidden(idx, attention)

    def _make_live(self):
        """Let the sequence that has been filled be decoded; returns its slot."""
        slot, request = len(self.live), self.filling.request
        self.contents.move(self.filling.slot, slot, request.pos)  # where others ended meanwhile
        self.live.append(request)
        self.filling = None
        return slot

    def _drop(self, request, error):
        """End a request that has failed while it was filled or sampled for the first time."""
        request.fail(error)
        if request in self.live:
            self._retire(self.live.index(request))
            return
        if self.filling.slot is not None:
            self.contents.forget(self.filling.slot)
        self.filling = None
        request.end()

    def _roll_contexts(self):
        """Make room in the sequences that have filled the context."""
        slot = 0
        while slot < len(self.live):
            if self.live[slot].pos < self.block_size:
                slot += 1
            else:
                self._roll_context(slot)

    def _roll_context(self, slot):
        """Drop the oldest half of a sequence's context and have the rest read like a prompt.

        It leaves its slot, and is the first to get one in the next step.
        """
        request = self.live[slot]
        while self.pending:  # the tokens already sampled are part of what is read
            self._collect()
        self._retire(slot)
        if not request.finish_reason:
            request.window_start += max(1, self.block_size // 2)
            request.pos = 0
            self.waiting.appendleft(request)

    def _decode_eagerly(self, idx, cache, pos):
        return decode(self.model, idx, cache, pos)

    def _decode_and_sample(self):
        try:
            logits = self._decode()
        except Exception:
            self._decode_one_by_one()
        else:
            self._sample(0, logits)

    def _decode(self):
        """Feed each live sequence its last token; returns the next logits, (live, vocab_size)."""
        n_live = len(self.live)
        positions = [request.pos for request in self.live]
        rows, size = self.decode_step.shape(n_live, max(positions) + 1)
        positions += [0] * (rows - n_live)
        for request in self.live:
            request.pos += 1
        if rows > n_live:
            # a row without a sequence writes what its slot has at position 0 already
            unused = self.contents.first_tokens(n_live, rows)
            self.last_tokens[n_live:rows] = self._to_device(unused)[:, None]
        pos = self._to_device(positions)[:, None]  # (rows, 1)
        return self.decode_step.run(rows, size, pos)[:n_live]

    def _decode_one_by_one(self):
        """After a failed pass over all sequences: only those that fail alone end with the error."""
        # from the last slot on: a retired request's slot is taken by the last one
        for slot in reversed(range(len(self.live))):
            request = self.live[slot]
            pos = len(request.prompt) + request.n_sampled - 1 - request.window_start
            request.pos = pos + 1
            cache = self.cache.narrow(slot, 1, pos + 1)
            try:
                idx = self.last_tokens[slot:slot + 1]
                self._sample(slot, self._decode_eagerly(idx, cache, self._to_device([[pos]])))
            except Exception as error:
                request.fail(error)
                self._retire(slot)

    def _sample(self, first_slot, logits):
        """Sample a token for the sequences from first_slot on, one for each row of logits.

        A request that has all the tokens it asked for leaves its slot.
        """
        requests = self.live[first_slot:first_slot + logits.size(0)]
        logits = logits[:, :self.n_vocab]
        tokens = self.last_tokens[first_slot:first_slot + len(requests)]  # a view
        noise = self._to_device([request.random.random() for request in requests])[:, None]
        rows_by_sampling = {}
        for row, request in enumerate(requests):
            rows_by_sampling.setdefault(request.sampling, []).append(row)
            request.n_sampled += 1
        if len(rows_by_sampling) == 1:
            tokens.copy_(sample_next(logits, *requests[0].sampling, noise=noise))
        else:
            for sampling, rows in rows_by_sampling.items():
                rows = self._to_device(rows)
                tokens[rows] = sample_next(logits[rows], *sampling, noise=noise[rows])
        self.pending.append(SampledTokens(requests, *self.decode_step.copy_to_host(tokens)))
        for row in reversed(range(len(requests))):
            if requests[row].n_sampled == requests[row].max_length:
                self._retire(first_slot + row)

    def _collect(self):
        """Hand the oldest pending tokens to their requests."""
        sampled = self.pending.popleft()
        if sampled.event:
            sampled.event.synchronize()
        tokens = sampled.host[:, 0].tolist()
        for request, token in zip(sampled.requests, tokens, strict=True):
            if not request.finish_reason and token == self.stop_token:
                request.finish_reason = "stop"
            elif not request.finish_reason:
                request.tokens.append(token)
                request.events.put(token)
                if len(request.tokens) == request.max_length:
                    request.finish_reason = "length"
            if request.finish_reason:
                request.end()

    def _retire(self, slot):
        """Free a slot. The request of the last slot moves there: live slots stay side by side.

        What the slot held is kept, in the place of the last one, for prompts that begin like it.
        """
        request, last = self.live[slot], self.live.pop()
        last_slot = len(self.live)
        if slot != last_slot:
            self.live[slot] = last
            self.contents.exchange(slot, request, last_slot, last)
            self.last_tokens[slot] = self.last_tokens[last_slot]
        self.contents.release(last_slot, request)
        if request.finish_reason:
            request.end()

    def _to_device(self, values):
        return torch.tensor(values).to(self.device, non_blocking=True)
