"""
How fast each part is, beside its peers and its floor, on this machine: they take turns in one run, for figures drift.

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
How a step grows with batch, context and model, drawn; how two processes share one on this machine:
$ python bench.py growth --picture growth.png
$ python bench.py processes

A peer is a checkout: git clone https://github.com/karpathy/build-nanogpt, or .../nanoGPT. transformers is one where it is
installed. A table on stderr as it goes, one JSON object on the last line of stdout. What was tried: docs/speed.md.
"""

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
from gptlib.common import ArgumentParser, UserError, atomic_write, run_main
from gptlib.sources import stdlib_files
from gptlib.tokenizer import load_tokenizer, make_encoding, tokenizer_to_dict
from gptlib.engine import Engine
from gptlib.checkpoint import copy_to_host, save_checkpoint
from gptlib.loader import TokenLoader
from gptlib.runtime import PEAK_TFLOPS, compile_model, keep_freed_memory, resolve_device, resolve_dtype
from train_gpt2 import GPT, GPTConfig, PRESETS, TrainConfig, configure_optimizers, take_step
from gptlib import scoring

HERE = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# the frame


def say(text):
    print(text, file=sys.stderr, flush=True)


def take_turns(contenders, rounds, unit):
    """Run {name: function that does the work and returns how much of it} in turns, after a turn that doesn't count.

    Returns a dict a contender: median, lowest and highest rate in `unit` a second; ratio: the median over the rounds of its
    rate to the last contender's in the same round.
    """
    rates = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            t0 = time.perf_counter()
            amount = work()
            if turn:
                rates[name].append(amount / (time.perf_counter() - t0))
    *_, peer = rates.values()
    return [dict(name=name, unit=f"{unit}/s", median=statistics.median(r), low=min(r), high=max(r),
                 ratio=statistics.median(a / b for a, b in zip(r, peer, strict=True))) for name, r in rates.items()]


def show(title, results):
    say(f"\n{title}")
    for r in results:
        say(f"  {r['name']:42} {r['median']:13,.2f} {r['unit']:7} ({r['low']:,.2f} to {r['high']:,.2f})  x {r['ratio']:.2f}")


def _serve_turns(pipe, build, args):
    try:
        work = build(*args)
        pipe.send(None)
        while pipe.recv():
            pipe.send(work())
    except EOFError:
        pass
    except Exception as e:
        pipe.send(UserError(f"{build.__name__}: {e}"))


@contextlib.contextmanager
def apart(**contenders):
    """Contenders in processes of their own, where none meets another's allocator, threads or compiler.

    name=(build, *args): build(*args) returns the work, as take_turns wants it. Yields {name: work}.
    """
    context = multiprocessing.get_context("spawn")
    processes, works = [], {}

    def take(pipe):
        answer = pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        for name, (build, *args) in contenders.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve_turns, args=(theirs, build, args), daemon=True)
            process.start()
            processes.append((ours, process))
            take(ours)

            def work(pipe=ours):
                pipe.send(True)
                return take(pipe)
            works[name] = work
        yield works
    finally:
        for pipe, process in processes:
            with contextlib.suppress(OSError):
                pipe.send(False)
            process.join(timeout=10)
            process.kill()


def peer_classes(path, names):
    """The namespace of a peer's train_gpt2.py or model.py, without what it does at its top level: it may train at import."""
    for file in (Path(path) / "train_gpt2.py", Path(path) / "model.py"):
        if file.is_file():
            tree = ast.parse(file.read_text())
            keep = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef))
                    and getattr(n, "module", "") != "hellaswag"]
            module = sys.modules["peer"] = types.ModuleType("peer")  # its dataclasses look themselves up there
            module.master_process = False
            exec(compile(ast.Module(keep, []), str(file), "exec"), module.__dict__)
            if all(hasattr(module, name) for name in names):
                return module
    raise UserError(f"--peer {path} is no checkout of build-nanogpt or nanoGPT: no train_gpt2.py or model.py with "
                    f"{' and '.join(names)} in it")


# -----------------------------------------------------------------------------
# floors


