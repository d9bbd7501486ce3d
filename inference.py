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
import os
import random
import sys
import time
from pathlib import Path

import torch

from gptlib.checkpoint import load_checkpoint
from gptlib.common import ArgumentParser, UserError, run_main
from gptlib.engine import Engine, Request, TextStream, encode_prompt
from gptlib.runtime import resolve_device, resolve_dtype
from gptlib.tokenizer import load_tokenizer
from train_gpt2 import GPT

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
    model, tokenizer = GPT.from_checkpoint(checkpoint, dropout=0.0), load_tokenizer(checkpoint["tokenizer"])
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(f"the model of {str(path)!r} knows {model.config.vocab_size} tokens, its tokenizer "
                        f"{tokenizer.name} has {tokenizer.n_vocab}: they don't belong together")
    model = model.to(device, dtype).eval().requires_grad_(False)
    model.tokenizer = tokenizer
    model.sample_prompt = checkpoint.get("train_config", {}).get("sample_prompt", DEFAULT_PROMPT)
    model.step = checkpoint.get("step")
    return model


def generate_text(model, prompt="", max_length=100, temperature=1.0, top_k=50, top_p=None, seed=None, num_samples=1,
                  stop=(), tokenizer=None):
    """The prompt and up to max_length tokens that continue it, as text; a list of them where num_samples is above 1.

    The model may be any GPT; one without a tokenizer of its own is taken to speak GPT-2's. temperature 0 is greedy; sample
    i has the seed `seed` + i. Raises UserError for settings out of range.
    """
    tokenizer = tokenizer or getattr(model, "tokenizer", None) or load_tokenizer("gpt2")
    stop = [stop] if isinstance(stop, str) else stop
    tokens = encode_prompt(model, tokenizer, prompt)
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
    tokens = encode_prompt(model, tokenizer, prompt)
    engine = Engine(model, min(args.num_samples, MAX_SLOTS), tokenizer.n_vocab, tokenizer.eot_token, args.compile)
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
