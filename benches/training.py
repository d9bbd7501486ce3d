"""A training step beside build-nanogpt's and nanoGPT's."""

import statistics
import time
from pathlib import Path

import torch

from benches.floors import peak_rate
from benches.peers import peer_classes
from benches.turns import dtype_name, separate_processes, show_results, take_turns
from gptlib.common import log
from gptlib.runtime import compile_model, resolve_device, resolve_dtype, set_malloc
from gptlib.training.parallel import recompute_blocks
from gptlib.training.presets import PRESETS
from train_gpt2 import GPT, GPTConfig, TrainConfig, Trainer, configure_optimizers


def training_shape(args):
    """The model's config, micro-batch size and micro-steps.

    They are the flags'. Those not given are the preset's on a GPU, and fit a laptop elsewhere.
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


def training_ours(args, compile, recompute=False):
    """A step of train_gpt2.py: its model, Trainer and optimizers, on random tokens."""
    config, B, micro_steps = training_shape(args)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    T = config.block_size
    cfg = TrainConfig(block_size=T, batch_size=B, total_batch_size=B * T * micro_steps,
                      n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                      warmup_steps=0)
    set_malloc(device, keep=True)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    with device:  # where the weights of gpt2-xl are drawn in a moment
        raw_model = GPT(config)
    recompute_blocks(raw_model, int(recompute))
    model = compile_model(raw_model, device, dynamic=False) if compile else raw_model
    optimizers = configure_optimizers(raw_model, cfg, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    x, y = torch.randint(50257, (2, B, T), device=device)
    trainer = Trainer(model, optimizers, scaler, autocast, device, cfg.total_batch_size)
    micro_batches = [(x, y, B * T, i == micro_steps - 1) for i in range(micro_steps)]

    def work():
        loss, _ = trainer.step(micro_batches, cfg.max_lr)
        loss.item()
        return cfg.total_batch_size
    return work


def training_plain(args, peer, compile):
    """A step of the plain loop around a peer's model or, if peer is empty, around ours."""
    config, B, micro_steps = training_shape(args)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    if peer:
        module = peer_classes(peer)
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


def measure_training(build, args, *options, kernels=False):
    """Build a step in this process and warm it up.

    Returns the function that times --rounds steps. Its result has rates as those of take_turns,
    seconds and, on a GPU, peak bytes; with kernels also the milliseconds of each kernel of one
    more step.
    """
    device = resolve_device(args.device)
    micro_steps = training_shape(args)[2]
    t0 = time.perf_counter()
    step = build(args, *options)
    step()
    first_seconds = time.perf_counter() - t0
    step()

    def measure():
        seconds = []
        for _ in range(args.rounds):
            t0 = time.perf_counter()
            tokens = step()
            seconds.append(time.perf_counter() - t0)
        median = statistics.median(seconds)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        result = dict(unit="tok/s", median=tokens / median, low=tokens / max(seconds),
                      high=tokens / min(seconds), ms=1000 * median / micro_steps,
                      first_seconds=first_seconds, peak_bytes=peak)
        if kernels:
            result["kernels"] = kernel_times(step, device.type == "cuda")
        return result
    return measure


def measure_alone(contenders):
    """Measure each contender in a process that ends before the next one begins.

    A GPU's speed is steady, and its memory does not hold all of them at once.
    """
    results = []
    for name, contender in contenders.items():
        with separate_processes(step=(measure_training, *contender)) as works:
            results.append(dict(name=name, **works["step"]()))
        log(f"  {name}: {results[-1]['ms']:.1f} ms a micro-batch")
    for r in results:
        r["ratio"] = r["median"] / results[-1]["median"]
    return results


def training_contenders(args, cuda):
    """{name: (build, args, *options)}; on a GPU the peers' models are compiled as well."""
    contenders = {"train_gpt2.py": (training_ours, args, True),
                  "same model, plain torch.compile": (training_plain, args, "", True)}
    for peer in args.peer:
        name = Path(peer).resolve().name
        if cuda:
            contenders[f"{name}, torch.compile"] = (training_plain, args, peer, True)
        contenders[f"{name}, eager"] = (training_plain, args, peer, False)
    return contenders


def bench_train(args):
    """Tokens per second of whole optimizer steps, and MFU.

    MFU counts 6N + attention FLOPs per token (GPT.flops_per_token) over the peak: the datasheet's
    if it is known, else the measured one.
    """
    config, B, micro_steps = training_shape(args)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    contenders = training_contenders(args, device.type == "cuda")
    title = (f"training {args.preset}, {micro_steps} x {B} x {config.block_size} tokens a step, "
             f"{dtype_name(dtype)}, {device.type}")
    if device.type == "cuda":
        results = measure_alone(contenders)
    else:
        with separate_processes(**contenders) as works:
            results = take_turns(works, args.rounds, "tok")
    show_results(title, results)
    add_mfu(results, config, peak_rate(device, dtype))
    if device.type == "cuda":
        log("\n" + training_table(results))
    return {title: results}


def training_table(results):
    """The results of measure_alone, with their MFU, as the README's table."""
    lines = ["| program | ms a micro-batch | tok/s | MFU | GiB at most |", "|---|---|---|---|---|"]
    for r in results:
        lines.append(f"| {r['name']} | {r['ms']:.1f} | {r['median']:,.0f} | {r['mfu']:.1%} | "
                     f"{r['peak_bytes'] / 2**30:.1f} |")
    return "\n".join(lines)


def add_mfu(results, config, peak):
    """Add to each result its share of the peak FLOP/s, and report them."""
    with torch.device("meta"):
        flops = GPT(config).flops_per_token()
    for r in results:
        r["mfu"] = r["median"] * flops / peak
    shares = ", ".join(f"{r['name']} {r['mfu']:.0%}" for r in results)
    log(f"  at {flops / 1e9:.2f} GFLOP a token the peak, {peak / 1e12:.2f} TFLOP/s, "
           f"is {peak / flops:,.0f} tok/s: {shares}")


def kernel_times(work, cuda):
    """{name: milliseconds} of one turn's kernels, longest first; on a CPU of its operators."""
    from torch.profiler import ProfilerActivity, profile
    work()
    work()  # two turns warm up
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=kinds) as recorded:
        work()
    milliseconds = {}
    for event in recorded.key_averages():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel != cuda or event.is_user_annotation:
            continue  # on CUDA, the time of an operator is that of its kernels: count it once
        time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        milliseconds[event.key] = time_us / 1000
    return dict(sorted(milliseconds.items(), key=lambda item: -item[1]))
