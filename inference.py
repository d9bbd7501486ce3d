"""
Checkpoint -> text. An engine that knows tokens, a thin layer that knows text, and the command that samples.

From the newest checkpoint of the last run, or from any other: ours, build-nanogpt's, nanoGPT's, Hugging Face's:
$ python inference.py
$ python inference.py --checkpoint_path log/model_10000.pt --prompt "Hello, I'm a language model," --max_length 200
$ python inference.py --checkpoint_path path/to/hugging_face_directory --num_samples 8 --temperature 0.8 --top_p 0.95
A prompt from a file or from another program; the text goes to stdout, all else to stderr:
$ python inference.py --prompt FILE:story.txt --stop "THE END" > story_goes_on.txt
$ git diff | python inference.py --prompt - --temperature 0
The model and its tokenizer as a Hugging Face directory, for transformers and what reads its files:
$ python inference.py --checkpoint_path log/model_10000.pt --export gpt2_of_mine

From Python:
>>> from inference import generate_text, load_model_from_checkpoint
>>> model = load_model_from_checkpoint("log/latest_checkpoint.pt")
>>> print(generate_text(model, prompt="Once upon a time", max_length=100, temperature=0.8, top_k=50))
"""

import argparse
import codecs
import copy
import importlib
import math
import os
import queue
import random
import sys
import time
import types
from collections import deque
from pathlib import Path

import torch
from torch import nn

from fineweb import ArgumentParser, UserError, load_tokenizer, run_main
from train_gpt2 import compile_model, load_checkpoint, resolve_device, resolve_dtype, restore_model, sample_next

DEFAULT_CHECKPOINT = "log/latest_checkpoint.pt"
MAX_SLOTS = 16  # more samples than that wait for one of them to end
DEFAULT_PROMPT = "Hello, I'm a language model,"

# -----------------------------------------------------------------------------
# the model


def load_model_from_checkpoint(path, device=None, dtype=None):
    """The GPT of a checkpoint file, a Hugging Face directory or a GPT-2 name, ready to sample from.

    device: auto by default; dtype: a torch.dtype or its name, by default what the device is good at. The weights are
    converted once. The model carries its tokenizer (`.tokenizer`), a prompt to try (`.sample_prompt`) and the step it was
    saved at, where that is known (`.step`). Raises UserError for what can't be loaded.
    """
    device = resolve_device(str(device or "auto"))
    if not isinstance(dtype, torch.dtype):
        dtype = resolve_dtype(dtype or "auto", device)
    checkpoint = load_checkpoint(path, mmap=True)  # the optimizer's state, twice the weights, stays on disk
    model, tokenizer = restore_model(checkpoint, dropout=0.0), load_tokenizer(checkpoint["tokenizer"])
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(f"the model of {str(path)!r} knows {model.config.vocab_size} tokens, its tokenizer "
                        f"{tokenizer.name} has {tokenizer.n_vocab}: they don't belong together")
    model = model.to(device, dtype).eval().requires_grad_(False)
    model.tokenizer = tokenizer
    model.sample_prompt = checkpoint.get("train_config", {}).get("sample_prompt", DEFAULT_PROMPT)
    model.step = checkpoint.get("step")
    return model


