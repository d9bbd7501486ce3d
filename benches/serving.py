"""Tokens a second over HTTP, beside the engine without it."""

import concurrent.futures
import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from benches.decoding import decode_engine, gpt2_to_decode
from benches.turns import ROOT, dtype_name, show_results, take_turns
from gptlib.common import UserError, log
from gptlib.tokenizer import make_encoding, tokenizer_to_dict


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
