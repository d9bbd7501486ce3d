"""The first ten minutes on a GPU: what is worth knowing about it, in one command.

$ python bench.py gpu --out gpu_report --seconds 600 --data_root edu_fineweb10B

The parts run in the order of PARTS until --seconds are over; --parts chooses some of them. A part
that fails is named, and the rest goes on. docs/gpu.md says what each measures.

The machine needs torch, tiktoken and tqdm, and flask, limits, pydantic, prometheus-client and
waitress for serving; transformers is a peer in decoding if it is there. Without --data_root the
text is Python's standard library. Its tokens, and HellaSwag's, need GPT-2's
vocabulary: without network, carry it and name its folder in TIKTOKEN_CACHE_DIR, and give
--hellaswag_data FILE or --examples 0. Four files come out: gpu.md has the tables, beside it are
gpu.json, kernels.txt and train.jsonl.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

import benches.training
from benches.checkpoints import bench_checkpoint
from benches.decoding import bench_decode
from benches.parts import Runs, end_process, parts_table, run_parts
from benches.serving import bench_serve
from benches.training import measure_training, training_ours, training_shape
from benches.turns import ContenderProcess, dtype_name, run_alone
from fineweb import PrepareConfig, prepare
from gptlib.common import UserError, atomic_write, first_line, log
from gptlib.runtime import device_name, git_commit, resolve_device, resolve_dtype
from gptlib.training.gpu_facts import peak_flops
from gptlib.training.memory import estimate_memory, model_sizes
from gptlib.training.parallel import Layout
from train_gpt2 import GPT, TrainConfig, configure_optimizers

MAX_MICRO_STEPS = 8  # a whole step of gpt2-xl has 128, which would take half a minute

# Kinds of kernels by parts of their names, on CUDA and on the CPU; the first that matches counts.
KERNEL_KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "aten::mm", "aten::addmm",
                        "aten::bmm", "mkldnn_linear", "triton_tem"),
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


def milliseconds_by_kind(kernels):
    """{kind: milliseconds} of {name of a kernel: milliseconds}, longest first."""
    kinds = {}
    for name, ms in kernels.items():
        kinds[kernel_kind(name)] = kinds.get(kernel_kind(name), 0.0) + ms
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


# -----------------------------------------------------------------------------
# the training step, changed in one thing or two

# attention: the only kernel allowed beside torch's plain one. inductor: its options. stream: the
# dtype of the residual stream, which is float32 under autocast.
TUNED = dict(max_autotune=True, coordinate_descent_tuning=True)  # without CUDA graphs
VARIANTS = {
    "as it is": {},
    "cuDNN's attention": dict(attention="cudnn"),
    "flash attention": dict(attention="flash"),
    "bfloat16 stream": dict(stream=torch.bfloat16),
    "coordinate descent": dict(inductor=dict(coordinate_descent_tuning=True)),
    "max-autotune": dict(inductor=TUNED),
    "bfloat16 stream, max-autotune": dict(stream=torch.bfloat16, inductor=TUNED),
}


def use_variant(attention=None, inductor=None, stream=None):
    """Change this process: all training steps built from now on are of that variant."""
    for kind in ("cudnn", "flash", "mem_efficient") if attention else ():
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(kind == attention)
    if inductor:
        from torch._inductor import config
        for name, value in inductor.items():
            setattr(config, name, value)
    if stream:
        def round_stream(module, args, x):
            # layer norms compute in float32 still, and each sum is rounded
            return x.to(stream) if torch.is_autocast_enabled(x.device.type) else x

        class Model(GPT):
            def __init__(self, config):
                super().__init__(config)
                self.transformer.drop.register_forward_hook(round_stream)
        benches.training.GPT = Model


def measure_variant(args, name):
    use_variant(**VARIANTS[name])
    return measure_training(training_ours, args, args.compile, kernels=True)


def variants(args, seconds):
    """A step of each variant: all compile at the same time, then each is timed twice, alone.

    Micro-batches of 16 rows, so that all fit beside each other into 80 GB. A variant
    that tunes itself does so on a busy GPU: time a winner again, alone.
    """
    if args.compile:
        args = changed(args, batch_size=args.batch_size or 16, micro_steps=4, rounds=10)
    end = time.monotonic() + seconds / 2
    processes = {name: ContenderProcess(measure_variant, (args, name)) for name in VARIANTS}
    turns, rows = {name: [] for name in VARIANTS}, {}

    def attempt(name, function, *args):
        if name not in rows:
            try:
                return function(*args)
            except UserError as e:
                rows[name] = f"**failed**: {first_line(e)}"
                processes[name].kill()

    for name, process in processes.items():
        attempt(name, process.receive, max(0.1, end - time.monotonic()))
    for name in [*VARIANTS, *VARIANTS]:
        turns[name].append(attempt(name, processes[name], seconds / 2))
    for process in processes.values():
        process.close()
    if "as it is" in rows:
        raise UserError(rows["as it is"])  # the others are compared with it
    base = turns["as it is"][0]
    for name, (turn, again) in turns.items():
        if name not in rows:
            kinds = milliseconds_by_kind(turn["kernels"])
            shares = ", ".join(f"{kind} {ms:.1f}" for kind, ms in kinds.items())
            rows[name] = (f"{turn['ms']:.2f} ms a micro-batch (again: {again['ms']:.2f}), x "
                          f"{turn['median'] / base['median']:.3f}, first step after "
                          f"{turn['first_seconds']:.0f} s; ms of kernels a step: {shares}")
    attention = [kernel for kernel in base["kernels"] if kernel_kind(kernel) == "attention"]
    rows["attention as it is"] = ", ".join(attention) or "no kernel of such a name"
    lines = [f"{ms:10.3f} ms  {kernel}" for kernel, ms in base["kernels"].items()]
    return dict(rows=rows, turns=turns, files={"kernels.txt": "\n".join(lines)})


# -----------------------------------------------------------------------------
# parts in a process of their own: a dict with "rows", {what: the figures in words}


def optimizers(args):
    """The step of each optimizer alone, on random gradients."""
    device = resolve_device(args.device)
    config, _, _ = training_shape(args)
    seconds = {}
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        with device:
            model = GPT(config)
        steps = configure_optimizers(model, TrainConfig(optimizer=name), device)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        turns = []
        for _ in range(3 + args.rounds):
            t0 = time.perf_counter()
            for optimizer in steps:
                optimizer.step()
            model.lm_head.weight[0, 0].item()  # waits for the device
            turns.append(time.perf_counter() - t0)
        seconds[name] = statistics.median(turns[3:])
    rows = {name: f"{1000 * value:.2f} ms" for name, value in seconds.items()}
    return dict(rows=rows, seconds=seconds)


def training(args, recompute):
    """A step of a preset at its own micro-batch, and its peak beside the plan's."""
    config, B, micro_steps = training_shape(args)
    result = measure_training(training_ours, args, args.compile, recompute)()
    with torch.device("meta"):
        model = GPT(config)
    layout = Layout(compile=args.compile, recompute_every=int(recompute))
    tokens = B * config.block_size * micro_steps
    planned = estimate_memory(model_sizes(model), layout, "adamw", tokens, B).peak
    peak = peak_flops(resolve_device(args.device))
    text = (f"{result['median']:,.0f} tok/s, {result['ms']:.1f} ms a micro-batch, "
            f"{result['peak_bytes'] / 2**30:.1f} GiB (planned {planned / 2**30:.1f}), first step "
            f"after {result['first_seconds']:.0f} s")
    if peak:
        text += f", MFU {result['median'] * model.flops_per_token() / peak:.1%}"
    return dict(rows={f"{micro_steps} x {B} x {config.block_size} tokens": text},
                planned_bytes=planned, **result)