class PackedLinear(nn.Module):
    """nn.Linear with its weight in the blocked layout of oneDNN's kernels, which read it a third faster on a CPU."""

    def __init__(self, linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(dtype):
    return dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(model):
    """A model that shares the weights of this one but for those of its linear layers, which are packed copies."""
    shared = [*model.parameters(), getattr(model, "tokenizer", None)]
    twin = copy.deepcopy(model, {id(x): x for x in shared})
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
    return twin.eval().requires_grad_(False)


# -----------------------------------------------------------------------------
# the engine: tokens in, tokens out


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

    def __init__(self, model, slots=1, n_vocab=None, stop_token=None, compile=False, say=print):
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
            compiled = compile_model(forward, self.device, say,
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


# -----------------------------------------------------------------------------
# text


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


def encode_prompt(model, tokenizer, prompt, say):
    """Token ids of a text; an empty one is <|endoftext|>, the beginning of a document. Says what the context cuts off."""
    tokens = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    cut = len(tokens) - model.config.block_size
    if cut > 0:
        say(f"the prompt has {len(tokens)} tokens, the context {model.config.block_size}: the first {cut} are left out, "
            f"it begins at {tokenizer.decode(tokens[cut:cut + 12])!r}")
    return tokens


def generate_text(model, prompt="", max_length=100, temperature=1.0, top_k=50, top_p=None, seed=None, num_samples=1,
                  stop=(), tokenizer=None):
    """The prompt and up to max_length tokens that continue it, as text; a list of them where num_samples is above 1.

    The model may be any GPT; one without a tokenizer of its own is taken to speak GPT-2's. temperature 0 is greedy; sample
    i has the seed `seed` + i. Raises UserError for settings out of range.
    """
    tokenizer = tokenizer or getattr(model, "tokenizer", None) or load_tokenizer("gpt2")
    stop = [stop] if isinstance(stop, str) else stop
    tokens = encode_prompt(model, tokenizer, prompt, lambda text: print(f"warning: {text}", file=sys.stderr))
    engine = Engine(model, min(num_samples, MAX_SLOTS), tokenizer.n_vocab, tokenizer.eot_token)
    requests = [engine.submit(tokens, max_length=max_length, temperature=temperature, top_k=top_k, top_p=top_p,
                              seed=None if seed is None else seed + i) for i in range(num_samples)]
    texts = [prompt + "".join(TextStream(request, tokenizer, stop, engine.step)) for request in requests]
    return texts[0] if num_samples == 1 else texts


# -----------------------------------------------------------------------------
# the command


def read_prompt(prompt):
    """The text that --prompt stands for."""
    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode()
        if prompt.startswith("FILE:"):
            return Path(prompt.removeprefix("FILE:")).read_bytes().decode()
    except OSError as e:
        raise UserError(f"--prompt {prompt}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"--prompt {prompt}: not UTF-8 text") from e
    return prompt


def main():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--checkpoint_path", default=DEFAULT_CHECKPOINT,
        help=f"a file, or a Hugging Face directory (default: {DEFAULT_CHECKPOINT})")
    add("--prompt", help="text, FILE:path, or - for stdin (default: what the run's own samples begin with)")
    add("--max_length", type=int, default=100, help="new tokens at most, a sample (default: 100)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    add("--top_k", type=int, default=50, help="draw from the k likeliest tokens (default: 50)")
    add("--top_p", type=float, help="draw from the likeliest tokens that make up this mass (default: all)")
    add("--num_samples", type=int, default=1, help="samples, decoded together (default: 1)")
    add("--seed", type=int, help="of the first sample, the next has the next (default: a new one, which is told)")
    add("--stop", action="append", default=[], help="text that ends a sample, and is not shown; may be given again")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of the weights (default: auto)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the decode step: a minute's wait, then faster (default: no)")
    add("--export", metavar="DIR", help="write a Hugging Face directory, in float32 unless --dtype says, and no sample")
    args = parser.parse_args()
    settings = {k: getattr(args, k) for k in ("max_length", "temperature", "top_k", "top_p", "seed")}
    Request([], **settings)  # contradictions show before anything is read
    if args.num_samples < 1:
        raise UserError(f"num_samples is {args.num_samples}: expected at least 1")

    def say(text):
        print(text, file=sys.stderr, flush=True)

    if args.export is not None:
        dtype = "float32" if args.dtype == "auto" else args.dtype
        load_model_from_checkpoint(args.checkpoint_path, "cpu", dtype).save_pretrained(args.export)
        say(f"exported {args.checkpoint_path} to {args.export}")
        return
    prompt = None if args.prompt is None else read_prompt(args.prompt)
    model = load_model_from_checkpoint(args.checkpoint_path, args.device, args.dtype)
    if sum(p.numel() for p in model.parameters()) < 10**7:
        torch.set_num_threads(1)  # a step of a small model is over before a second thread has woken
    tokenizer = model.tokenizer
    prompt = model.sample_prompt if prompt is None else prompt
    tokens = encode_prompt(model, tokenizer, prompt, say)
    engine = Engine(model, min(args.num_samples, MAX_SLOTS), tokenizer.n_vocab, tokenizer.eot_token, args.compile, say)
    if args.compile:
        say("compiling ...")
        engine.warm_up()
    if args.seed is None:
        settings["seed"] = random.SystemRandom().randrange(2**32)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    t0 = time.perf_counter()
    streams = [TextStream(engine.submit(tokens, **{**settings, "seed": settings["seed"] + i}), tokenizer, args.stop,
                          engine.step) for i in range(args.num_samples)]
    try:
        for i, stream in enumerate(streams):  # the first is seen as it comes, the others are ready by then
            print("\n---\n" * (i > 0) + prompt, end="", flush=True)
            for piece in stream:
                print(piece, end="", flush=True)
        print(flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    seconds = time.perf_counter() - t0
    n_tokens = sum(stream.n_tokens for stream in streams)
    say(f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.0f} tokens/s; seed {settings['seed']}, "
        + ", ".join(stream.request.finish_reason for stream in streams))


if __name__ == "__main__":
    run_main(main)
