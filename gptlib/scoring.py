"""HellaSwag: its examples, the losses of their endings, accuracies. Owns the scoring rule."""

import http.client
import json
import random
import urllib.request
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from gptlib.common import UserError, atomic_write


URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
CACHE = Path(__file__).resolve().parent.parent / "hellaswag" / "hellaswag_val.jsonl"


# -----------------------------------------------------------------------------
# the data


def load_examples(path=""):
    """The examples of a HellaSwag jsonl file as dicts with ctx, endings and label; without a path the validation set.

    That one is downloaded once and kept beside this script. Raises UserError for a file that can't be had or is broken.
    """
    if not path and not CACHE.exists():
        download(URL, CACHE)
    path = Path(path or CACHE)
    examples = []
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    examples.append(parse_example(line, f"{path}, line {number}"))
    except OSError as e:
        raise UserError(f"cannot read the HellaSwag data {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: expected a HellaSwag jsonl file") from e
    if not examples:
        raise UserError(f"{path} holds no examples: expected a HellaSwag jsonl file")
    return examples


def parse_example(line, where):
    """A line of the file as a dict; raises UserError saying where and what it is that no example has."""
    try:
        example = json.loads(line)
    except ValueError as e:
        raise UserError(f"{where}: broken JSON ({e})") from e
    if not isinstance(example, dict):
        raise UserError(f"{where}: expected an object with ctx, endings and label")
    ctx, endings, label = (example.get(k) for k in ("ctx", "endings", "label"))
    if not isinstance(ctx, str) or not ctx:
        raise UserError(f"{where}: ctx is {ctx!r}, expected the text that the endings continue")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(e, str) for e in endings):
        raise UserError(f"{where}: endings is {str(endings)[:100]!r}, expected a list of 4 texts")
    if type(label) is not int or not 0 <= label < 4:
        raise UserError(f"{where}: label is {label!r}, expected the number of the right ending, 0 to 3")
    return example


def download(url, path):
    remedy = f"Give a copy of the file with --data (of train_gpt2.py: --hellaswag_data), or put one at {path}"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            total = int(response.headers.get("Content-Length") or 0)
            data = bytearray()
            with tqdm(total=total, desc=path.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                while piece := response.read(1 << 16):
                    data += piece
                    bar.update(len(piece))
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"cannot download {url} ({e}). {remedy}") from e
    if len(data) < total:
        raise UserError(f"the download of {url} ended after {len(data)} of {total} bytes: try again. {remedy}")
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make {path.parent} ({e.strerror}). {remedy}") from e
    atomic_write(path, lambda f: f.write(data))


# -----------------------------------------------------------------------------
# the scoring rule


def encode(example, tokenizer):
    """(context tokens, list of the endings' tokens). An ending takes the space before it, as GPT-2's tokens do."""
    return (tokenizer.encode_ordinary(example["ctx"]),
            [tokenizer.encode_ordinary(" " + ending) for ending in example["endings"]])


def fit(context, endings, block_size):
    """The same, cut so that the context with any of the endings fits the model.

    The context is cut from the left; an ending that leaves no room for a token of context, from the right.
    """
    longest = max(map(len, endings))
    return context[-max(block_size - longest, 1):], [ending[:max(block_size - 1, 1)] for ending in endings]


def row_length(context, endings):
    return len(context) + sum(map(len, endings)) - len(endings)  # the last token of an ending is predicted, never read


def make_batches(encoded, batch_tokens):
    """Lists of indices into encoded, of similar row lengths and up to batch_tokens tokens with their padding."""
    lengths = [row_length(*e) for e in encoded]
    batches = []
    for i in sorted(range(len(encoded)), key=lambda i: -lengths[i]):  # stable: the same whatever the machine
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    random.Random(0).shuffle(batches)  # so that the running accuracy is not that of the longest; own generator
    return batches


