"""The KV-cache engine: it continues many sequences of tokens at a time, and knows no text.

One thing has one name on each level: a `Sequence` of tokens here, a `Job` of several sequences in
the service, an HTTP request with its samples or choices at the edge.
"""

import math
import queue
import random
from collections import deque
from dataclasses import dataclass

import torch

from gptlib.inference.cpu_layers import use_cpu_layers
from gptlib.inference.decode_step import (compile_decode, make_decode_step, next_logits,
                                          project_to_logits)
from gptlib.inference.kv_cache import GroupedAttention, KVCache
from gptlib.inference.logprobs import TokenLogprob, logprobs_from_hidden, logprobs_of
from gptlib.inference.prefix_cache import PrefixCache
from gptlib.inference.sampling import SamplingParams, sample_next
from gptlib.runtime import without_cudnn_attention

# a forward pass costs about as much as this many tokens more in another one
PASS_COST = 16


class Sequence:
    """Tokens to be continued. Other threads may read it while the engine's thread fills it.

    tokens: the continuation so far. events: the same tokens as they come, then None.
    finish_reason: None until it ends, then "stop" (at the stop token, which is not in tokens),
    "length", "error" (the exception is in `error`), or the reason given to cancel(). seed: repeats
    the sample. n_reused: how many tokens of the prompt were in the cache already.

    n_logprobs: None, or how many of the likeliest tokens to name beside each sampled one; then
    `logprobs` has a TokenLogprob for each sampled token, the stop token included. With of_prompt
    `prompt_logprobs` has one for each token of the prompt, which must fit the context.
    """

    def __init__(self, prompt, params, n_logprobs=None, of_prompt=False):
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
        self.window_start = 0  # the cache holds prompt + tokens from this index on
        self.pos = 0  # how many of these tokens the cache holds
        self.n_reused = 0
        self.n_sampled = 0  # tokens sampled, including those not collected yet
        self.n_logprobs = n_logprobs
        self.of_prompt = of_prompt
        self.logprobs = []
        self.prompt_logprobs = [TokenLogprob(self.prompt[0], None, [])] if of_prompt else []

    def window(self):
        """The tokens from window_start on, which the model has to read."""
        return (self.prompt + self.tokens)[self.window_start:]

    def cancel(self, reason="cancelled"):
        """Have the engine drop it before its next token, unless it has finished."""
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
    """The sequence whose tokens are being read into a slot."""
    sequence: Sequence
    tokens: list
    slot: int = None  # it gets one when its first tokens are read


@dataclass
class SampledTokens:
    """Tokens that were sampled for these sequences and are on their way to the host."""
    sequences: list
    host: torch.Tensor  # (len(sequences), 1)
    event: object  # the torch.cuda.Event after which host may be read; None: at once