def rates(args, bench, *options):
    """A bench of bench.py, with a row for each line of its table."""
    results = bench(args, *options)
    rows = {}
    for title, turns in results.items():
        for r in turns if isinstance(turns, list) else ():
            text = f"{r['median']:,.2f} {r['unit']}, x {r['ratio']:.2f}"
            if "GB/s" in r:
                text += f", {r['microseconds']:,.0f} us a step, {r['GB/s']:,.1f} GB/s of weights"
            rows[f"{title}: {r['name']}"] = text
    return dict(rows=rows, results=results)


# -----------------------------------------------------------------------------
# train_gpt2.py itself

RUN_STEPS, EVALUATED_STEP, KILLED_STEP = 25, 12, 15


def run_settings(args, data_root):
    """The flags of train_gpt2.py for a short run of the preset's model."""
    config, B, micro_steps = training_shape(args)
    tokens = B * config.block_size * micro_steps
    settings = dict(
        data_root=Path(data_root).resolve(), log_dir="run", device=args.device, dtype=args.dtype,
        n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, batch_size=B,
        block_size=config.block_size, total_batch_size=tokens, max_steps=RUN_STEPS,
        eval_interval=EVALUATED_STEP, val_tokens=4 * tokens, checkpoint_interval=EVALUATED_STEP,
        compile=args.compile, auto_resume=True)
    if args.hellaswag_data:
        settings["hellaswag_data"] = Path(args.hellaswag_data).resolve()
    if args.examples is not None:
        settings["hellaswag_examples"] = args.examples
    return settings


