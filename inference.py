"""
Checkpoint -> text: load a model, generate from Python, and the command that samples.

From the newest checkpoint of the last run, or from any other: one of this repository,
build-nanogpt or nanoGPT, or a Hugging Face directory:
$ python inference.py
$ python inference.py --checkpoint_path log/model_10000.pt --prompt "Hello, I'm" --max_length 200
$ python inference.py --checkpoint_path hugging_face_directory --num_samples 8 --top_p 0.95
Faster and in half the memory, with the linear layers in 8 bits:
$ python inference.py --quantize int8
A prompt from a file or from another program; the text goes to stdout, everything else to stderr:
$ python inference.py --prompt FILE:story.txt --stop "THE END" > story_continued.txt
$ git diff | python inference.py --prompt - --temperature 0
The model and its tokenizer as a Hugging Face directory, for transformers and other programs:
$ python inference.py --checkpoint_path log/model_10000.pt --export my_gpt2

From Python:
>>> from inference import generate_text, load_model_from_checkpoint
>>> model = load_model_from_checkpoint("log/latest_checkpoint.pt")
>>> print(generate_text(model, prompt="Once upon a time", max_length=100, temperature=0.8))
"""

import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

from gptlib.checkpoints.formats import load_checkpoint
from gptlib.common import ArgumentParser, UserError, log, run_main
from gptlib.config import add_flags, check_settings, setting
from gptlib.inference.engine import Engine
from gptlib.checkpoints.gguf import dtype_from_name, export_gguf
from gptlib.inference.quantize import QUANTIZE_CHOICES, check_quantize, quantize_int8
from gptlib.runtime import resolve_device, resolve_dtype, use_one_thread_if_small
from gptlib.inference.sampling import SamplingParams
from gptlib.inference.text import TextStream, encode_prompt
from gptlib.data.tokenizer import check_vocabulary, load_tokenizer
from train_gpt2 import GPT

DEFAULT_CHECKPOINT = "log/latest_checkpoint.pt"
DEFAULT_PROMPT = "Hello, I'm a language model,"
MAX_SLOTS = 16  # samples decoded at a time; further ones wait for a slot

# -----------------------------------------------------------------------------
# the model


@dataclass
class LoadedModel:
    """A model that is ready to sample from, and what its checkpoint says about it."""
    model: GPT
    tokenizer: tiktoken.Encoding
    quantize: str  # "none" or "int8"
    step: int | None  # the training step it was saved at, if that is known
    sample_prompt: str  # what the samples of its training run began with


def load_for_sampling(path, device=None, dtype=None, quantize=None):
    """The LoadedModel of a checkpoint file, a Hugging Face directory or a GPT-2 name.

    device: auto by default; dtype: a torch.dtype or its name, by default the one that suits the
    device; quantize: "int8" stores the linear layers in 8 bits. The weights are converted once.
    Raises UserError for what cannot be loaded.
    """
    check_quantize("quantize", quantize)
    if str(path) == DEFAULT_CHECKPOINT and not os.path.lexists(path):
        raise UserError(f"no checkpoint {DEFAULT_CHECKPOINT!r} here yet. Train a small model in a "
                        "few minutes: python train_gpt2.py --preset demo\n"
                        "or name a checkpoint, or a GPT-2 such as gpt2: --checkpoint_path "
                        "(serve.py: --model_checkpoint)")
    device = resolve_device(str(device or "auto"))
    if not isinstance(dtype, torch.dtype):
        dtype = resolve_dtype(dtype or "auto", device)
    # mapped: the optimizer's state, twice as large as the weights, stays on disk
    checkpoint = load_checkpoint(path, mmap=True)
    model = GPT.from_checkpoint(checkpoint, dropout=0.0)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    check_vocabulary(f"the model of {str(path)!r}", model.config.vocab_size, tokenizer)
    model.tokenizer = tokenizer
    if quantize == "int8":
        model = quantize_int8(model.to(device), dtype)
    else:
        model = model.to(device, dtype).eval().requires_grad_(False)
    train_config = checkpoint.get("train_config", {})
    sample_prompt = train_config.get("sample_prompt", DEFAULT_PROMPT)
    return LoadedModel(model, tokenizer, quantize or "none", checkpoint.get("step"), sample_prompt)