def matrix_peak(device, dtype):
    """FLOP/s of the best of some matrix products."""
    best = 0.0
    for m, k, n in ((2048, 768, 3072), (2048, 3072, 768), (4096, 4096, 4096)):
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
        repeat = 200 if device.type == "cuda" else 3
        for _ in range(4):
            t0 = time.perf_counter()
            for _ in range(repeat):
                c = a @ b.t()
            c.sum().item()
            best = max(best, repeat * 2 * m * k * n / (time.perf_counter() - t0))
    return best


def memory_bandwidth(device):
    """Bytes a second at which a tensor that no cache holds is read."""
    x = torch.zeros(2**27, device=device)
    x.max().item()
    best = 0.0
    for _ in range(5):
        t0 = time.perf_counter()
        x.max().item()
        best = max(best, x.numel() * 4 / (time.perf_counter() - t0))
    return best


def bench_floors(args):
    """What the machine could do at best."""
    device = resolve_device(args.device)
    low = resolve_dtype("auto", device)
    floors = {f"matrix product, {str(dtype).removeprefix('torch.')}, TFLOP/s": matrix_peak(device, dtype) / 1e12
              for dtype in {low, torch.float32}}
    floors["memory read, GB/s"] = memory_bandwidth(device) / 1e9
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        sheet = next((t for n, t in PEAK_TFLOPS.items() if n in name), None)
        if sheet:
            floors[f"datasheet of {name}, bf16 TFLOP/s"] = sheet
    say("\nfloors\n" + "\n".join(f"  {name:48} {value:10.2f}" for name, value in floors.items()))
    return floors


# -----------------------------------------------------------------------------
# training