def training_run(args, seconds):
    """train_gpt2.py under torchrun on real text beside the bare step, killed once on the way."""
    end = time.monotonic() + seconds
    bare = run_alone(seconds, training, args, False)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(folder, resolve_device(args.device).type, end - time.monotonic())
        if not args.data_root:
            prepare(PrepareConfig(f"{folder}/data", source="stdlib"))
        t0 = time.monotonic()
        run = runs.start_training(run_settings(args, args.data_root or f"{folder}/data"), nproc=1)
        try:
            runs.wait_until(lambda: runs.records("run", "train"), run, "the first step")
            first = time.monotonic() - t0
            runs.wait_until(lambda: len(runs.records("run", "train")) > KILLED_STEP, run,
                            f"step {KILLED_STEP}")
            saved = runs.folder / "run" / f"model_{EVALUATED_STEP:05d}.pt"
            runs.wait_until(saved.exists, run, "a checkpoint was written")
            lost = runs.kill_one(run, "run")
            runs.wait(run)
        finally:
            end_process(run)
        rate, evaluation = runs.rate("run"), runs.evaluation("run")
        text = (runs.folder / "run" / "log.jsonl").read_text()
    rows = {**bare["rows"], f"train_gpt2.py, {RUN_STEPS} steps": (
        f"{rate:,.0f} tok/s, {rate / bare['median']:.3f} of the bare step's; first step after "
        f"{first:.0f} s; one evaluation: {evaluation}; kill -9: {lost:.1f} s to the next step")}
    return dict(rows=rows, tokens_per_second=rate, bare=bare, seconds_lost=lost,
                files={"train.jsonl": text})


# -----------------------------------------------------------------------------
# all parts, within the time

# How many seconds have to be left for a part to begin: what it takes on an H100 for 12 layers, as
# estimated. Compiling takes most of it, which grows with the number of layers.
PARTS = dict(variants=200, optimizers=20, run=250, training=80, decoding=60, serving=40,
             checkpoint=20)


def changed(args, **settings):
    return argparse.Namespace(**{**vars(args), **settings})


def jobs(args):
    """(part, name, seconds needed, function of the seconds left) of what to measure, in order."""
    compiled = resolve_device(args.device).type == "cuda"
    args = changed(args, peer=[], quantize="none", compile=compiled)
    models = []
    for preset in args.presets:
        model = changed(args, preset=preset)
        micro_steps = training_shape(model)[2]
        models.append(changed(model, micro_steps=min(micro_steps, MAX_MICRO_STEPS)))
    first, largest = models[0], models[-1]
    twice = changed(first, batch_size=2 * training_shape(first)[1])

    def alone(what, function, model, *options):
        part = what.replace(",", "").split()[0]
        needed = PARTS[part] * max(1, training_shape(model)[0].n_layer / 12)
        return part, what, needed, lambda seconds: run_alone(seconds, function, model, *options)

    yield "variants", "variants", PARTS["variants"], lambda seconds: variants(first, seconds)
    yield alone("optimizers", optimizers, first)
    yield "run", "run", PARTS["run"], lambda seconds: training_run(first, seconds)
    yield alone("training, micro-batch doubled", training, twice, False)
    for model in models[1:]:
        yield alone(f"training {model.preset}", training, model, False)
    yield alone(f"training {largest.preset}, recomputed", training, largest, True)
    streams = [changed(first, streams=[n]) for n in args.streams]
    if largest is not first:
        streams.append(changed(largest, streams=args.streams[:1]))
    for model in streams:
        yield alone(f"decoding {model.preset} x {model.streams[0]}", rates, model, bench_decode)
    yield alone("serving", rates, changed(first, compile=False), bench_serve, False)
    yield alone("checkpoint", rates, changed(first, rounds=2), bench_checkpoint)


def describe_machine(args):
    device = resolve_device(args.device)
    cuda = device.type == "cuda"
    name = device_name(device) if cuda else f"{os.cpu_count()} CPU cores"
    return dict(device=name, dtype=dtype_name(resolve_dtype(args.dtype, device)),
                torch=torch.__version__, cuda=torch.version.cuda,
                cudnn=torch.backends.cudnn.version() if cuda else None, commit=git_commit(),
                date=time.strftime("%Y-%m-%d"))


def bench_gpu(args):
    """The figures to expect of this machine, the most important first, in --seconds.

    Writes gpu.json and gpu.md into --out after each part. A part that fails or for which no time
    is left is named there with the reason.
    """
    if not args.out:
        raise UserError("bench.py gpu writes its figures into a folder: name it with --out")
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {folder}: cannot make this folder ({e.strerror})") from e
    machine = describe_machine(args)
    facts = [f"{name} {value}" for name, value in machine.items() if value and name != "device"]
    heading = f"{machine['device']}, {', '.join(facts)}, `python bench.py gpu`:"
    parts = [(name, needed, job) for part, name, needed, job in jobs(args) if part in args.parts]
    for so_far in run_parts(parts, args.seconds):
        results, table = dict(machine=machine, **so_far), parts_table(heading, so_far)
        files = {}
        for result in so_far["parts"].values():
            files |= result.pop("files", {})
        files |= {"gpu.json": json.dumps(results, indent=2), "gpu.md": table}
        for file, text in files.items():
            atomic_write(folder / file, lambda f, text=text: f.write(text.encode()))
    log(f"\n{table}\nthe figures are in {folder}")
    return results
