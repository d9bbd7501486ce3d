"""Tokens a second over HTTP, beside the engine without it, and the time to the first token."""

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from string import ascii_letters

import torch

from benches.decoding import decode_engine, gpt2_to_decode
from benches.turns import ROOT, dtype_name, show_results, take_turns
from gptlib.common import UserError, log
from gptlib.data.tokenizer import make_encoding, tokenizer_to_dict


def offline_tokenizer():
    """A tokenizer with as many tokens as GPT-2's, made without a download.

    Nearly all of its tokens are letters, so that each is a piece of streamed text: half a
    character would be held back until the next token comes, and pieces could not be timed.
    """
    tokens = [bytes([i]) for i in range(256)]
    for letters in itertools.islice(itertools.product(ascii_letters, repeat=3), 50000):
        tokens.append("".join(letters).encode())
    return make_encoding("bpe", {token: i for i, token in enumerate(tokens)})


def request_completion(port, prompt, length, seed, stream, on_line=None):
    """Ask serve.py for a completion, whole or streamed; on_line() is called at each of its lines.

    Returns the number of its tokens, and when its pieces arrived, in seconds from the request on:
    of a whole one, the end.
    """
    body = dict(prompt=prompt, max_tokens=length, top_k=50, seed=seed, stream=stream,
                stream_options=dict(include_usage=True) if stream else None)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {"Content-Type": "application/json"}
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    lines, times = [], []
    for line in connection.getresponse():
        if line.strip():
            lines.append(line.decode())
            times.append(time.perf_counter() - start)
            if on_line:
                on_line()
    if stream:
        usage, done = lines[-2:]
        assert done.strip() == "data: [DONE]", done
        return json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"], times[:-2]
    return json.loads("".join(lines))["usage"]["completion_tokens"], times[-1:]


def clients(port, prompts, length, stream, first_tokens=None):
    """One client for each prompt, all at once. first_tokens: a list that gets their waiting times.
    """
    def work():
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            answers = [pool.submit(request_completion, port, prompt, length, seed, stream)
                       for seed, prompt in enumerate(prompts)]
            n_tokens = 0
            for answer in answers:
                n, times = answer.result()
                n_tokens += n
                if first_tokens is not None:
                    first_tokens.append(times[0])
            return n_tokens
    return work


def percentile(values, percent):
    """The smallest of the values that `percent` of them do not exceed (nearest rank)."""
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]


# -----------------------------------------------------------------------------
# a newcomer with a long prompt, while others are being served


PIECES_BEFORE = 10  # of text that each of the others has, on average, when the newcomer comes


def newcomer(port, prompts, long_prompt, length):
    """One client for each prompt; when they have some text, another one comes with long_prompt.

    Returns the seconds that the newcomer waited for its first token, those that the others usually
    wait for a piece of text after that, and a list of how long they waited meanwhile, in usual
    waits.
    """
    with concurrent.futures.ThreadPoolExecutor(len(prompts) + 1) as pool:
        start = time.perf_counter()
        pieces = threading.Semaphore(0)
        others = [pool.submit(request_completion, port, prompt, length, seed, True,
                              pieces.release)
                  for seed, prompt in enumerate(prompts)]
        for _ in range(PIECES_BEFORE * len(prompts)):
            pieces.acquire(timeout=600)
        arrival = time.perf_counter() - start
        _, (first_token, *_) = request_completion(port, long_prompt, 20, 0, True)
        meanwhile, after = [], []
        for other in others:
            _, times = other.result()
            for previous, now in itertools.pairwise(times):
                if now >= arrival:
                    is_meanwhile = previous <= arrival + first_token
                    (meanwhile if is_meanwhile else after).append(now - previous)
    usual = statistics.median(after)
    return first_token, usual, [wait / usual for wait in meanwhile]