def shape(args):
    """Config, micro-batch and micro-steps by the flags; by default what fits a laptop, or the preset's own on a GPU."""
    cuda = resolve_device(args.device).type == "cuda"
    preset = PRESETS[args.preset]
    T = args.block_size or (preset["block_size"] if cuda else min(512, preset["block_size"]))
    B = args.batch_size or (preset["batch_size"] if cuda else 4)
    micro_steps = args.micro_steps or (max(1, preset["total_batch_size"] // (B * T)) if cuda else 1)
    config = GPTConfig(T, 50304, preset["n_layer"], preset["n_head"], preset["n_embd"])
    return config, B, micro_steps


def training_ours(args, compile):
    """A step of train_gpt2.py: its model, take_step and optimizers, on made-up tokens."""
    config, B, micro_steps = shape(args)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    T = config.block_size
    cfg = TrainConfig(block_size=T, batch_size=B, total_batch_size=B * T * micro_steps, n_layer=config.n_layer,
                      n_head=config.n_head, n_embd=config.n_embd, warmup_steps=0)
    keep_freed_memory(device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    raw_model = GPT(config).to(device)
    model = compile_model(raw_model, device) if compile else raw_model
    optimizers = configure_optimizers(raw_model, cfg, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    x, y = torch.randint(50257, (2, B, T), device=device)

    def work():
        loss, _ = take_step(model, [(x, y, B * T)] * micro_steps, optimizers, scaler, autocast, cfg.max_lr, cfg)
        loss.item()
        return cfg.total_batch_size
    return work


def training_plain(args, peer, compile):
    """The plain loop, around the model of a peer's checkout or, where peer is empty, around ours."""
    config, B, micro_steps = shape(args)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    if peer:
        module = peer_classes(peer, ("GPT", "GPTConfig"))
        model = module.GPT(module.GPTConfig(config.block_size, config.vocab_size, config.n_layer, config.n_head,
                                            config.n_embd)).to(device)
    else:
        model = GPT(config).to(device)
    fused = not peer or device.type == "cuda"  # as build-nanogpt has it
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
    """Tokens a second of whole optimizer steps, and MFU: 6N + attention (GPT.flops_per_token) over the measured peak."""
    config, B, micro_steps = shape(args)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    contenders = {"train_gpt2.py": (training_ours, args, True)}
    if args.eager:
        contenders["train_gpt2.py --no-compile"] = (training_ours, args, False)
    contenders["same model, plain torch.compile"] = (training_plain, args, "", True)
    if args.peer:
        contenders[f"{Path(args.peer).resolve().name}, eager"] = (training_plain, args, args.peer, False)
    title = f"training {args.preset}, {micro_steps} x {B} x {config.block_size} tokens a step, " \
            f"{str(dtype).removeprefix('torch.')}, {device.type}"
    with apart(**contenders) as works:
        results = take_turns(works, args.rounds, "tok")
    show(title, results)
    with torch.device("meta"):
        flops = GPT(config).flops_per_token()
    peak = matrix_peak(device, dtype)
    for r in results:
        r["mfu"] = r["median"] * flops / peak
    say(f"  at {flops / 1e9:.2f} GFLOP a token the measured peak, {peak / 1e12:.2f} TFLOP/s, is {peak / flops:,.0f} tok/s: "
        + ", ".join(f"{r['name']} {r['mfu']:.0%}" for r in results))
    if args.profile:
        profile(training_ours(args, True))
    loader = loader_share(args, config, B * micro_steps * config.block_size, results[0]["median"])
    say(f"  TokenLoader makes {loader['tok/s']:,.0f} tok/s: {loader['share of a step']:.2%} of a step")
    return {title: results, "loader": loader}


def loader_share(args, config, step_tokens, rate):
    """How long TokenLoader takes for a step's tokens, as a share of the step; it works while the step before computes."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "random_train_000001.npy",
                np.random.default_rng(0).integers(50257, size=4 * step_tokens + 10**6, dtype=np.uint16))
        loader = TokenLoader(folder, "train", config.block_size, shuffle=True)
        t0 = time.perf_counter()
        for step in range(4):
            list(loader.batches(step * step_tokens, step_tokens, args.batch_size or 4))
        made = 4 * step_tokens / (time.perf_counter() - t0)
    return {"tok/s": made, "share of a step": rate / made}


def profile(work):
    """Where a step goes: a table on stderr, a trace for https://ui.perfetto.dev in bench_trace.json."""
    from torch.profiler import ProfilerActivity
    work(), work()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with torch.profiler.profile(activities=activities) as p:
        work()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    say(p.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60))
    p.export_chrome_trace("bench_trace.json")
    say("the trace is in bench_trace.json")


# -----------------------------------------------------------------------------
# decoding


def gpt2_to_decode(args):
    """Device, dtype and GPT-2 (124M) with random weights, as the flags ask for it."""
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    torch.manual_seed(0)
    with torch.inference_mode():
        return device, dtype, GPT(GPTConfig(vocab_size=50304)).to(device, dtype).eval()


def engine_alone(model, prompts, length, compile=False, stop_token=None):
    """inference.py's engine, a slot for each of the prompts."""
    engine = Engine(model, len(prompts), n_vocab=50257, stop_token=stop_token, compile=compile)

    def work():
        requests = [engine.submit(prompt, max_length=length, top_k=50, seed=i) for i, prompt in enumerate(prompts)]
        while engine.step():
            pass
        return sum(len(r.tokens) for r in requests)
    return work


def bench_decode(args):
    """Tokens a second of `streams` sequences of `length` new tokens each, sampled with top_k 50 at temperature 1."""
    device, dtype, model = gpt2_to_decode(args)
    prompt = torch.randint(50257, (16,)).tolist()
    peer = peer_classes(args.peer, ("GPT", "GPTConfig")) if args.peer else None
    if not hasattr(getattr(peer, "GPT", None), "generate"):  # build-nanogpt has none
        peer = None

    def transformers(streams):
        from transformers import GPT2Config, GPT2LMHeadModel
        hf = GPT2LMHeadModel(GPT2Config(eos_token_id=None, bos_token_id=None)).to(device, dtype).eval()
        idx = torch.tensor([prompt] * streams, device=device)

        def work():
            out = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=args.length, do_sample=True, top_k=50,
                              pad_token_id=0)
            assert out.shape == (streams, len(prompt) + args.length)
            return streams * args.length
        return work

    def nanogpt(streams):
        nano = peer.GPT(peer.GPTConfig(vocab_size=50304)).to(device).eval()
        idx = torch.tensor([prompt] * streams, device=device)

        def work():
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                nano.generate(idx, args.length, temperature=1.0, top_k=50)
            return streams * args.length
        return work

    def read_weights():
        """The floor of one stream: every weight is read once a token, and nothing else is done."""
        weights = torch.zeros(sum(p.numel() * p.element_size() for p in model.parameters()) // 4, device=device)

        def work():
            for _ in range(20):
                weights.max().item()
            return 20
        return work

    results = {}
    for streams in args.streams:
        contenders = {"weights read once a token": read_weights()} if streams == 1 else {}
        contenders["inference.py"] = engine_alone(model, [prompt] * streams, args.length)
        if args.compile:
            contenders["inference.py --compile"] = engine_alone(model, [prompt] * streams, args.length, compile=True)
        contenders["nanoGPT" if peer else "transformers"] = (nanogpt if peer else transformers)(streams)
        title = f"{streams} x {args.length} tokens, {str(dtype).removeprefix('torch.')}, {device.type}"
        results[title] = take_turns(contenders, args.rounds, "tok")
        show(title, results[title])
    return results


# -----------------------------------------------------------------------------
# serving


def bench_serve(args):
    """Tokens a second that as many clients as `streams` get together from serve.py, answers whole and streamed."""
    device, dtype, model = gpt2_to_decode(args)
    prompts = torch.randint(50257, (max(args.streams), 16)).tolist()  # a different one each: nobody's is read for another
    pairs = [bytes([i]) for i in range(256)] + [bytes([i // 256, i % 256]) for i in range(50000)]
    tokenizer = make_encoding("bpe", {token: i for i, token in enumerate(pairs)})  # as many tokens as GPT-2's, offline

    def ask(port, i, stream):
        body = dict(prompt=prompts[i], max_tokens=args.length, top_k=50, seed=i, stream=stream,
                    stream_options=dict(include_usage=True) if stream else None)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        text = connection.getresponse().read().decode()
        answer = json.loads(text.split("data: ")[-2] if stream else text)
        return answer["usage"]["completion_tokens"]

    def clients(port, n, stream):
        def work():
            with concurrent.futures.ThreadPoolExecutor(n) as pool:
                return sum(pool.map(lambda i: ask(port, i, stream), range(n)))
        return work

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "gpt2_shape.pt"
        torch.save(dict(model=model.state_dict(), config=asdict(model.config),
                        tokenizer=tokenizer_to_dict(tokenizer)), checkpoint)
        settings = dict(port=0, model_checkpoint=checkpoint, slots=max(args.streams), device=args.device, dtype=args.dtype,
                        compile=args.compile)
        server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("serve.py")),
                                   *(f"--{k}={v}" for k, v in settings.items())], stderr=subprocess.PIPE, text=True)
        try:
            seen = []
            while not any(line.startswith("serving ") for line in seen):
                seen.append(server.stderr.readline())
                if not seen[-1]:
                    raise UserError("serve.py did not start:\n" + "".join(seen))
            port = int("".join(seen).split("listening on http://127.0.0.1:")[1].split(",")[0])
            results = {}
            for n in args.streams:
                title = f"{n} clients x {args.length} tokens, {str(dtype).removeprefix('torch.')}, {device.type}"
                results[title] = take_turns({"serve.py": clients(port, n, False),
                                             "serve.py, streamed": clients(port, n, True),
                                             "inference.py without HTTP": engine_alone(
                                                 model, prompts[:n], args.length, args.compile, stop_token=50256)},
                                            args.rounds, "tok")
                show(title, results[title])
        finally:
            server.terminate()
            server.wait()
    rates = [rates[0]["median"] for rates in results.values()]
    say(f"\n{args.streams[-1]} clients get {rates[-1] / rates[0]:.2f} times what {args.streams[0]} gets")
    return results


# -----------------------------------------------------------------------------
# tokenizing


def _load_tokenizer():
    global enc
    enc = load_tokenizer("gpt2")


def _tokenize(text):
    """As the original fineweb.py does it, in a process of a pool."""
    tokens = np.array([enc.eot_token, *enc.encode_ordinary(text)])
    assert (0 <= tokens).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def bench_tokenize(args):
    """GPT-2 tokens a second of the Python standard library's text, from memory to uint16 arrays, without the disk."""
    enc = load_tokenizer("gpt2")
    texts = [text for path in stdlib_files() if (text := Path(path).read_text(errors="replace")) and len(text) < 200000] * 4
    processes = os.cpu_count()
    n_tokens = sum(len(tokens) for tokens, _ in encode_stream(enc, texts, processes))

    def ours():
        return sum(len(tokens) for tokens, _ in encode_stream(enc, texts, processes))

    def one_thread():
        return sum(len(enc.encode_ordinary(text)) + 1 for text in texts)

    with multiprocessing.get_context("spawn").Pool(processes, _load_tokenizer) as pool:
        def original():
            return sum(map(len, pool.imap(_tokenize, texts, chunksize=16)))
        results = take_turns({f"fineweb.py, {processes} threads": ours, "tiktoken, one thread": one_thread,
                              f"the original's pool of {processes} processes": original}, args.rounds, "tok")
    show(f"tokenizing {n_tokens:,} tokens", results)
    return {"tokenize": results}


# -----------------------------------------------------------------------------
# HellaSwag


def hellaswag_contender(args, dtype, plain):
    """hellaswag.py, or the plain method: each ending whole, with its context, in rows of four."""
    device = resolve_device(args.device)
    if not plain:  # as hellaswag.py does
        keep_freed_memory(device)
    enc = load_tokenizer("gpt2")
    examples = scoring.load_examples(args.hellaswag_data)[:args.examples]
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50304)).to(device).eval()
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def ours():
        scoring.evaluate(model, examples, enc, autocast)
        return len(examples)

    @torch.no_grad()
    def theirs():
        for example in examples:
            context, endings = scoring.encode(example, enc)
            T = len(context) + max(map(len, endings))
            idx = torch.tensor([context + e + [0] * (T - len(context) - len(e)) for e in endings], device=device)
            with autocast:
                logits, _ = model(idx)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten(), reduction="none").view(4, -1)
            loss[:, len(context) - 1:].sum(1).argmin().item()
        return len(examples)
    return theirs if plain else ours