class Engine:
    """Continues up to `slots` sequences of tokens at a time; further ones wait in a queue.

    Each step gives every live sequence one more token, in one forward pass for all. submit() and
    Sequence.cancel() may be called from any thread, step() from one at a time. The sequence live[i]
    has slot i of the KV cache. Ids from n_vocab on (padding of the vocabulary) are never sampled;
    stop_token ends a sequence. The model is left in eval mode. A sequence whose forward pass fails
    ends with "error" and the others go on; if step() itself raises, abort() ends the live
    sequences and leaves the engine usable.

    compile=True rounds the shapes of the decode step up to a few and gives it to torch.compile. On
    CUDA the step is recorded as graphs. async_depth is how many steps may be under way before
    their tokens are collected (default: 1 on CUDA, so that the GPU never waits, else 0).

    prefill_chunk: how many tokens of prompts are read in a step while other sequences are live,
    so that these wait only for so long; 0: whole prompts. With prefix_reuse the beginning of a
    prompt that a slot holds already, of a sequence that is live or has ended, is copied from
    there. Neither changes the text, except if rounding decides between tokens about equally
    likely: the last bits of keys and values depend on how many tokens were read at a time.
    """

    def __init__(self, model, slots=1, n_vocab=None, stop_token=None, compile=False,
                 async_depth=None, prefill_chunk=0, prefix_reuse=True):
        weight = model.eval().lm_head.weight
        self.device = weight.device
        self.block_size = model.config.block_size
        self.slots = slots
        self.n_vocab = n_vocab or model.config.vocab_size
        self.stop_token = stop_token
        self.prefill_chunk = prefill_chunk
        self.live = []
        self.filling = None
        self.waiting = deque()
        self.pending = deque()  # SampledTokens, oldest first

        self.is_cpu = self.device.type == "cpu"
        # on a CPU attention of one query is several times faster in float32, and more accurate
        self.cache = KVCache.of_model(model, slots, dtype=torch.float32 if self.is_cpu else None)
        self.prefixes = PrefixCache(self.cache, keep=prefix_reuse)
        self.last_tokens = torch.zeros(slots, 1, dtype=torch.int64, device=self.device)
        self.model = use_cpu_layers(model) if self.is_cpu and not compile else model
        compiled = compile_decode(self.model, self.device) if compile else None
        self.decode_step = make_decode_step(
            compiled or self._decode_eagerly, self.cache, self.last_tokens, self.device,
            fixed_shapes=compiled is not None)
        depth = self.decode_step.async_depth if async_depth is None else async_depth
        self.async_depth = depth

    def submit(self, prompt, params=None, n_logprobs=None, of_prompt=False, **settings):
        """Queue token ids to be continued; returns the Sequence.

        params: SamplingParams, or its fields by name. n_logprobs, of_prompt: see Sequence. Of a
        prompt that is longer than the context the last block_size tokens count. Raises UserError
        for settings out of range.
        """
        params = params or SamplingParams(**settings)
        assert len(prompt) > 0, "a prompt needs at least one token"
        assert not of_prompt or len(prompt) <= self.block_size
        sequence = Sequence(prompt, params, n_logprobs, of_prompt)
        sequence.window_start = max(0, len(sequence.prompt) - self.block_size)
        self.waiting.append(sequence)
        return sequence

    def warm_up(self):
        """Compile and record the decode step in every shape, so that no sequence waits for it.

        Call it before the first sequence is submitted.
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
        self.prefixes.forget_all()

    def step(self):
        """Retire finished sequences, admit waiting ones, sample one token for each.

        Returns False when idle.
        """
        with torch.inference_mode(), self.decode_step.device_context():
            self._retire_finished()
            self._admit()
            self._roll_contexts()
            if self.live:
                self._decode_and_sample()
            allowed = self.async_depth if self.live else 0
            while len(self.pending) > allowed:
                self._collect()
        return bool(self.live or self.filling or self.waiting)

    def abort(self, error):
        """End all sequences that have or had a slot with this error; waiting ones stay queued."""
        sequences = list(self.live)
        if self.filling:
            sequences.append(self.filling.sequence)
        for sampled in self.pending:
            sequences += sampled.sequences
        for sequence in sequences:
            sequence.fail(error)
            sequence.end()
        self.live.clear()
        self.pending.clear()
        self.filling = None
        self.prefixes.forget_all()  # the step may have failed while it moved them

    def _retire_finished(self):
        for slot in reversed(range(len(self.live))):
            if self.live[slot].finish_reason:
                self._retire(slot)
        if self.filling and self.filling.sequence.finish_reason:
            self.filling.sequence.end()
            self.filling = None  # its slot holds what has been read so far
        for sequence in list(self.waiting):
            if sequence.finish_reason:
                self.waiting.remove(sequence)
                sequence.end()

    def _admit(self):
        """Read prompts while there are slots, and sample the first token of each.

        While other sequences are live, no more is read than prefill_chunk allows; the next step
        goes on from there.
        """
        budget = self.prefill_chunk + PASS_COST if self.prefill_chunk else math.inf
        previous = None  # tokens, slot and logits of the sequence admitted before
        while self._take_waiting():
            filling = self.filling
            try:
                is_twin = previous and previous[0] == filling.tokens
                if is_twin and not filling.sequence.of_prompt:
                    # several samples of one prompt: it is read once
                    logits = previous[2]
                    self._claim_slot(previous[1], len(filling.tokens))
                else:
                    n = len(filling.tokens) - filling.sequence.pos
                    if self.live:
                        n = min(n, budget - PASS_COST)
                        budget -= n + PASS_COST
                    if n <= 0:
                        break
                    logits = self._fill(n)
                if logits is not None:
                    slot = self._make_live()
                    previous = filling.tokens, slot, logits
                    self._sample(slot, logits)
            except Exception as error:
                self._drop(filling.sequence, error)
                previous = None  # this one may have written into its slot

    def _take_waiting(self):
        """Take a waiting sequence to fill if there is a slot; returns whether one is filled."""
        while not self.filling and self.waiting and len(self.live) < self.slots:
            sequence = self.waiting.popleft()
            if sequence.finish_reason:
                sequence.end()
            else:
                self.filling = Filling(sequence, sequence.window())
        return self.filling is not None

    def _claim_slot(self, source, n_shared):
        """Give the sequence a slot, which begins with n_shared tokens of the slot `source`."""
        filling, sequence = self.filling, self.filling.sequence
        filling.slot = len(self.live)
        self.prefixes.claim(filling.slot, source, n_shared)
        sequence.pos = n_shared
        if not sequence.n_sampled:
            sequence.n_reused = n_shared

    def _fill(self, n):
        """Read up to n more tokens; returns the next logits, (1, vocab_size), after the last."""
        filling, sequence = self.filling, self.filling.sequence
        # a prompt whose log-probabilities are asked for is read as a whole
        is_whole = sequence.of_prompt and not sequence.n_sampled
        if filling.slot is None:
            found = (None, 0) if is_whole else self.prefixes.find(filling.tokens, self.live)
            self._claim_slot(*found)
        end = min(sequence.pos + n, len(filling.tokens))
        x = self._read(filling.tokens, sequence.pos, end, filling.slot)
        logits = None
        if end == len(filling.tokens):
            logits = project_to_logits(self.model.lm_head, x[:, -1])
        if is_whole:
            targets = filling.tokens[sequence.pos + 1:end + 1]
            sequence.prompt_logprobs += logprobs_from_hidden(
                self.model.lm_head, x[0, :len(targets)], targets, self.n_vocab,
                sequence.n_logprobs)
        sequence.pos = end
        self.prefixes.hold(filling.slot, sequence)
        return logits

    def _read(self, tokens, start, end, slot):
        """Fill a slot with tokens[start:end]; returns their hidden states, (1, T, n_embd)."""
        idx = self._to_device([tokens[start:end]])
        # nearly every prompt has a length of its own
        with without_cudnn_attention(self.device):
            if start == 0:
                attention = self.cache.narrow(slot, 1, self.block_size).from_start()
            else:
                pos = torch.arange(start, end, device=self.device)[None]  # (1, end - start)
                attention = self.cache.narrow(slot, 1, end).at(pos)
            return self.model.hidden(idx, attention)

    def _make_live(self):
        """Let the sequence that has been filled be decoded; returns its slot."""
        slot, sequence = len(self.live), self.filling.sequence
        self.prefixes.move(self.filling.slot, slot, sequence.pos)  # others may have ended meanwhile
        self.live.append(sequence)
        self.filling = None
        return slot

    def _drop(self, sequence, error):
        """End a sequence that has failed while it was filled or sampled for the first time."""
        sequence.fail(error)
        if sequence in self.live:
            self._retire(self.live.index(sequence))
            return
        if self.filling.slot is not None:
            self.prefixes.forget(self.filling.slot)
        self.filling = None
        sequence.end()

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
        sequence = self.live[slot]
        while self.pending:  # the tokens already sampled are part of what is read
            self._collect()
        self._retire(slot)
        if not sequence.finish_reason:
            sequence.window_start += max(1, self.block_size // 2)
            sequence.pos = 0
            self.waiting.appendleft(sequence)

    def _decode_eagerly(self, idx, cache, pos):
        attention = GroupedAttention(cache, pos) if self.is_cpu else cache.at(pos)
        return next_logits(self.model, idx, attention)

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
        positions = [sequence.pos for sequence in self.live]
        rows, size = self.decode_step.shape(n_live, max(positions) + 1)
        positions += [0] * (rows - n_live)
        for sequence in self.live:
            sequence.pos += 1
        if rows > n_live:
            # a row without a sequence writes what its slot has at position 0 already
            unused = self.prefixes.first_tokens(n_live, rows)
            self.last_tokens[n_live:rows] = self._to_device(unused)[:, None]
        pos = self._to_device(positions)[:, None]  # (rows, 1)
        return self.decode_step.run(rows, size, pos)[:n_live]

    def _decode_one_by_one(self):
        """After a failed pass over all sequences: only those that fail alone end with the error."""
        # from the last slot on: a retired sequence's slot is taken by the last one
        for slot in reversed(range(len(self.live))):
            sequence = self.live[slot]
            pos = len(sequence.prompt) + sequence.n_sampled - 1 - sequence.window_start
            sequence.pos = pos + 1
            cache = self.cache.narrow(slot, 1, pos + 1)
            try:
                idx = self.last_tokens[slot:slot + 1]
                self._sample(slot, self._decode_eagerly(idx, cache, self._to_device([[pos]])))
            except Exception as error:
                sequence.fail(error)
                self._retire(slot)

    def _sample(self, first_slot, logits):
        """Sample a token for the sequences from first_slot on, one for each row of logits.

        A sequence that has all the tokens it asked for leaves its slot.
        """
        sequences = self.live[first_slot:first_slot + logits.size(0)]
        logits = logits[:, :self.n_vocab]
        tokens = self.last_tokens[first_slot:first_slot + len(sequences)]  # a view
        noise = self._to_device([sequence.random.random() for sequence in sequences])[:, None]
        rows_by_sampling = {}
        for row, sequence in enumerate(sequences):
            rows_by_sampling.setdefault(sequence.sampling, []).append(row)
            sequence.n_sampled += 1
        if len(rows_by_sampling) == 1:
            tokens.copy_(sample_next(logits, *sequences[0].sampling, noise=noise))
        else:
            for sampling, rows in rows_by_sampling.items():
                rows = self._to_device(rows)
                tokens[rows] = sample_next(logits[rows], *sampling, noise=noise[rows])
        for row, sequence in enumerate(sequences):
            if sequence.n_logprobs is not None:
                sequence.logprobs += logprobs_of(logits[row:row + 1], tokens[row],
                                                 sequence.n_logprobs)
        self.pending.append(SampledTokens(sequences, *self.decode_step.copy_to_host(tokens)))
        for row in reversed(range(len(sequences))):
            if sequences[row].n_sampled == sequences[row].max_length:
                self._retire(first_slot + row)

    def _collect(self):
        """Hand the oldest pending tokens to their sequences."""
        sampled = self.pending.popleft()
        if sampled.event:
            sampled.event.synchronize()
        tokens = sampled.host[:, 0].tolist()
        for sequence, token in zip(sampled.sequences, tokens, strict=True):
            if not sequence.finish_reason and token == self.stop_token:
                sequence.finish_reason = "stop"
            elif not sequence.finish_reason:
                sequence.tokens.append(token)
                sequence.events.put(token)
                if len(sequence.tokens) == sequence.max_length:
                    sequence.finish_reason = "length"
            if sequence.finish_reason:
                sequence.end()

    def _retire(self, slot):
        """Free a slot. The sequence of the last slot moves there: live slots stay side by side.

        What the slot held is kept, in the place of the last one, for prompts that begin like it.
        """
        sequence, last = self.live[slot], self.live.pop()
        last_slot = len(self.live)
        if slot != last_slot:
            self.live[slot] = last
            self.prefixes.exchange(slot, sequence, last_slot, last)
            self.last_tokens[slot] = self.last_tokens[last_slot]
        self.prefixes.release(last_slot, sequence)
        if sequence.finish_reason:
            sequence.end()

    def _to_device(self, values):
        return torch.tensor(values).to(self.device, non_blocking=True)