def bench_newcomer(servers, n_clients, rounds):
    """The times of `newcomer` over rounds; servers: {name: port}, which take turns."""
    prompts = torch.randint(50257, (n_clients - 1, 16)).tolist()
    figures = {name: [] for name in servers}
    for turn in range(rounds + 1):
        long_prompt = torch.randint(50257, (1000,)).tolist()  # new: no cache has it
        for name, port in servers.items():
            figure = newcomer(port, prompts, long_prompt, 120)
            if turn > 0:  # the first round warms up
                figures[name].append(figure)
    results = {}
    log(f"\na newcomer's prompt of 1,000 tokens beside {n_clients - 1} streams")
    for name, rounds_of_one in figures.items():
        firsts, usuals, waits = zip(*rounds_of_one, strict=True)
        waits = [wait for one_round in waits for wait in one_round]
        p50, p99, longest = (percentile(waits, percent) for percent in (50, 99, 100))
        results[name] = dict(first_token=statistics.median(firsts),
                             usual_wait=statistics.median(usuals),
                             p50=p50, p99=p99, longest=longest)
        log(f"  {name:42} first token after {results[name]['first_token']:.2f} s; meanwhile the "
            f"others wait for p50 {p50:.2f}, p99 {p99:.2f}, longest {longest:.2f} usual waits of "
            f"{results[name]['usual_wait'] * 1e3:.0f} ms")
    return results


PREFILL_CHUNKS = (32, 64, 128, 256, 0)  # 0: the whole prompt at once


def bench_prefill_chunks(settings, n_clients, rounds):
    """bench_newcomer for servers with each of PREFILL_CHUNKS."""
    with contextlib.ExitStack() as stack:
        servers = {}
        for chunk in PREFILL_CHUNKS:
            name = f"PREFILL_CHUNK={chunk}"
            servers[name] = stack.enter_context(running_server(**settings, prefill_chunk=chunk))
        return bench_newcomer(servers, n_clients, rounds)


# -----------------------------------------------------------------------------
# the server


@contextlib.contextmanager
def running_server(**settings):
    """Run serve.py with these flags on a free port. Yields the port."""
    flags = [f"--{name}={value}" for name, value in settings.items()]
    argv = [sys.executable, str(ROOT / "serve.py"), "--port=0", *flags]
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


def write_checkpoint(model, folder):
    """Write a checkpoint whose tokenizer needs no download; returns the file."""
    checkpoint = Path(folder) / "gpt2_shape.pt"
    torch.save(dict(model=model.state_dict(), config=asdict(model.config),
                    tokenizer=tokenizer_to_dict(offline_tokenizer())), checkpoint)
    return checkpoint


def bench_serve(args, newcomers=True):
    """Tokens per second that all clients together get from serve.py, whole and streamed.

    As many clients as `streams` ask at once, beside the engine alone with the same prompts; then,
    with newcomers, how long one with a long prompt waits, and others for it, for each of
    PREFILL_CHUNKS.
    """
    device, dtype, model = gpt2_to_decode(args)
    # a different prompt for each client, so that no cache can serve one with another's
    all_prompts = torch.randint(50257, (max(args.streams), 16)).tolist()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(model_checkpoint=write_checkpoint(model, folder),
                        slots=max(args.streams), device=args.device, dtype=args.dtype,
                        compile=args.compile)
        with running_server(**settings) as port:
            for n in args.streams:
                prompts = all_prompts[:n]
                engine = decode_engine(model, prompts, args.length, args.compile, stop_token=50256)
                first_tokens = []
                contenders = {
                    "serve.py": clients(port, prompts, args.length, False),
                    "serve.py, streamed":
                        clients(port, prompts, args.length, True, first_tokens),
                    "inference.py without HTTP": engine,
                }
                title = f"{n} clients x {args.length} tokens, {dtype_name(dtype)}, {device.type}"
                results[title] = take_turns(contenders, args.rounds, "tok")
                show_results(title, results[title])
                half, most = (percentile(first_tokens[n:], percent) for percent in (50, 99))
                results[f"first token, {n} clients"] = dict(p50=half, p99=most)
                log(f"  time to the first token: p50 {half:.3f} s, p99 {most:.3f} s")
            rates = [results[title][0]["median"] for title in results if " x " in title]
            log(f"\n{args.streams[-1]} clients get {rates[-1] / rates[0]:.2f} times "
                f"what {args.streams[0]} gets")
        if newcomers and max(args.streams) > 1:
            results["newcomer"] = bench_prefill_chunks(settings, max(args.streams), args.rounds)
    return results
