"""
How fast each part is, beside its peers, on this machine: they take turns in one run, since absolute figures drift.

Decoding: GPT-2 (124M), random weights, 100 new tokens, one stream and eight; transformers' generate is the peer. 512 new
tokens beside nanoGPT's generate, which has no cache, where a checkout of it is named:
$ python bench.py decode
$ python bench.py decode --compile --rounds 9
$ git clone https://github.com/karpathy/nanoGPT && python bench.py decode --nanogpt nanoGPT --streams 1 --length 512

Serving: the same model behind serve.py, one client and eight, beside the same engine without HTTP:
$ python bench.py serve

A table on stderr as it goes, one JSON object on the last line of stdout.
"""

import concurrent.futures
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from fineweb import ArgumentParser, UserError, make_encoding, run_main, tokenizer_to_dict
from inference import Engine
from train_gpt2 import GPT, GPTConfig, resolve_device, resolve_dtype

# -----------------------------------------------------------------------------
# the frame


def take_turns(contenders, rounds, unit):
    """Run {name: function that does the work and returns how much of it} in turns, after a turn that doesn't count.

    Returns a dict a contender: median, lowest and highest rate in `unit` a second, ratio of the median to the last one's.
    """
    rates = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            t0 = time.perf_counter()
            amount = work()
            if turn:
                rates[name].append(amount / (time.perf_counter() - t0))
    medians = {name: statistics.median(r) for name, r in rates.items()}
    *_, peer = medians.values()
    return [dict(name=name, unit=f"{unit}/s", median=round(medians[name], 2), low=round(min(r), 2), high=round(max(r), 2),
                 ratio=round(medians[name] / peer, 2)) for name, r in rates.items()]


def show(title, results):
    print(f"\n{title}", file=sys.stderr)
    for r in results:
        print(f"  {r['name']:32} {r['median']:10.1f} {r['unit']:6} ({r['low']:.1f} to {r['high']:.1f})   x {r['ratio']:.2f}",
              file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# decoding


def bench_decode(args):
    """Tokens a second of `streams` sequences of `length` new tokens each, sampled with top_k 50 at temperature 1."""
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    torch.manual_seed(0)
    with torch.inference_mode():
        model = GPT(GPTConfig(vocab_size=50304)).to(device, dtype).eval()
    prompt = torch.randint(50257, (16,)).tolist()

    def ours(streams, compile=False):
        engine = Engine(model, streams, n_vocab=50257, compile=compile, say=lambda text: print(text, file=sys.stderr))

        def work():
            for i in range(streams):
                engine.submit(prompt, max_length=args.length, top_k=50, seed=i)
            while engine.step():
                pass
            return streams * args.length
        return work

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
        sys.path.insert(0, args.nanogpt)
        try:
            from model import GPT as NanoGPT, GPTConfig as NanoConfig
        except ImportError as e:
            raise UserError(f"--nanogpt {args.nanogpt} is no checkout of nanoGPT: it has no model.py") from e
        nano = NanoGPT(NanoConfig(bias=True)).to(device).eval()
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
        contenders["inference.py"] = ours(streams)
        if args.compile:
            contenders["inference.py --compile"] = ours(streams, compile=True)
        contenders["nanoGPT" if args.nanogpt else "transformers"] = (nanogpt if args.nanogpt else transformers)(streams)
        title = f"{streams} x {args.length} tokens, {str(dtype).removeprefix('torch.')}, {device.type}"
        results[title] = take_turns(contenders, args.rounds, "tok")
        show(title, results[title])
    return results


# -----------------------------------------------------------------------------
# serving


def bench_serve(args):
    """Tokens a second that as many clients as `streams` get together from serve.py, answers whole and streamed."""
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    torch.manual_seed(0)
    with torch.inference_mode():
        model = GPT(GPTConfig(vocab_size=50304)).to(device, dtype).eval()
    prompts = torch.randint(50257, (max(args.streams), 16)).tolist()  # a different one each: nobody's is read for another
    pairs = [bytes([i]) for i in range(256)] + [bytes([i // 256, i % 256]) for i in range(50000)]
    tokenizer = make_encoding("bpe", {token: i for i, token in enumerate(pairs)})  # as many tokens as GPT-2's, offline

    def engine(streams):
        engine = Engine(model, streams, n_vocab=50257, stop_token=50256, compile=args.compile)

        def work():
            requests = [engine.submit(prompts[i], max_length=args.length, top_k=50, seed=i) for i in range(streams)]
            while engine.step():
                pass
            return sum(len(r.tokens) for r in requests)
        return work

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
                                             "inference.py without HTTP": engine(n)}, args.rounds, "tok")
                show(title, results[title])
        finally:
            server.terminate()
            server.wait()
    rates = [rates[0]["median"] for rates in results.values()]
    print(f"\n{args.streams[-1]} clients get {rates[-1] / rates[0]:.2f} times what {args.streams[0]} gets", file=sys.stderr)
    return results


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("what", choices=("decode", "serve"))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: 5)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="default: auto")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="sequences at a time (default: 1 8)")
    parser.add_argument("--length", type=int, default=100, help="new tokens a sequence (default: 100)")
    parser.add_argument("--compile", action="store_true", help="measure the compiled engine as well")
    parser.add_argument("--nanogpt", default="", help="a checkout of nanoGPT, to be the peer in the place of transformers")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds}: expected at least 1")
    if args.nanogpt and not Path(args.nanogpt).is_dir():
        raise UserError(f"--nanogpt {args.nanogpt} is no directory: git clone https://github.com/karpathy/nanoGPT")
    results = {"decode": bench_decode, "serve": bench_serve}[args.what](args)
    print(json.dumps(dict(bench=args.what, torch=torch.__version__, threads=torch.get_num_threads(), results=results)))


if __name__ == "__main__":
    run_main(main)