def load_model_from_checkpoint(path, device=None, dtype=None, quantize=None):
    """The GPT of a checkpoint, with its `.tokenizer`. Arguments and errors: load_for_sampling."""
    return load_for_sampling(path, device, dtype, quantize).model


# -----------------------------------------------------------------------------
# from Python


def generate_text(model, prompt="", max_length=100, temperature=1.0, top_k=50, top_p=None,
                  seed=None, num_samples=1, stop=(), tokenizer=None):
    """The prompt and up to max_length tokens that continue it, as text.

    If num_samples is above 1, a list of such texts; sample i uses the seed `seed` + i. The model
    may be any GPT; one without a tokenizer of its own is taken to use GPT-2's. temperature 0 is
    greedy. Raises UserError for settings out of range.
    """
    params = SamplingParams(max_length, temperature, top_k, top_p, seed)
    tokenizer = tokenizer or model.tokenizer or load_tokenizer("gpt2")
    stop = [stop] if isinstance(stop, str) else stop
    engine = make_engine(model, tokenizer, num_samples)
    streams = start_samples(engine, tokenizer, prompt, params, num_samples, stop)
    texts = [prompt + "".join(stream) for stream in streams]
    return texts[0] if num_samples == 1 else texts


def make_engine(model, tokenizer, num_samples, compile=False):
    slots = min(num_samples, MAX_SLOTS)
    return Engine(model, slots, tokenizer.n_vocab, tokenizer.eot_token, compile)


def start_samples(engine, tokenizer, prompt, params, num_samples, stop):
    """Submit a prompt num_samples times; returns a TextStream for each. Sample i has seed + i."""
    tokens = encode_prompt(engine.model, tokenizer, prompt)
    streams = []
    for i in range(num_samples):
        sequence = engine.submit(tokens, dataclasses.replace(params, seed=params.seed + i))
        streams.append(TextStream(sequence, tokenizer, stop, engine.step))
    return streams


# -----------------------------------------------------------------------------
# the command


