"""
How fast each part is, beside its peers and beside what the machine can do at best.

Figures drift over minutes, so contenders take turns in one run, and their ratios are what counts.

Everything, then each by itself:
$ python bench.py all
$ python bench.py train --peer ../build-nanogpt
$ python bench.py train --preset gpt2-medium --batch_size 32 --profile
$ python bench.py decode --compile --rounds 9
$ python bench.py decode --streams 1 --length 512 --peer ../nanoGPT
$ python bench.py serve
$ python bench.py tokenize
$ python bench.py hellaswag --hellaswag_data hellaswag_val.jsonl
$ python bench.py checkpoint
$ python bench.py start
How a step grows with batch, context and model, as a picture; two processes sharing this machine:
$ python bench.py growth --picture growth.png
$ python bench.py processes
The first ten minutes on a GPU, with a table for the README; a part that fails does not end it:
$ python bench.py gpu --out FOLDER

A peer is a checkout: git clone https://github.com/karpathy/build-nanogpt, or .../nanoGPT.
transformers is a peer where it is installed. Tables go to stderr while it runs, one JSON object to
the last line of stdout. What was tried and what it brought: docs/speed.md.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import http.client
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from fineweb import encode_stream, prepare
from gptlib import scoring
from gptlib.checkpoint import copy_to_host, load_checkpoint, save_checkpoint
from gptlib.common import ArgumentParser, UserError, atomic_write, first_line, log, run_main
from gptlib.engine import Engine
from gptlib.loader import TokenLoader
from gptlib.runtime import (PEAK_TFLOPS, compile_model, git_commit, keep_freed_memory,
                            resolve_device, resolve_dtype)
from gptlib.sources import stdlib_files
from gptlib.tokenizer import load_tokenizer, make_encoding, tokenizer_to_dict
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig, configure_optimizers, take_step

HERE = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# contenders and their turns


def take_turns(contenders, rounds, unit):
    """Time contenders in turns, after a first turn of each that does not count.

    contenders: {name: a function that does the work and returns the amount of work done}. Returns a
    list of dicts, one per contender: name, unit ("tok/s" for "tok"), median, lowest and highest
    rate, and ratio: the median over the rounds of its rate to the last contender's in that round.
    """
    rates = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            t0 = time.perf_counter()
            amount = work()
            if turn > 0:
                rates[name].append(amount / (time.perf_counter() - t0))
    *_, peer = rates.values()
    results = []
    for name, rate in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rate, peer, strict=True))
        results.append(dict(name=name, unit=f"{unit}/s", median=statistics.median(rate),
                            low=min(rate), high=max(rate), ratio=ratio))
    return results


def show_results(title, results):
    log(f"\n{title}")
    for r in results:
        spread = f"({r['low']:,.2f} to {r['high']:,.2f})"
        log(f"  {r['name']:42} {r['median']:13,.2f} {r['unit']:7} {spread}  x {r['ratio']:.2f}")


def show_seconds(results):
    """The same results as seconds per run, under the contenders' names up to the first comma."""
    seconds = []
    for r in results:
        name = r["name"].split(",")[0].split(":")[0]
        seconds.append(f"{name} {1 / r['median']:.2f}")
    log("  in seconds: " + ", ".join(seconds))


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def last_lines(text, count=10):
    """The end of what a failed process wrote, without torchrun's own report that follows it."""
    lines = [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if number > 0 and "failed (exitcode:" in line:
            lines = lines[:number]
            break
    return "\n".join(lines[-count:])


def run_command(argv, **options):
    """Run a command to its end. Raises UserError with the last lines of its stderr if it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, **options)
    if done.returncode != 0:
        command = " ".join(argv)
        raise UserError(f"exit code {done.returncode} from: {command}\n{last_lines(done.stderr)}")


# -----------------------------------------------------------------------------
# contenders in processes of their own


def serve_turns(pipe, build, args):
    """In the process of a contender: build its work, then do a turn of it for each request."""
    try:
        work = build(*args)
        pipe.send(None)
        while pipe.recv():
            pipe.send(work())
    except EOFError:
        pass
    except Exception as e:
        pipe.send(UserError(f"{build.__name__}: {e}"))


class ContenderProcess:
    """A contender in a process of its own: calling it does one turn there and returns the result.

    Raises UserError with the reason where building or a turn fails, or where the process dies.
    """
    GRACE_SECONDS = 10  # from the request to end until the process is killed

    def __init__(self, build, args):
        context = multiprocessing.get_context("spawn")
        self.pipe, end_of_child = context.Pipe()
        self.process = context.Process(target=serve_turns, args=(end_of_child, build, args),
                                       daemon=True)
        self.process.start()
        end_of_child.close()  # so that the pipe ends with the process, however that dies

    def receive(self, timeout=None):
        try:
            if not self.pipe.poll(timeout):
                raise UserError(f"not finished after {timeout} seconds")
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            raise UserError(f"its process died with exit code {code}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __call__(self):
        self.pipe.send(True)
        return self.receive()

    def close(self):
        with contextlib.suppress(OSError):
            self.pipe.send(False)
        self.process.join(timeout=self.GRACE_SECONDS)
        self.process.kill()


@contextlib.contextmanager
def separate_processes(**contenders):
    """Contenders in processes of their own, so that none shares allocator, threads or compiler.

    name=(build, *args): build(*args) returns the work, a function as take_turns wants it. Yields
    {name: work}.
    """
    works = {}
    try:
        for name, (build, *args) in contenders.items():
            works[name] = ContenderProcess(build, args)
            works[name].receive()  # it is built before the next one begins
        yield works
    finally:
        for work in works.values():
            work.close()


# -----------------------------------------------------------------------------
# peers


def read_definitions(file):
    """Run a peer's imports, classes and functions, but not its other lines: it may train at import.

    Returns them as a module.
    """
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    body = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, kinds) and getattr(node, "module", "") != "hellaswag":
            body.append(node)
    module = types.ModuleType("peer")
    module.master_process = False
    sys.modules["peer"] = module  # its dataclasses look themselves up there
    exec(compile(ast.Module(body, []), str(file), "exec"), module.__dict__)
    return module


def peer_classes(path, names):
    """The definitions of a peer's train_gpt2.py or model.py, as a module that has these names.

    Raises UserError where neither file has them.
    """
    for file in (Path(path) / "train_gpt2.py", Path(path) / "model.py"):
        if file.is_file():
            module = read_definitions(file)
            if all(hasattr(module, name) for name in names):
                return module
    raise UserError(f"--peer {path} is no checkout of build-nanogpt or nanoGPT: "
                    f"no train_gpt2.py or model.py with {' and '.join(names)} in it")


# -----------------------------------------------------------------------------
# what the machine can do at best


def matrix_peak(device, dtype):
    """FLOP/s of the fastest of a few matrix products."""
    best = 0.0
    for m, k, n in ((2048, 768, 3072), (2048, 3072, 768), (4096, 4096, 4096)):
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(n, k, device=device).to(dtype)
        repeat = 200 if device.type == "cuda" else 3
        for _ in range(4):
            t0 = time.perf_counter()
            for _ in range(repeat):
                c = a @ b.t()
            c.sum().item()  # waits for the device
            best = max(best, repeat * 2 * m * k * n / (time.perf_counter() - t0))
    return best


def memory_bandwidth(device):
    """Bytes per second at which a tensor larger than any cache is read."""
    x = torch.zeros(2**27, device=device)
    x.max().item()
    best = 0.0
    for _ in range(5):
        t0 = time.perf_counter()
        x.max().item()
        best = max(best, x.numel() * 4 / (time.perf_counter() - t0))
    return best


def datasheet_peak(device):
    """(name, bf16 FLOP/s by the maker's datasheet) of a CUDA device; None for other devices."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part_of_name, tflops in PEAK_TFLOPS.items():
            if part_of_name in name:
                return name, tflops * 1e12
    return None


def bench_floors(args):
    """What the machine could do at best: matrix products, memory, the datasheet."""
    device = resolve_device(args.device)
    floors = {}
    for dtype in {resolve_dtype("auto", device), torch.float32}:
        peak = matrix_peak(device, dtype)
        floors[f"matrix product, {dtype_name(dtype)}, TFLOP/s"] = peak / 1e12
    floors["memory read, GB/s"] = memory_bandwidth(device) / 1e9
    datasheet = datasheet_peak(device)
    if datasheet:
        name, flops = datasheet
        floors[f"datasheet of {name}, bf16 TFLOP/s"] = flops / 1e12
    log("\nfloors")
    for name, value in floors.items():
        log(f"  {name:48} {value:10.2f}")
    return floors


# -----------------------------------------------------------------------------
# training


def training_shape(args):
    """The model's config, micro-batch size and micro-steps that the flags ask for.

    Where they leave it open: the preset's own on a GPU, and what fits a laptop elsewhere.
    """
    cuda = resolve_device(args.device).type == "cuda"
    preset = PRESETS[args.preset]
    T, B, micro_steps = args.block_size, args.batch_size, args.micro_steps
    if not T:
        T = preset["block_size"] if cuda else min(512, preset["block_size"])
    if not B:
        B = preset["batch_size"] if cuda else 4
    if not micro_steps:
        micro_steps = max(1, preset["total_batch_size"] // (B * T)) if cuda else 1
    config = GPTConfig(T, 50304, preset["n_layer"], preset["n_head"], preset["n_embd"])
    return config, B, micro_steps


def training_ours(args, compile):
    """A step of train_gpt2.py: its model, take_step and optimizers, on random tokens."""
    config, B, micro_steps = training_shape(args)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    T = config.block_size
    cfg = TrainConfig(block_size=T, batch_size=B, total_batch_size=B * T * micro_steps,
                      n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                      warmup_steps=0)
    keep_freed_memory(device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    raw_model = GPT(config).to(device)
    model = compile_model(raw_model, device) if compile else raw_model
    optimizers = configure_optimizers(raw_model, cfg, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    x, y = torch.randint(50257, (2, B, T), device=device)
    micro_batches = [(x, y, B * T)] * micro_steps

    def work():
        loss, _ = take_step(model, micro_batches, optimizers, scaler, autocast, cfg.max_lr, cfg)
        loss.item()
        return cfg.total_batch_size
    return work


def training_plain(args, peer, compile):
    """A step of the plain loop around a peer's model or, where peer is empty, around ours."""
    config, B, micro_steps = training_shape(args)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    if peer:
        module = peer_classes(peer, ("GPT", "GPTConfig"))
        model = module.GPT(module.GPTConfig(config.block_size, config.vocab_size, config.n_layer,
                                            config.n_head, config.n_embd)).to(device)
    else:
        model = GPT(config).to(device)
    fused = not peer or device.type == "cuda"  # build-nanogpt fuses on CUDA only
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=fused)
    forward = torch.compile(model) if compile else model
    x, y = torch.randint(50257, (2, B, config.block_size), device=device)

    def work():
        optimizer.zero_grad()
        for _ in range(micro_steps):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                _, loss = forward(x, y)
            (loss / micro_steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        return x.numel() * micro_steps
    return work


def bench_train(args):
    """Tokens per second of whole optimizer steps, and MFU.

    MFU counts 6N + attention FLOPs per token (GPT.flops_per_token) over the measured matrix peak.
    """
    config, B, micro_steps = training_shape(args)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    contenders = {"train_gpt2.py": (training_ours, args, True)}
    if args.eager:
        contenders["train_gpt2.py --no-compile"] = (training_ours, args, False)
    contenders["same model, plain torch.compile"] = (training_plain, args, "", True)
    if args.peer:
        peer_name = Path(args.peer).resolve().name
        contenders[f"{peer_name}, eager"] = (training_plain, args, args.peer, False)
    title = (f"training {args.preset}, {micro_steps} x {B} x {config.block_size} tokens a step, "
             f"{dtype_name(dtype)}, {device.type}")
    with separate_processes(**contenders) as works:
        results = take_turns(works, args.rounds, "tok")
    show_results(title, results)
    add_mfu(results, config, matrix_peak(device, dtype))
    if args.profile:
        profile(training_ours(args, True))
    step_tokens = B * micro_steps * config.block_size
    loader = loader_share(args, config, step_tokens, results[0]["median"])
    log(f"  TokenLoader makes {loader['tok/s']:,.0f} tok/s: "
           f"{loader['share of a step']:.2%} of a step")
    return {title: results, "loader": loader}


def add_mfu(results, config, peak):
    """Add to each result its share of the peak FLOP/s, and report them."""
    with torch.device("meta"):
        flops = GPT(config).flops_per_token()
    for r in results:
        r["mfu"] = r["median"] * flops / peak
    shares = ", ".join(f"{r['name']} {r['mfu']:.0%}" for r in results)
    log(f"  at {flops / 1e9:.2f} GFLOP a token the measured peak, {peak / 1e12:.2f} TFLOP/s, "
           f"is {peak / flops:,.0f} tok/s: {shares}")


def write_random_shard(path, n_tokens):
    tokens = np.random.default_rng(0).integers(50257, size=n_tokens, dtype=np.uint16)
    np.save(path, tokens)


def loader_share(args, config, step_tokens, rate):
    """How fast TokenLoader makes tokens, and the share of a step that it takes.

    In training that time is hidden: the loader works while the step before computes.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_random_shard(Path(folder) / "random_train_000001.npy", 4 * step_tokens + 10**6)
        loader = TokenLoader(folder, "train", config.block_size, shuffle=True)
        t0 = time.perf_counter()
        for step in range(4):
            list(loader.batches(step * step_tokens, step_tokens, args.batch_size or 4))
        loader_rate = 4 * step_tokens / (time.perf_counter() - t0)
    return {"tok/s": loader_rate, "share of a step": rate / loader_rate}


def record_profile(work):
    """The torch profile of one turn of work, after two that warm up."""
    from torch.profiler import ProfilerActivity
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    work()
    work()
    with torch.profiler.profile(activities=activities) as recorded:
        work()
    return recorded


def profile(work):
    """Show where a step spends its time: a table on stderr, and a trace for a viewer.

    The trace, for https://ui.perfetto.dev, is written to bench_trace.json.
    """
    recorded = record_profile(work)
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    averages = recorded.key_averages()
    log(averages.table(sort_by=key, row_limit=20, max_name_column_width=60))
    recorded.export_chrome_trace("bench_trace.json")
    log("the trace is in bench_trace.json")


# -----------------------------------------------------------------------------
# decoding


def gpt2_to_decode(args):
    """Device, dtype and GPT-2 (124M) with random weights, as the flags ask for it."""
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    torch.manual_seed(0)
    with torch.inference_mode():
        return device, dtype, GPT(GPTConfig(vocab_size=50304)).to(device, dtype).eval()


def decode_engine(model, prompts, length, compile=False, stop_token=None):
    """inference.py's engine with one slot for each prompt."""
    engine = Engine(model, len(prompts), n_vocab=50257, stop_token=stop_token, compile=compile)

    def work():
        requests = []
        for i, prompt in enumerate(prompts):
            requests.append(engine.submit(prompt, max_length=length, top_k=50, seed=i))
        while engine.step():
            pass
        return sum(len(request.tokens) for request in requests)
    return work


def decode_transformers(config, prompt, streams, length, device, dtype):
    """generate() of transformers' GPT-2 of the same shape, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    hf_config = GPT2Config(n_positions=config.block_size, n_layer=config.n_layer,
                           n_head=config.n_head, n_embd=config.n_embd,
                           eos_token_id=None, bos_token_id=None)
    model = GPT2LMHeadModel(hf_config).to(device, dtype).eval()
    idx = torch.tensor([prompt] * streams, device=device)

    def work():
        out = model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=length,
                             do_sample=True, top_k=50, pad_token_id=0)
        assert out.shape == (streams, len(prompt) + length)
        return streams * length
    return work


def decode_nanogpt(peer, prompt, streams, length, device, dtype):
    """generate() of a nanoGPT checkout, which has no cache."""
    model = peer.GPT(peer.GPTConfig(vocab_size=50304)).to(device).eval()
    idx = torch.tensor([prompt] * streams, device=device)

    def work():
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), autocast:
            model.generate(idx, length, temperature=1.0, top_k=50)
        return streams * length
    return work


def read_weights(model, device):
    """The limit for one stream: every weight is read once per token, and nothing else is done."""
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    weights = torch.zeros(n_bytes // 4, device=device)

    def work():
        for _ in range(20):
            weights.max().item()
        return 20
    return work


def bench_decode(args):
    """Tokens per second of `streams` sequences of `length` new tokens each.

    They are sampled with top_k 50 at temperature 1.
    """
    device, dtype, model = gpt2_to_decode(args)
    prompt = torch.randint(50257, (16,)).tolist()
    length = args.length
    peer = peer_classes(args.peer, ("GPT", "GPTConfig")) if args.peer else None
    peer_generates = peer is not None and hasattr(peer.GPT, "generate")  # build-nanogpt's does not
    results = {}
    for streams in args.streams:
        prompts = [prompt] * streams
        contenders = {}
        if streams == 1:
            contenders["weights read once a token"] = read_weights(model, device)
        contenders["inference.py"] = decode_engine(model, prompts, length)
        if args.compile:
            compiled = decode_engine(model, prompts, length, compile=True)
            contenders["inference.py --compile"] = compiled
        if peer_generates:
            work = decode_nanogpt(peer, prompt, streams, length, device, dtype)
            contenders["nanoGPT"] = work
        else:
            work = decode_transformers(model.config, prompt, streams, length, device, dtype)
            contenders["transformers"] = work
        title = f"{streams} x {length} tokens, {dtype_name(dtype)}, {device.type}"
        results[title] = take_turns(contenders, args.rounds, "tok")
        show_results(title, results[title])
    return results


# -----------------------------------------------------------------------------
# serving


def offline_tokenizer():
    """A tokenizer with as many tokens as GPT-2's, for which nothing has to be downloaded."""
    one_byte = [bytes([i]) for i in range(256)]
    two_bytes = [bytes([i // 256, i % 256]) for i in range(50000)]
    return make_encoding("bpe", {token: i for i, token in enumerate(one_byte + two_bytes)})


def request_completion(port, prompt, length, seed, stream):
    """Ask serve.py for a completion, whole or streamed. Returns the number of its tokens."""
    body = dict(prompt=prompt, max_tokens=length, top_k=50, seed=seed, stream=stream,
                stream_options=dict(include_usage=True) if stream else None)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    text = connection.getresponse().read().decode()
    answer = json.loads(text.split("data: ")[-2] if stream else text)
    return answer["usage"]["completion_tokens"]


def clients(port, prompts, length, stream):
    """One client for each prompt, all at once."""
    def work():
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            answers = [pool.submit(request_completion, port, prompt, length, seed, stream)
                       for seed, prompt in enumerate(prompts)]
            return sum(answer.result() for answer in answers)
    return work


@contextlib.contextmanager
def running_server(**settings):
    """Run serve.py with these flags on a free port. Yields the port."""
    flags = [f"--{name}={value}" for name, value in settings.items()]
    argv = [sys.executable, str(HERE / "serve.py"), "--port=0", *flags]
    server = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        output = ""
        line = ""
        while not line.startswith("serving "):
            line = server.stderr.readline()
            output += line
            if not line:
                raise UserError("serve.py did not start:\n" + output)
        yield int(output.split("listening on http://127.0.0.1:")[1].split(",")[0])
    finally:
        server.terminate()
        server.wait()


def bench_serve(args):
    """Tokens per second that all clients together get from serve.py, whole and streamed.

    As many clients as `streams` ask at once, beside the engine alone with the same prompts.
    """
    device, dtype, model = gpt2_to_decode(args)
    # a different prompt for each client, so that no cache can serve one with another's
    all_prompts = torch.randint(50257, (max(args.streams), 16)).tolist()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "gpt2_shape.pt"
        torch.save(dict(model=model.state_dict(), config=asdict(model.config),
                        tokenizer=tokenizer_to_dict(offline_tokenizer())), checkpoint)
        with running_server(model_checkpoint=checkpoint, slots=max(args.streams),
                            device=args.device, dtype=args.dtype, compile=args.compile) as port:
            for n in args.streams:
                prompts = all_prompts[:n]
                engine = decode_engine(model, prompts, args.length, args.compile, stop_token=50256)
                contenders = {
                    "serve.py": clients(port, prompts, args.length, False),
                    "serve.py, streamed": clients(port, prompts, args.length, True),
                    "inference.py without HTTP": engine,
                }
                title = f"{n} clients x {args.length} tokens, {dtype_name(dtype)}, {device.type}"
                results[title] = take_turns(contenders, args.rounds, "tok")
                show_results(title, results[title])
    rates = [contender[0]["median"] for contender in results.values()]
    log(f"\n{args.streams[-1]} clients get {rates[-1] / rates[0]:.2f} times "
           f"what {args.streams[0]} gets")
    return results


# -----------------------------------------------------------------------------
# tokenizing


def load_pool_tokenizer():
    """In a process of the original's pool: load the tokenizer once."""
    global enc
    enc = load_tokenizer("gpt2")


def tokenize_in_pool(text):
    """Tokenize as the original fineweb.py does, in a process of its pool."""
    tokens = np.array([enc.eot_token, *enc.encode_ordinary(text)])
    assert (0 <= tokens).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def texts_to_tokenize():
    """The standard library's files, four times over."""
    texts = [Path(path).read_text(errors="replace") for path in stdlib_files()]
    return [text for text in texts if 0 < len(text) < 200000] * 4


def bench_tokenize(args):
    """GPT-2 tokens per second of the Python standard library's text, from memory to arrays."""
    tokenizer = load_tokenizer("gpt2")
    texts = texts_to_tokenize()
    n_processes = os.cpu_count()

    def ours():
        return sum(len(tokens) for tokens, _ in encode_stream(tokenizer, texts, n_processes))

    def one_thread():
        return sum(len(tokenizer.encode_ordinary(text)) + 1 for text in texts)

    n_tokens = ours()
    context = multiprocessing.get_context("spawn")
    with context.Pool(n_processes, load_pool_tokenizer) as pool:
        def original():
            return sum(map(len, pool.imap(tokenize_in_pool, texts, chunksize=16)))

        contenders = {
            f"fineweb.py, {n_processes} threads": ours,
            "tiktoken, one thread": one_thread,
            f"the original's pool of {n_processes} processes": original,
        }
        results = take_turns(contenders, args.rounds, "tok")
    show_results(f"tokenizing {n_tokens:,} tokens", results)
    return {"tokenize": results}


# -----------------------------------------------------------------------------
# HellaSwag


@torch.no_grad()
def score_plainly(model, example, tokenizer, autocast):
    """Choose an ending by the plain method: four rows, each the context and one ending."""
    device = model.lm_head.weight.device
    context, endings = scoring.encode(example, tokenizer)
    T = len(context) + max(map(len, endings))
    rows = []
    for ending in endings:
        padding = T - len(context) - len(ending)
        rows.append(context + ending + [0] * padding)
    idx = torch.tensor(rows, device=device)  # (4, T)
    with autocast:
        logits, _ = model(idx)
    targets = idx[:, 1:].flatten()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none").view(4, -1)
    return loss[:, len(context) - 1:].sum(1).argmin().item()


def hellaswag_contender(args, dtype, plain):
    """GPT-2 (124M) scored by hellaswag.py or by the plain method."""
    device = resolve_device(args.device)
    if not plain:  # as hellaswag.py does
        keep_freed_memory(device)
    tokenizer = load_tokenizer("gpt2")
    examples = scoring.load_examples(args.hellaswag_data)[:args.examples]
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50304)).to(device).eval()
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def ours():
        scoring.evaluate(model, examples, tokenizer, autocast)
        return len(examples)

    def plain_method():
        for example in examples:
            score_plainly(model, example, tokenizer, autocast)
        return len(examples)
    return plain_method if plain else ours


def bench_hellaswag(args):
    """Examples per second of GPT-2 (124M) with random weights, beside the plain method."""
    device = resolve_device(args.device)
    scoring.load_examples(args.hellaswag_data)  # a missing file fails here, before any process
    results = {}
    for dtype in dict.fromkeys([torch.float32, resolve_dtype("auto", device)]):
        contenders = {
            "hellaswag.py": (hellaswag_contender, args, dtype, False),
            "the plain method": (hellaswag_contender, args, dtype, True),
        }
        with separate_processes(**contenders) as works:
            turns = take_turns(works, args.rounds, "ex")
        title = f"HellaSwag, {args.examples} examples, {dtype_name(dtype)}, {device.type}"
        results[title] = turns
        show_results(title, turns)
    return results


# -----------------------------------------------------------------------------
# checkpoints


def training_state(config, device):
    """A checkpoint's content after one step of AdamW, with gradients of zero."""
    model = GPT(config).to(device)
    optimizer, = configure_optimizers(model, TrainConfig(), device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return dict(model=model.state_dict(), optimizer=[optimizer.state_dict()], step=1)


def bench_checkpoint(args):
    """Checkpoints per second: what training waits for, and what is written in the background."""
    config, *_ = training_shape(args)
    device = resolve_device(args.device)
    state = training_state(config, device)
    on_host = copy_to_host(state)

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        def copy():
            if device.type == "cuda":
                torch.cuda.synchronize()
            copy_to_host(state)
            return 1

        def save():
            save_checkpoint(folder, on_host, 1)
            return 1

        def save_unflushed():
            torch.save(on_host, Path(folder) / "bare.pt")
            return 1

        save()
        size = (Path(folder) / "model_00001.pt").stat().st_size
        data = os.urandom(2**20) * (size // 2**20)

        def write_bytes():
            atomic_write(Path(folder) / "bytes", lambda f: f.write(data))
            return 1

        contenders = {
            "copy_to_host: all that training waits for": copy,
            "save_checkpoint, in the background": save,
            "torch.save, not flushed": save_unflushed,
            "floor: as many bytes, flushed": write_bytes,
        }
        results = take_turns(contenders, args.rounds, "runs")
    title = f"checkpoint of {args.preset}, {size / 2**20:,.0f} MiB, {device.type}"
    show_results(title, results)
    show_seconds(results)
    return {title: results}


# -----------------------------------------------------------------------------
# from the command to the first thing it does


def bench_start(args):
    """Whole processes per second: a training run of one step, a sample of one token.

    Beside `import torch`, which is most of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"The {n} green bottles are hanging on the wall.\n" for n in range(20000)]
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("".join(lines))
        prepare(f"{folder}/data", source="files", files=str(corpus), tokenizer="bpe",
                vocab_size=300)

        def command(*argv):
            def work():
                run_command([sys.executable, *argv], cwd=folder)
                return 1
            return work

        device = f"--device={args.device}"
        train = command(str(HERE / "train_gpt2.py"), "--preset=demo", "--data_root=data",
                        "--max_steps=1", "--val_tokens=128", "--num_samples=0", device)
        sample = command(str(HERE / "inference.py"), "--max_length=1", device)
        contenders = {
            "train_gpt2.py, one step, evaluation, log": train,
            "inference.py, one token": sample,
            "python -c 'import torch'": command("-c", "import torch"),
        }
        results = take_turns(contenders, args.rounds, "runs")
    show_results("start", results)
    show_seconds(results)
    return {"start": results}


# -----------------------------------------------------------------------------
# growth


def peak_memory(device):
    """The most bytes this process has had allocated on a GPU or, without one, in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        # Not Linux. There ru_maxrss would not do: it begins with what the parent process had.
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def growth_point(args, n_layer, B, T):
    """Seconds and peak bytes of a training step, measured in a process of its own."""
    args.batch_size, args.block_size = B, T
    PRESETS[args.preset] = {**PRESETS[args.preset], "n_layer": n_layer}
    step = training_ours(args, False)
    step()
    step()  # the second step still gets fresh pages from the system
    t0 = time.perf_counter()
    for _ in range(args.rounds):
        step()
    seconds = (time.perf_counter() - t0) / args.rounds
    peak = peak_memory(resolve_device(args.device))
    return lambda: (seconds, peak)


def growth_sweeps(preset, B, T):
    """{what varies: [(its value, (layers, sequences, tokens))]}, one thing varied at a time."""
    L = preset["n_layer"]
    contexts = [n for n in (128, 256, 512, 1024) if n <= preset["block_size"]]
    depths = [n for n in (1, L // 4, L // 2, L) if n]
    return {
        "micro-batch (sequences)": [(n, (L, n, T)) for n in (1, 2, 4, 8)],
        "context (tokens)": [(n, (L, B, n)) for n in contexts],
        "depth (layers)": [(n, (n, B, T)) for n in depths],
    }


def draw_growth(results, title, path):
    """Draw time and memory over each thing that was varied."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 3, figsize=(12, 6), sharex="col")
    for column, (name, points) in zip(axes.T, results.items(), strict=True):
        at = [point["at"] for point in points]
        column[0].plot(at, [point["seconds"] for point in points], marker="o")
        column[1].plot(at, [point["bytes"] / 2**30 for point in points], marker="o")
        column[0].set_ylabel("seconds a step")
        column[1].set_ylabel("peak GiB")
        column[1].set_xlabel(name)
        for ax in column:
            ax.set(ylim=(0, None), xlim=(0, None))
            ax.grid(alpha=0.3)
    fig.suptitle(title)
    fig.tight_layout()
    atomic_write(path, lambda f: fig.savefig(f, format="png", dpi=110))
    log(f"drawn in {path}")


def bench_growth(args):
    """Time and memory of a step over micro-batch, context and depth, and a picture of them."""
    folder = Path(args.picture).parent
    if not folder.is_dir():
        raise UserError(f"--picture {args.picture}: there is no folder {str(folder)!r}")
    preset = PRESETS[args.preset]
    B, T = 2, min(256, preset["block_size"])
    results = {}
    for name, points in growth_sweeps(preset, B, T).items():
        results[name] = []
        for n, point in points:
            with separate_processes(point=(growth_point, args, *point)) as works:
                seconds, peak = works["point"]()
            results[name].append(dict(at=n, seconds=seconds, bytes=peak))
            log(f"  {name} {n:5}: {seconds:7.3f} s a step, {peak / 2**30:5.2f} GiB")
    title = (f"a training step of {args.preset}, eager: where it is not varied, "
             f"{preset['n_layer']} layers, {B} x {T} tokens")
    draw_growth(results, title, args.picture)
    return results


# -----------------------------------------------------------------------------
# processes


def train_under_torchrun(n_processes, folder, steps):
    """Train a small model in `folder`; the median tokens per second of its steps from the third."""
    settings = dict(n_layer=4, n_head=6, n_embd=384, block_size=256, data_root="data",
                    total_batch_size=4096, batch_size=4, max_steps=steps, val_tokens=256,
                    hellaswag_examples=0, num_samples=0, compile=False, device="cpu")
    flags = [f"--{name}={value}" for name, value in settings.items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    run_command([sys.executable, *torchrun, str(HERE / "train_gpt2.py"), *flags], cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"})
    rates = []
    for line in Path(folder, "log", "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "train" and record["step"] > 1:
            rates.append(record["tokens_per_second"])
    return statistics.median(rates)


def bench_processes(args):
    """Tokens per second of one and of two processes training together on this machine.

    Over gloo on the CPU, with one thread each.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_random_shard(data / "random_val_000000.npy", 10**6)
        write_random_shard(data / "random_train_000001.npy", 10**6)
        results = {n: train_under_torchrun(n, folder, 3 + args.rounds) for n in (1, 2)}
    log(f"\none process {results[1]:,.0f} tok/s, two {results[2]:,.0f} tok/s: "
           f"x {results[2] / results[1]:.2f}")
    return results


# -----------------------------------------------------------------------------
# the first hour on a GPU: everything once, in one command
#
# Each part runs in a process of its own, so that one that runs out of memory or breaks the CUDA
# context does not take the next ones with it. A part returns a dict with a "summary" for the table.

GPU_PART_TIMEOUT = 240  # seconds, compiling included
GPU_MAX_MICRO_STEPS = 8  # a whole step of gpt2-xl has 128, which would take half a minute

# Kinds of kernels by parts of their names, on CUDA and on the CPU; the first that matches counts.
KERNEL_KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "aten::mm", "aten::addmm",
                        "aten::bmm", "mkldnn_linear"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "communication": ("nccl",),
    "fused by the compiler": ("triton", "cpp_fused", "compiledfx"),
    "loss": ("softmax", "nll_loss"),
    "copies": ("memcpy", "memset", "copy_", "fill_", "zero_"),
}


def kernel_kind(name):
    name = name.lower()
    for kind, parts_of_names in KERNEL_KINDS.items():
        if any(part in name for part in parts_of_names):
            return kind
    return "other"


def estimate_training_memory(config, B):
    """The bytes that a training step should need, estimated from its shapes.

    Weights, gradients and AdamW's two moments take 16 bytes per parameter and the weights that
    autocast keeps in 16 bits another 2. Activations take 34 bytes per position, channel and layer
    (arXiv:2205.05198, section 4.1, without the attention scores that flash attention never
    stores), and logits in 16 bits, in float32 and their gradient 10 bytes each.
    """
    with torch.device("meta"):
        n_params = sum(p.numel() for p in GPT(config).parameters())
    positions = B * config.block_size
    activations = 34 * positions * config.n_embd * config.n_layer
    return 18 * n_params + activations + 10 * positions * config.vocab_size


def time_steps(step, rounds, max_seconds=30):
    """The median seconds of up to `rounds` steps, as many as begin within max_seconds."""
    seconds = []
    begin = time.perf_counter()
    while not seconds or len(seconds) < rounds and time.perf_counter() - begin < max_seconds:
        t0 = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - t0)
    return statistics.median(seconds)


def gpu_train(args):
    """Tokens per second, MFU and peak memory of training one preset."""
    config, B, micro_steps = training_shape(args)
    args.micro_steps = min(micro_steps, GPU_MAX_MICRO_STEPS)
    device = resolve_device(args.device)
    step_tokens = B * config.block_size * args.micro_steps
    step = training_ours(args, compile=device.type == "cuda")
    step()  # compiles
    step()
    seconds = time_steps(step, args.rounds)
    memory = peak_memory(device)
    datasheet = datasheet_peak(device)
    peak = datasheet[1] if datasheet else matrix_peak(device, resolve_dtype(args.dtype, device))
    with torch.device("meta"):
        flops = GPT(config).flops_per_token()
    rate = step_tokens / seconds
    mfu = rate * flops / peak
    estimate = estimate_training_memory(config, B)
    summary = (f"{rate:,.0f} tok/s, MFU {mfu:.1%}, {memory / 2**30:.1f} GiB at most "
               f"(estimate {estimate / 2**30:.1f}), {args.micro_steps} x {B} x {config.block_size} "
               "tokens a step")
    return lambda: dict(summary=summary, tokens_per_second=rate, mfu=mfu, peak_flops=peak,
                        peak_of_datasheet=bool(datasheet), step_seconds=seconds,
                        step_tokens=step_tokens, peak_bytes=memory, estimated_bytes=estimate)


def milliseconds_by_kind(recorded, cuda):
    """{kind of kernel: milliseconds} of a torch profile, longest first."""
    milliseconds = {}
    for event in recorded.key_averages():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel != cuda or event.is_user_annotation:
            continue  # on CUDA, the time of an operator is that of its kernels: count it once
        time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = kernel_kind(event.key)
        milliseconds[kind] = milliseconds.get(kind, 0.0) + time_us / 1000
    return dict(sorted(milliseconds.items(), key=lambda item: -item[1]))


def gpu_profile(args):
    """How the time of one training step of one micro-batch divides among kinds of kernels."""
    args.micro_steps = 1
    device = resolve_device(args.device)
    recorded = record_profile(training_ours(args, compile=device.type == "cuda"))
    milliseconds = milliseconds_by_kind(recorded, device.type == "cuda")
    total = sum(milliseconds.values())
    shares = [f"{kind} {ms / total:.0%}" for kind, ms in milliseconds.items()]
    summary = f"{total:,.1f} ms: {', '.join(shares)}"
    return lambda: dict(summary=summary, milliseconds=milliseconds)


def gpu_decode(args, streams):
    """Tokens per second of the engine, on CUDA compiled too, beside transformers if installed."""
    config, _, _ = training_shape(args)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    torch.manual_seed(0)
    with torch.inference_mode():
        model = GPT(config).to(device, dtype).eval()
    prompt = torch.randint(50257, (16,)).tolist()
    contenders = {"inference.py": decode_engine(model, [prompt] * streams, args.length)}
    if device.type == "cuda":
        compiled = decode_engine(model, [prompt] * streams, args.length, compile=True)
        contenders["inference.py --compile"] = compiled
    with contextlib.suppress(ImportError):
        peer = decode_transformers(config, prompt, streams, args.length, device, dtype)
        contenders["transformers"] = peer
    results = take_turns(contenders, args.rounds, "tok")
    summary = ", ".join(f"{r['name']} {r['median']:,.0f} tok/s" for r in results)
    return lambda: dict(summary=summary, contenders=results)


def gpu_hellaswag(args):
    """Seconds to encode and to score all of HellaSwag, or the first --examples, once."""
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    config, _, _ = training_shape(args)
    examples = scoring.load_examples(args.hellaswag_data)[:args.examples]
    tokenizer = load_tokenizer("gpt2")
    t0 = time.perf_counter()
    encoded = scoring.encode_examples(examples, tokenizer, config.block_size)
    encoding_seconds = time.perf_counter() - t0
    torch.manual_seed(0)
    model = GPT(config).to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    t0 = time.perf_counter()
    scores = scoring.evaluate(model, encoded, tokenizer, autocast)
    seconds = time.perf_counter() - t0
    summary = (f"{len(examples):,} examples in {seconds:.1f} s, {len(examples) / seconds:,.0f} "
               f"a second, after {encoding_seconds:.1f} s of encoding")
    return lambda: dict(summary=summary, seconds=seconds, encoding_seconds=encoding_seconds,
                        **scores)


def same_state(a, b):
    """Whether two nests of dicts, lists and tensors are equal bit for bit, wherever they lie."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def gpu_save_and_resume(args):
    """Seconds to save and to load a training state, which has to come back bit for bit."""
    config, _, _ = training_shape(args)
    device = resolve_device(args.device)
    state = training_state(config, device)
    state |= dict(config=asdict(config), tokenizer=tokenizer_to_dict(offline_tokenizer()))
    if device.type == "cuda":
        torch.cuda.synchronize()  # the state is complete before the clock starts
    t0 = time.perf_counter()
    on_host = copy_to_host(state)
    t1 = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        save_checkpoint(folder, on_host, 1)
        t2 = time.perf_counter()
        path = Path(folder) / "model_00001.pt"
        size = path.stat().st_size
        checkpoint = load_checkpoint(path)
        model = GPT.from_checkpoint(checkpoint).to(device)
        optimizer, = configure_optimizers(model, TrainConfig(), device)
        optimizer.load_state_dict(checkpoint["optimizer"][0])
        t3 = time.perf_counter()
    if not same_state(state["model"], model.state_dict()):
        raise UserError("the resumed weights differ from those that were saved")
    if not same_state(state["optimizer"], [optimizer.state_dict()]):
        raise UserError("the resumed optimizer state differs from the one that was saved")
    summary = (f"{size / 2**20:,.0f} MiB: training waits {t1 - t0:.2f} s, "
               f"saved in {t2 - t1:.2f} s, resumed in {t3 - t2:.2f} s, equal bit for bit")
    return lambda: dict(summary=summary, copy_seconds=t1 - t0, save_seconds=t2 - t1,
                        resume_seconds=t3 - t2, bytes=size)


def gpu_parts(args):
    """{name: (function, *its arguments)} of the parts, in their order."""
    first = argparse.Namespace(**{**vars(args), "preset": args.presets[0]})
    parts = {}
    for preset in args.presets:
        args_of_preset = argparse.Namespace(**{**vars(args), "preset": preset})
        parts[f"training {preset}"] = (gpu_train, args_of_preset)
    parts[f"profile of {first.preset}"] = (gpu_profile, first)
    for streams in args.streams:
        parts[f"decoding, {streams} at once"] = (gpu_decode, first, streams)
    parts["HellaSwag"] = (gpu_hellaswag, first)
    parts["save and resume"] = (gpu_save_and_resume, first)
    return parts


def run_part(build, *args):
    """Run a part in a process of its own. Returns its result; raises UserError where it fails."""
    process = ContenderProcess(build, args)
    try:
        process.receive(timeout=GPU_PART_TIMEOUT)
        return process()
    finally:
        process.close()


def describe_machine(args):
    device = resolve_device(args.device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{os.cpu_count()} CPU cores"
    return dict(device=name, dtype=dtype_name(resolve_dtype(args.dtype, device)),
                torch=torch.__version__, cuda=torch.version.cuda, commit=git_commit(),
                date=time.strftime("%Y-%m-%d"))


def gpu_table(results):
    """The results as a Markdown table."""
    machine = results["machine"]
    lines = [f"{machine['device']}, {machine['dtype']}, torch {machine['torch']}, "
             f"{machine['date']}, `python bench.py gpu`:",
             "", "| part | result |", "|---|---|"]
    for name, part in results["parts"].items():
        lines.append(f"| {name} | {part['summary']} |")
    for name, reason in results["failed"].items():
        lines.append(f"| {name} | **failed**: {reason.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def bench_gpu(args):
    """Training, a profile, decoding, HellaSwag, saving: the figures to expect of this machine.

    Writes gpu.json and gpu.md into --out after each part. A part that fails is named there with
    its reason, and the rest goes on.
    """
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {folder}: cannot make this folder ({e.strerror})") from e
    results = dict(machine=describe_machine(args), parts={}, failed={})
    for name, part in gpu_parts(args).items():
        t0 = time.perf_counter()
        try:
            result = run_part(*part)
            result["part_seconds"] = time.perf_counter() - t0
            results["parts"][name] = result
            log(f"{name}: {result['summary']}")
        except UserError as e:
            results["failed"][name] = first_line(e)
            log(f"{name}: FAILED, {e}")
        text = json.dumps(results, indent=2).encode()
        table = gpu_table(results).encode()
        atomic_write(folder / "gpu.json", lambda f, text=text: f.write(text))
        atomic_write(folder / "gpu.md", lambda f, table=table: f.write(table))
    log(f"the figures are in {folder / 'gpu.json'}, the table in {folder / 'gpu.md'}")
    return results


# -----------------------------------------------------------------------------
# the command

BENCHES = dict(floors=bench_floors, train=bench_train, decode=bench_decode, serve=bench_serve,
               tokenize=bench_tokenize, hellaswag=bench_hellaswag, checkpoint=bench_checkpoint,
               start=bench_start, growth=bench_growth, processes=bench_processes)


def make_parser():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("what", choices=(*BENCHES, "gpu", "all"), help="all: everything but gpu")
    add("--rounds", type=int, default=5, help="turns of each contender (default: 5)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="default: auto")
    add("--compile", action="store_true", help="decode, serve: the compiled engine as well")
    add("--peer", default="", help="train, decode: a checkout of build-nanogpt or nanoGPT")
    add("--preset", default="gpt2", choices=tuple(PRESETS),
        help="train, checkpoint, growth: the model (default: gpt2)")
    add("--batch_size", type=int, default=0,
        help="train: sequences per micro-batch (default: depends on the device)")
    add("--block_size", type=int, default=0,
        help="train: tokens per sequence (default: depends on the device)")
    add("--micro_steps", type=int, default=0,
        help="train: micro-batches per step (default: depends on the device)")
    add("--eager", action="store_true", help="train: train_gpt2.py without torch.compile as well")
    add("--profile", action="store_true",
        help="train: show where a step spends its time, with a trace in bench_trace.json")
    add("--streams", type=int, nargs="+",
        help="decode, serve, gpu: how many sequences at once (default: 1 8, of gpu 1 8 64)")
    add("--length", type=int, default=100,
        help="decode, serve, gpu: new tokens per sequence (default: 100)")
    add("--hellaswag_data", default="", help="HellaSwag jsonl file (default: download it once)")
    add("--examples", type=int,
        help="HellaSwag examples per turn (default: 32, of gpu all of them)")
    add("--folder", default=".", help="checkpoint: where to write (default: the current folder)")
    add("--out", default="", help="gpu: the folder for gpu.json and gpu.md")
    add("--presets", nargs="+", choices=tuple(PRESETS), metavar="PRESET",
        default=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
        help="gpu: the models to train; the first is decoded, scored and saved too "
             "(default: the four sizes of GPT-2)")
    add("--picture", default="growth.png", help="growth: where to draw it (default: growth.png)")
    return parser


def run_benches(args):
    """The results of one bench, or of all of them, without those for which something is missing."""
    if args.what != "all":
        bench = bench_gpu if args.what == "gpu" else BENCHES[args.what]
        try:
            return {args.what: bench(args)}
        except ImportError as e:
            raise UserError(f"{e.name} is not installed") from e
    results = {}
    for name, bench in BENCHES.items():
        try:
            results[name] = bench(args)
        except (UserError, ImportError) as e:
            # without a vocabulary, examples or transformers the others still count
            log(f"\n{name}: left out, {e}")
    return results


def parse_flags():
    args = make_parser().parse_args()
    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds}: expected at least 1")
    is_gpu = args.what == "gpu"
    if is_gpu and not args.out:
        raise UserError("bench.py gpu writes its figures into a folder: name it with --out")
    if not args.streams:
        args.streams = [1, 8, 64] if is_gpu else [1, 8]
    if args.examples is None and not is_gpu:
        args.examples = 32
    return args


def main():
    args = parse_flags()
    if args.peer:
        peer_classes(args.peer, ("GPT", "GPTConfig"))  # an unusable peer fails before any work
    results = run_benches(args)
    print(json.dumps(dict(bench=args.what, torch=torch.__version__,
                          threads=torch.get_num_threads(), results=results)))
    failed = results.get("gpu", {}).get("failed")
    if failed:
        raise UserError(f"{len(failed)} parts failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_main(main)
