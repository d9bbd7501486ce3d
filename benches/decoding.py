"""Tokens a second of the engine, beside transformers and nanoGPT."""

import copy

import torch

from benches.floors import memory_bandwidth
from benches.peers import peer_classes
from benches.turns import dtype_name, show_results, take_turns
from gptlib.common import first_line, log
from gptlib.inference.engine import Engine
from gptlib.inference.quantize import quantize_int8
from gptlib.runtime import resolve_device, resolve_dtype
from gptlib.training.presets import PRESETS
from train_gpt2 import GPT, GPTConfig


def gpt2_to_decode(args):
    """(device, dtype, the preset's model with random weights), as the flags say."""
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    preset = PRESETS[args.preset]
    config = GPTConfig(preset["block_size"], 50304, preset["n_layer"], preset["n_head"],
                       preset["n_embd"])
    torch.manual_seed(0)
    with torch.no_grad(), device:
        return device, dtype, GPT(config).to(dtype).eval()


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


def decode_transformers(config, prompt, streams, length, device, dtype, **options):
    """generate() of transformers' GPT-2 of the same shape, with random weights; options: its own.
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    hf_config = GPT2Config(n_positions=config.block_size, n_layer=config.n_layer,
                           n_head=config.n_head, n_embd=config.n_embd,
                           eos_token_id=None, bos_token_id=None)
    with device:
        model = GPT2LMHeadModel(hf_config).to(dtype).eval()
    idx = torch.tensor([prompt] * streams, device=device)

    def work():
        out = model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=length,
                             do_sample=True, top_k=50, pad_token_id=0, **options)
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


def weight_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


def read_weights(model, device):
    """The limit for one stream: every weight is read once per token, and nothing else is done."""
    weights = torch.zeros(weight_bytes(model) // 4, device=device)

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
    models = {"inference.py": model}
    if args.quantize == "int8":
        quantized = quantize_int8(copy.deepcopy(model).float(), dtype)
        models["inference.py --quantize int8"] = quantized
    prompt = torch.randint(50257, (16,)).tolist()
    results = {}
    for streams in args.streams:
        contenders = {}
        if streams == 1:
            contenders["weights read once a token"] = read_weights(model, device)
        for name, decoded in models.items():
            for compile in (False, True) if args.compile else (False,):
                work = decode_engine(decoded, [prompt] * streams, args.length, compile)
                contenders[name + " --compile" * compile] = work
        contenders |= peer_contenders(args, model.config, prompt, streams, device, dtype)
        title = f"{streams} x {args.length} tokens, {dtype_name(dtype)}, {device.type}"
        results[title] = take_turns(contenders, args.rounds, "tok")
        show_results(title, results[title])
        show_traffic(results[title], streams, weight_bytes(model), memory_bandwidth(device))
    return results


def peer_contenders(args, config, prompt, streams, device, dtype):
    """{name: work} of the peers that can generate, else of transformers."""
    contenders = {}
    shape = prompt, streams, args.length, device, dtype
    for path in args.peer:
        peer = peer_classes(path)
        if hasattr(peer.GPT, "generate"):  # build-nanogpt's does not
            contenders["nanoGPT"] = decode_nanogpt(peer, *shape)
    if contenders:
        return contenders
    versions = {"transformers": {}}
    if device.type == "cuda":
        versions = {"transformers, static cache": dict(cache_implementation="static"), **versions}
    for name, options in versions.items():
        try:
            work = decode_transformers(config, *shape, **options)
            if options:
                work()  # compiles
            contenders[name] = work
        except Exception as e:
            log(f"  left out: {name}, {first_line(e)}")
    return contenders


def show_traffic(results, streams, n_bytes, bandwidth):
    """Add the microseconds of a step and the GB/s at which it reads the weights, and report them.

    The weights in 8 bits have other sizes, so those contenders get none.
    """
    for r in results:
        steps = r["median"] / (1 if r["name"].startswith("weights") else streams)
        if "int8" not in r["name"]:
            r["microseconds"], r["GB/s"] = 1e6 / steps, steps * n_bytes / 1e9
            log(f"  {r['name']:42} {r['microseconds']:13,.0f} us a step, weights at "
                f"{r['GB/s']:,.1f} GB/s of {bandwidth / 1e9:,.0f}")