def bench_hellaswag(args):
    """Examples a second of GPT-2 (124M), random weights, beside the plain method."""
    device = resolve_device(args.device)
    scoring.load_examples(args.hellaswag_data)  # what is missing shows here
    results = {}
    for dtype in {torch.float32: 0, resolve_dtype("auto", device): 0}:
        with apart(**{"hellaswag.py": (hellaswag_contender, args, dtype, False),
                      "the plain method": (hellaswag_contender, args, dtype, True)}) as works:
            title = f"HellaSwag, {args.examples} examples, {str(dtype).removeprefix('torch.')}, {device.type}"
            results[title] = take_turns(works, args.rounds, "ex")
        show(title, results[title])
    return results


# -----------------------------------------------------------------------------
# checkpoints


def bench_checkpoint(args):
    """Checkpoints of the preset's model and AdamW a second: what training waits for, and what goes on behind its back."""
    config, *_ = shape(args)
    device = resolve_device(args.device)
    model = GPT(config).to(device)
    optimizer, = configure_optimizers(model, TrainConfig(), device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    state = dict(model=model.state_dict(), optimizer=[optimizer.state_dict()], step=1)
    on_host = copy_to_host(state)

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        def copy():
            if device.type == "cuda":
                torch.cuda.synchronize()
            copy_to_host(state)
            return 1

        def ours():
            save_checkpoint(folder, on_host, 1)
            return 1

        def bare():
            torch.save(on_host, Path(folder) / "bare.pt")
            return 1

        ours()
        size = (Path(folder) / "model_00001.pt").stat().st_size
        data = os.urandom(2**20) * (size // 2**20)

        def write():
            atomic_write(Path(folder) / "bytes", lambda f: f.write(data))
            return 1

        title = f"checkpoint of {args.preset}, {size / 2**20:,.0f} MiB, {device.type}"
        results = take_turns({"copy_to_host: all that training waits for": copy, "save_checkpoint, in the background": ours,
                              "torch.save, not flushed": bare, "floor: as many bytes, flushed": write}, args.rounds, "runs")
    show(title, results)
    say("  in seconds: " + ", ".join(f"{r['name'].split(',')[0].split(':')[0]} {1 / r['median']:.2f}" for r in results))
    return {title: results}


# -----------------------------------------------------------------------------
# from the command to the first thing it does


def bench_start(args):
    """Whole processes a second, beside `import torch`: a training run of one step, a sample of one token."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("".join(f"The {n} green bottles are hanging on the wall.\n" for n in range(20000)))
        prepare(f"{folder}/data", source="files", files=str(corpus), tokenizer="bpe", vocab_size=300)

        def script(*argv):
            def work():
                done = subprocess.run([sys.executable, *argv], cwd=folder, capture_output=True, text=True)
                if done.returncode:
                    raise UserError(f"{' '.join(argv)}: {done.stderr}")
                return 1
            return work

        train = ["--preset=demo", "--data_root=data", "--max_steps=1", "--val_tokens=128", "--num_samples=0",
                 f"--device={args.device}"]
        results = take_turns({
            "train_gpt2.py, one step, evaluation, log": script(str(HERE / "train_gpt2.py"), *train),
            "inference.py, one token": script(str(HERE / "inference.py"), "--max_length=1", f"--device={args.device}"),
            "python -c 'import torch'": script("-c", "import torch")}, args.rounds, "runs")
    show("start", results)
    say("  in seconds: " + ", ".join(f"{r['name']} {1 / r['median']:.2f}" for r in results))
    return {"start": results}


# -----------------------------------------------------------------------------
# how it grows


def growth_point(args, n_layer, B, T):
    """Seconds and peak bytes of a training step, measured in a process of its own."""
    args.batch_size, args.block_size = B, T
    preset = {**PRESETS[args.preset], "n_layer": n_layer}
    PRESETS[args.preset] = preset
    step = training_ours(args, False)
    step(), step()  # the memory of the second is still fresh
    t0 = time.perf_counter()
    for _ in range(args.rounds):
        step()
    seconds = (time.perf_counter() - t0) / args.rounds
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
    return lambda: (seconds, peak)


def peak_memory():
    """Bytes this process has had in memory at most."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):  # no Linux; there ru_maxrss would begin with what the parent had
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bench_growth(args):
    """Time and memory of a step over micro-batch, context and depth, one at a time, and a picture of them."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    folder = Path(args.picture).parent
    if not folder.is_dir():
        raise UserError(f"--picture {args.picture}: there is no folder {str(folder)!r}")
    preset = PRESETS[args.preset]
    L, B, T = preset["n_layer"], 2, min(256, preset["block_size"])
    sweeps = {"micro-batch (sequences)": [(n, (L, n, T)) for n in (1, 2, 4, 8)],
              "context (tokens)": [(n, (L, B, n)) for n in (128, 256, 512, 1024) if n <= preset["block_size"]],
              "depth (layers)": [(n, (n, B, T)) for n in (1, L // 4, L // 2, L) if n]}
    results = {}
    fig, axes = plt.subplots(2, 3, figsize=(12, 6), sharex="col")
    for column, (name, points) in zip(axes.T, sweeps.items(), strict=True):
        results[name] = []
        for n, point in points:
            with apart(point=(growth_point, args, *point)) as works:
                seconds, peak = works["point"]()
            results[name].append(dict(at=n, seconds=seconds, bytes=peak))
            say(f"  {name} {n:5}: {seconds:7.3f} s a step, {peak / 2**30:5.2f} GiB")
        at = [r["at"] for r in results[name]]
        for ax, key, scale, label in ((column[0], "seconds", 1, "seconds a step"), (column[1], "bytes", 2**-30, "peak GiB")):
            ax.plot(at, [r[key] * scale for r in results[name]], marker="o")
            ax.set(ylabel=label, ylim=(0, None), xlim=(0, None))
            ax.grid(alpha=0.3)
        column[1].set_xlabel(name)
    fig.suptitle(f"a training step of {args.preset}, eager: where it is not varied, {L} layers, {B} x {T} tokens")
    fig.tight_layout()
    atomic_write(args.picture, lambda f: fig.savefig(f, format="png", dpi=110))
    say(f"drawn in {args.picture}")
    return results


def bench_processes(args):
    """Tokens a second of one and of two processes that train together over gloo, a thread each, on this machine."""
    results = {}
    preset = {"n_layer": 4, "n_head": 6, "n_embd": 384, "block_size": 256}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        for i, split in enumerate(("val", "train")):
            np.save(f"{folder}/data/random_{split}_{i:06d}.npy",
                    np.random.default_rng(0).integers(50257, size=10**6, dtype=np.uint16))
        flags = dict(preset, data_root="data", total_batch_size=4096, batch_size=4, max_steps=3 + args.rounds,
                     val_tokens=256, hellaswag_examples=0, num_samples=0, compile=False, device="cpu")
        for n in (1, 2):
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                            str(HERE / "train_gpt2.py"), *(f"--{k}={v}" for k, v in flags.items())], cwd=folder, check=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
            with open(f"{folder}/log/log.jsonl") as f:
                records = [json.loads(line) for line in f]
            results[n] = statistics.median(r["tokens_per_second"] for r in records if r["kind"] == "train" and r["step"] > 1)
    say(f"\none process {results[1]:,.0f} tok/s, two {results[2]:,.0f} tok/s: x {results[2] / results[1]:.2f}")
    return results


def main():
    benches = dict(floors=bench_floors, train=bench_train, decode=bench_decode, serve=bench_serve, tokenize=bench_tokenize,
                   hellaswag=bench_hellaswag, checkpoint=bench_checkpoint, start=bench_start, growth=bench_growth,
                   processes=bench_processes)
    parser = ArgumentParser(__doc__)
    parser.add_argument("what", choices=(*benches, "all"))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: 5)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="default: auto")
    parser.add_argument("--compile", action="store_true", help="decode, serve: the compiled engine as well")
    parser.add_argument("--peer", default="", help="train, decode: a checkout of build-nanogpt or nanoGPT")
    parser.add_argument("--preset", default="gpt2", choices=tuple(PRESETS), help="train, checkpoint, growth (default: gpt2)")
    parser.add_argument("--batch_size", type=int, default=0, help="train: sequences a micro-batch (default: by the device)")
    parser.add_argument("--block_size", type=int, default=0, help="train: tokens a sequence (default: by the device)")
    parser.add_argument("--micro_steps", type=int, default=0, help="train: micro-batches a step (default: by the device)")
    parser.add_argument("--eager", action="store_true", help="train: train_gpt2.py without torch.compile as well")
    parser.add_argument("--profile", action="store_true", help="train: where a step goes, and a trace in bench_trace.json")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="decode, serve: sequences at a time "
                                                                               "(default: 1 8)")
    parser.add_argument("--length", type=int, default=100, help="decode, serve: new tokens a sequence (default: 100)")
    parser.add_argument("--hellaswag_data", default="", help="HellaSwag jsonl file (default: download it once)")
    parser.add_argument("--examples", type=int, default=32, help="HellaSwag examples a turn (default: 32)")
    parser.add_argument("--folder", default=".", help="checkpoint: the disk to write to (default: this folder's)")
    parser.add_argument("--picture", default="growth.png", help="growth: where to draw it (default: growth.png)")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds}: expected at least 1")
    if args.peer:
        peer_classes(args.peer, ("GPT", "GPTConfig"))
    results = {}
    for name, bench in benches.items():
        if args.what in (name, "all"):
            try:
                results[name] = bench(args)
            except (UserError, ImportError) as e:
                if args.what != "all":
                    raise e if isinstance(e, UserError) else UserError(f"{e.name} is not installed") from e
                say(f"\n{name}: left out, {e}")  # no vocabulary, no examples, no transformers: the others still count
    print(json.dumps(dict(bench=args.what, torch=torch.__version__, threads=torch.get_num_threads(), results=results)))


if __name__ == "__main__":
    run_main(main)
