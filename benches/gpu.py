"""The first hour on a GPU: everything once, in one command.

Each part runs in a process of its own, so that one that runs out of memory or breaks the CUDA
context does not take the next ones with it. A part returns a dict with a "summary" for the table.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benches.checkpoints import training_state
from benches.decoding import decode_engine, decode_transformers
from benches.floors import datasheet_peak, matrix_peak
from benches.growth import peak_memory
from benches.serving import offline_tokenizer
from benches.training import record_profile, training_ours, training_shape
from benches.turns import ContenderProcess, dtype_name, take_turns
from gptlib.training import scoring
from gptlib.checkpoints.formats import load_checkpoint
from gptlib.checkpoints.saver import copy_to_host, save_checkpoint
from gptlib.common import UserError, atomic_write, first_line, log
from gptlib.training.memory import estimate_memory, model_sizes
from gptlib.training.parallel import Layout
from gptlib.runtime import git_commit, resolve_device, resolve_dtype
from gptlib.data.tokenizer import load_tokenizer, tokenizer_to_dict
from train_gpt2 import GPT, TrainConfig, configure_optimizers

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
        model = GPT(config)
    flops = model.flops_per_token()
    rate = step_tokens / seconds
    mfu = rate * flops / peak
    layout = Layout(compile=device.type == "cuda")
    estimate = estimate_memory(model_sizes(model), layout, "adamw", step_tokens, B).peak
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
    """Whether two nests of dicts, lists and tensors are equal bit for bit, on any devices."""
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
    """Run a part in a process of its own. Returns its result; raises UserError if it fails."""
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