@dataclass
class InferenceConfig:
    """The flags of the command, beside those of SamplingParams and --stop."""
    checkpoint_path: str = setting(
        DEFAULT_CHECKPOINT, "a checkpoint file, or a Hugging Face directory")
    prompt: str = setting(
        None, "text, FILE:path, or - for stdin (default: the prompt of the run's own samples)",
        optional=True)
    num_samples: int = setting(1, "samples, decoded together", 1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting(
        "auto", "of the weights: float32, bfloat16, float16, or auto: what suits the device",
        choices=("auto", "float32", "bfloat16", "float16"))
    quantize: str = setting(
        "none", "int8: the linear layers in 8 bits, half the bytes to read for a token",
        choices=QUANTIZE_CHOICES)
    compile: bool = setting(
        False, "torch.compile the decode step: it takes a minute, decoding is faster then")
    export: str = setting(
        None, "write a Hugging Face directory (float32 unless --dtype is given), or for llama.cpp "
        "a .gguf file (name-q8_0.gguf, name-bf16.gguf; f16 by default), and no sample",
        optional=True)

    def __post_init__(self):
        check_settings(self)


# defaults of the command that differ from those of SamplingParams
SAMPLING_DEFAULTS = dict(temperature=0.8, top_k=50)
SEED_HELP = "random seed; sample i uses seed + i (default: random, printed at the end)"


def add_sampling_flags(parser):
    """Add a flag for each field of SamplingParams, with the command's own defaults."""
    for field in dataclasses.fields(SamplingParams):
        default = SAMPLING_DEFAULTS.get(field.name, field.default)
        help = field.metadata["help"]
        if field.name == "seed":
            help = SEED_HELP
        elif default is not None:
            help += f" (default: {default})"
        parser.add_argument(f"--{field.name}", type=field.type, default=default, help=help)


def parse_command_line():
    """The flags as (InferenceConfig, SamplingParams, stop strings). Raises UserError."""
    parser = ArgumentParser(__doc__)
    add_flags(parser, InferenceConfig)
    add_sampling_flags(parser)
    parser.add_argument("--stop", action="append", default=[],
                        help="text that ends a sample and is not shown; may be given several times")
    flags = vars(parser.parse_args())
    stop = flags.pop("stop")
    sampling_names = [field.name for field in dataclasses.fields(SamplingParams)]
    params = SamplingParams(**{name: flags.pop(name) for name in sampling_names})
    return InferenceConfig(**flags), params, stop


def read_prompt(prompt):
    """The text that --prompt stands for: itself, the contents of FILE:path, or stdin for -.

    A byte order mark is dropped, and the newline with which editors end a file.
    """
    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        if prompt.startswith("FILE:"):
            text = Path(prompt.removeprefix("FILE:")).read_bytes().decode("utf-8-sig")
            return text.removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise UserError(f"--prompt {prompt}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt {prompt}: not UTF-8 text") from error
    return prompt


def export_checkpoint(config):
    """Write the checkpoint as a Hugging Face directory, or as a file if its name ends in .gguf."""
    if config.quantize != "none":
        raise UserError(f"--quantize {config.quantize} is for sampling: leave it out of an export "
                        "(a file name-q8_0.gguf holds 8 bits)")
    is_gguf = config.export.lower().endswith(".gguf")
    if is_gguf:
        if config.dtype != "auto":
            raise UserError(f"--dtype is {config.dtype}: the name of a .gguf file tells its type, "
                            "such as model-bf16.gguf; leave --dtype out")
        gguf_dtype = dtype_from_name(config.export)  # before anything is read
    dtype = "float32" if config.dtype == "auto" else config.dtype
    model = load_model_from_checkpoint(config.checkpoint_path, "cpu", dtype)
    if is_gguf:
        export_gguf(model, model.tokenizer, config.export, gguf_dtype)
    else:
        model.save_pretrained(config.export)
    log(f"exported {config.checkpoint_path} to {config.export}")


def print_samples(prompt, streams):
    """Print each sample after its prompt, as its text is generated."""
    for i, stream in enumerate(streams):
        separator = "\n---\n" if i > 0 else ""
        print(separator + prompt, end="", flush=True)
        for piece in stream:
            print(piece, end="", flush=True)
    print(flush=True)


def ignore_closed_stdout():
    """Send what is left in stdout's buffer nowhere, so that the exit does not fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main():
    config, params, stop = parse_command_line()
    if config.export is not None:
        export_checkpoint(config)
        return

    prompt = None if config.prompt is None else read_prompt(config.prompt)
    loaded = load_for_sampling(
        config.checkpoint_path, config.device, config.dtype, config.quantize)
    use_one_thread_if_small(loaded.model)
    prompt = loaded.sample_prompt if prompt is None else prompt
    engine = make_engine(loaded.model, loaded.tokenizer, config.num_samples, config.compile)
    if config.compile:
        log("compiling ...")
        engine.warm_up()

    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    start = time.perf_counter()
    streams = start_samples(engine, loaded.tokenizer, prompt, params, config.num_samples, stop)
    try:
        print_samples(prompt, streams)
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        ignore_closed_stdout()
        return
    seconds = time.perf_counter() - start
    n_tokens = sum(stream.n_tokens for stream in streams)
    reasons = ", ".join(stream.sequence.finish_reason for stream in streams)
    log(f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.0f} tokens/s; "
        f"seed {params.seed}, {reasons}")


if __name__ == "__main__":
    run_main(main)
