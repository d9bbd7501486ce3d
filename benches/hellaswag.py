"""HellaSwag examples a second, beside scoring them one by one."""


import torch
from torch.nn import functional as F

from benches.turns import dtype_name, separate_processes, show_results, take_turns
from gptlib.training import scoring
from gptlib.runtime import set_malloc, resolve_device, resolve_dtype
from gptlib.data.tokenizer import load_tokenizer
from train_gpt2 import GPT, GPTConfig


@torch.no_grad()
def score_plainly(model, example, tokenizer, autocast):
    """Choose an ending by the plain method: four rows, each the context and one ending."""
    device = model.lm_head.weight.device
    context, endings = scoring.encode(example, tokenizer)
    T = len(context) + max(map(len, endings))
    rows = []
    for ending in endings:
        padding = T - len(context) - len(ending)
        rows.append(context + ending + [0] * padding)
    idx = torch.tensor(rows, device=device)  # (4, T)
    with autocast:
        logits, _ = model(idx)
    targets = idx[:, 1:].flatten()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none").view(4, -1)
    return loss[:, len(context) - 1:].sum(1).argmin().item()


def hellaswag_contender(args, dtype, plain):
    """GPT-2 (124M) scored by hellaswag.py or by the plain method."""
    device = resolve_device(args.device)
    if not plain:  # as hellaswag.py does
        set_malloc(device, keep=True)
    tokenizer = load_tokenizer("gpt2")
    examples = scoring.load_examples(args.hellaswag_data)[:args.examples]
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50304)).to(device).eval()
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def ours():
        scoring.evaluate(model, examples, tokenizer, autocast)
        return len(examples)

    def plain_method():
        for example in examples:
            score_plainly(model, example, tokenizer, autocast)
        return len(examples)
    return plain_method if plain else ours


def bench_hellaswag(args):
    """Examples per second of GPT-2 (124M) with random weights, beside the plain method."""
    device = resolve_device(args.device)
    scoring.load_examples(args.hellaswag_data)  # a missing file fails here, before any process
    results = {}
    for dtype in dict.fromkeys([torch.float32, resolve_dtype("auto", device)]):
        contenders = {
            "hellaswag.py": (hellaswag_contender, args, dtype, False),
            "the plain method": (hellaswag_contender, args, dtype, True),
        }
        with separate_processes(**contenders) as works:
            turns = take_turns(works, args.rounds, "ex")
        title = f"HellaSwag, {args.examples} examples, {dtype_name(dtype)}, {device.type}"
        results[title] = turns
        show_results(title, turns)
    return results