@torch.no_grad()
def ending_losses(model, batch, head_rows=512):
    """The loss in nats of every token of every ending: for each example of the batch a list of lists.

    batch: (context tokens, endings' tokens) of each example, none longer than the block size (see fit). Call it under
    the autocast that the model is to run in.
    """
    device = model.lm_head.weight.device
    T = max(row_length(*e) for e in batch)
    rows = []
    reads, targets = [], []  # the places, in B * T, from which a token is predicted, and the token
    for b, (context, endings) in enumerate(batch):
        n = len(context)
        assert n > 0, "without a context nothing predicts the first token"
        tokens, pos, part = list(context), list(range(n)), [0] * n
        for i, ending in enumerate(endings, 1):
            m = len(ending) - 1
            at = b * T + len(tokens)
            reads += [b * T + n - 1, *range(at, at + m)]  # the first token follows from the context
            targets += ending
            tokens += ending[:-1]
            pos += range(n, n + m)  # each ending goes on where the context ends
            part += [i] * m
        padding = T - len(tokens)
        rows.append((tokens + [0] * padding, pos + [0] * padding, part + [-1] * padding))
    idx, pos, part = torch.tensor(rows, device=device).unbind(1)  # (B, T) each
    reads, targets = torch.tensor(reads, device=device), torch.tensor(targets, device=device)

    # what a token sees: what stands before it, if it is context or of the same ending
    mask = ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])).tril()[:, None]  # (B, 1, T, T)
    x = model.hidden(idx, pos=pos, mask=mask).flatten(0, 1)[reads]  # (targets, n_embd)
    losses = torch.cat([F.cross_entropy(model.lm_head(h).float(), t, reduction="none")
                        for h, t in zip(x.split(head_rows), targets.split(head_rows), strict=True)])
    losses = iter(losses.tolist())
    return [[[next(losses) for _ in ending] for ending in endings] for _, endings in batch]


def choose(losses, endings):
    """The numbers of the likeliest endings (by sum, by mean), given the losses of their tokens; of equals the first."""
    losses = [losses[endings.index(e)] for e in endings]  # the same ending twice: rounding must not tell them apart
    sums = [sum(x) for x in losses]
    means = [s / len(x) for s, x in zip(sums, losses, strict=True)]
    return sums.index(min(sums)), means.index(min(means))


def evaluate(model, examples, tokenizer, autocast, rank=0, world_size=1, batch_tokens=0):
    """Accuracies of the model: {"examples": how many, "acc": by sum, "acc_norm": by mean of the endings' losses}.

    All ranks of torch.distributed call it with the same arguments, do their share of the batches, and return the same
    result. The batches don't depend on the number of ranks, so neither does the result. Leaves the model in eval mode.
    batch_tokens: tokens a forward pass; 0 is 512 on a CPU, where equal rows matter more than many, and else 32768.
    """
    model.eval()
    block_size = model.config.block_size
    whole = [encode(example, tokenizer) for example in examples]
    encoded = [fit(*e, block_size) for e in whole]
    n_cut = sum(a != b for a, b in zip(whole, encoded, strict=True))
    if n_cut and rank == 0:
        tqdm.write(f"HellaSwag: {n_cut} of {len(examples)} examples are longer than the model's {block_size} tokens; "
                   "their contexts are cut from the left")
    batch_tokens = batch_tokens or (512 if model.lm_head.weight.device.type == "cpu" else 32768)
    mine = make_batches(encoded, batch_tokens)[rank::world_size]
    n = right = right_norm = 0
    with autocast, tqdm(total=sum(map(len, mine)), desc="HellaSwag", unit="ex", leave=False, dynamic_ncols=True,
                        disable=None if rank == 0 else True) as bar:  # within one autocast, weights are cast but once
        for batch in mine:
            for i, losses in zip(batch, ending_losses(model, [encoded[i] for i in batch]), strict=True):
                by_sum, by_mean = choose(losses, encoded[i][1])
                n += 1
                right += by_sum == examples[i]["label"]
                right_norm += by_mean == examples[i]["label"]
            bar.set_postfix_str(f"acc {right / n:.4f}, acc_norm {right_norm / n:.4f}", refresh=False)
            bar.update(len(batch))
    if world_size > 1:
        counts = torch.tensor([n, right, right_norm])
        dist.all_reduce(counts)
        n, right, right_norm = counts.tolist()
    return {"examples": n, "acc": right / max(n, 1), "acc_norm": right_norm / max(n, 1)}
