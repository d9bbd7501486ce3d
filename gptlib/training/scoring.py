"""HellaSwag: its examples, the losses of their endings, and the accuracies that follow from them.

This is the only scorer of the repository: hellaswag.py, the training loop and bench.py use it.
"""

import hashlib
import http.client
import json
import os
import random
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from gptlib.common import UserError, atomic_write, warn
from gptlib.data.tokenizer import encode_text
from gptlib.distributed import share_from_rank0
from gptlib.runtime import without_cudnn_attention

COMMIT = "a29ff8e9a04bba4bd6588223785ce105328adc57"  # the newest of 2026-11
URL = f"https://raw.githubusercontent.com/rowanz/hellaswag/{COMMIT}/data/hellaswag_val.jsonl"
GIT_HASH = "0f5ee25d72216f12317d5d8a7b92deafa423d81e"  # of the file, as git ls-tree shows it
MAX_BYTES = 64 * 2**20  # of the download; the file has 12 MB
CACHE = Path(os.environ.get("HELLASWAG_CACHE_DIR")
             or Path(__file__).resolve().parents[2] / "hellaswag") / "hellaswag_val.jsonl"


# -----------------------------------------------------------------------------
# the examples


def load_examples(path=""):
    """The examples of a HellaSwag jsonl file: a list of dicts with ctx, endings and label.

    Without a path, the validation set is downloaded once and kept in HELLASWAG_CACHE_DIR, by
    default the folder hellaswag/ beside the scripts. Raises UserError if the file can't be read or
    downloaded, or is broken.
    """
    if not path and not CACHE.exists():
        download(URL, CACHE)
    path = Path(path or CACHE)
    examples = []
    try:
        with open(path, encoding="utf-8-sig") as f:  # some editors begin a file with a mark (BOM)
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


def parse_example(line, location):
    """Read one line of the file into a dict. Raises UserError with the location if it is wrong."""
    try:
        example = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{location}: broken JSON ({e})") from e
    if not isinstance(example, dict):
        raise UserError(f"{location}: expected an object with ctx, endings and label")

    ctx = example.get("ctx")
    if not isinstance(ctx, str) or not ctx:
        raise UserError(f"{location}: ctx is {ctx!r}, expected the text that the endings continue")

    endings = example.get("endings")
    is_list_of_4 = isinstance(endings, list) and len(endings) == 4
    if not is_list_of_4 or not all(isinstance(ending, str) for ending in endings):
        found = repr(str(endings)[:100])
        raise UserError(f"{location}: endings is {found}, expected a list of 4 texts")

    label = example.get("label")
    if type(label) is not int or not 0 <= label < 4:
        raise UserError(f"{location}: label is {label!r}, "
                        "expected the number of the right ending, 0 to 3")
    return example


def download(url, path):
    """Download a file with a progress bar. Raises UserError if that fails, and leaves nothing."""
    remedy = ("Give a copy of the file with --data (of train_gpt2.py: --hellaswag_data), "
              f"or put one at {path}")
    try:
        data, expected_size = read_url(url, path.name)
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"cannot download {url} ({e}). {remedy}") from e
    if len(data) > MAX_BYTES:
        raise UserError(f"{url} has more than {MAX_BYTES >> 20} MiB: not HellaSwag. {remedy}")
    if len(data) < expected_size:
        raise UserError(f"the download of {url} ended after {len(data)} of {expected_size} bytes: "
                        f"try again. {remedy}")
    if git_hash(data) != GIT_HASH:
        raise UserError(f"{url} is not the file that it should be: its hash is {git_hash(data)}, "
                        f"expected {GIT_HASH}. {remedy}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make {path.parent} ({e.strerror}). {remedy}") from e
    atomic_write(path, lambda f: f.write(data))


def git_hash(data):
    """The hash by which git names a file with these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def read_url(url, title):
    """Read a URL to its end, or to just over MAX_BYTES.

    Returns the bytes and the announced size, 0 if there is none.
    """
    data = bytearray()
    with urllib.request.urlopen(url, timeout=30) as response:
        size = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=size, desc=title, unit="B", unit_scale=True, leave=False,
                  disable=None) as bar:
            while len(data) <= MAX_BYTES and (chunk := response.read(1 << 16)):
                data += chunk
                bar.update(len(chunk))
    return data, size


# -----------------------------------------------------------------------------
# tokens and batches


@dataclass(frozen=True)
class EncodedExamples:
    """Examples as tokens, cut to a block size: encode once, evaluate often."""
    block_size: int
    rows: list  # for each example (context tokens, [tokens of each ending])
    n_characters: list  # for each example the characters of each ending, as its text
    labels: list  # for each example the number of the right ending
    n_cut: int  # how many examples were too long for the block size


def encode(example, tokenizer):
    """The tokens of one example: (context tokens, [tokens of each ending]).

    An ending is encoded with the space before it, because in GPT-2's vocabulary the space
    belongs to the word that follows.
    """
    context = encode_text(tokenizer, example["ctx"])
    endings = [encode_text(tokenizer, " " + ending) for ending in example["endings"]]
    return context, endings


def fit(context, endings, block_size):
    """Cut the tokens of an example so that the context with any one ending fits the block size.

    The context is cut from the left. An ending that would leave no room for even one token of
    context is cut from the right.
    """
    longest = max(len(ending) for ending in endings)
    context = context[-max(block_size - longest, 1):]
    endings = [ending[:max(block_size - 1, 1)] for ending in endings]
    return context, endings


def encode_examples(examples, tokenizer, block_size):
    """Encode examples (dicts of load_examples) for a model of this block size: EncodedExamples."""
    rows = []
    n_cut = 0
    for example in examples:
        full = encode(example, tokenizer)
        row = fit(*full, block_size)
        n_cut += row != full
        rows.append(row)
    n_characters = [[len(ending) for ending in example["endings"]] for example in examples]
    labels = [example["label"] for example in examples]
    return EncodedExamples(block_size, rows, n_characters, labels, n_cut)


def load_for_training(path, limit, tokenizer, block_size, world):
    """The first `limit` examples, encoded, on every rank; rank 0 reads them.

    None if limit is 0. None with a warning if the examples can't be had: a run continues without.
    """
    examples = []
    if limit and world.rank == 0:
        try:
            examples = load_examples(path)[:limit]
        except (UserError, OSError) as error:
            warn(f"no HellaSwag evaluation in this run: {error}")
    examples = share_from_rank0(examples, world)
    return encode_examples(examples, tokenizer, block_size) if examples else None


def row_length(context, endings):
    """How many tokens the model reads. An ending's last token is predicted, but never read."""
    return len(context) + sum(len(ending) - 1 for ending in endings)


def make_batches(rows, batch_tokens):
    """Group examples of similar length: lists of indices into rows, each index exactly once.

    A batch has at most batch_tokens tokens, padding included, or one example that is longer. The
    result depends on the arguments alone, so that all ranks find the same batches.
    """
    lengths = [row_length(*row) for row in rows]
    longest_first = sorted(range(len(rows)), key=lambda i: -lengths[i])
    batches = []
    for i in longest_first:
        if batches:
            padded_length = lengths[batches[-1][0]]  # the first of a batch is its longest
            has_room = (len(batches[-1]) + 1) * padded_length <= batch_tokens
        if not batches or not has_room:
            batches.append([])
        batches[-1].append(i)
    # Long examples score differently, so only in random order is the running accuracy meaningful
    # early. A separate generator leaves Python's global one, and so training, unchanged.
    random.Random(0).shuffle(batches)
    return batches


# -----------------------------------------------------------------------------
# the losses


def pack_row(context, endings):
    """Lay the context and the four endings of an example side by side in one row of tokens.

    Returns five lists. As long as the row: tokens, their positions (every ending starts where the
    context ends) and their segments (0 is the context, endings count from 1). As long as all
    endings together: the places in the row from which a token is predicted, and that token.
    """
    n = len(context)
    assert n > 0, "without a context nothing predicts the first token"
    tokens = list(context)
    positions = list(range(n))
    segments = [0] * n
    reads, targets = [], []
    for segment, ending in enumerate(endings, 1):
        first = len(tokens)
        rest = len(ending) - 1
        # The first token of an ending is predicted from the end of the context.
        reads += [n - 1, *range(first, first + rest)]
        targets += ending
        tokens += ending[:-1]
        positions += range(n, n + rest)
        segments += [segment] * rest
    return tokens, positions, segments, reads, targets


def pack_batch(rows, device):
    """Pad examples to the tensors that the model reads.

    Returns tokens and positions (B, T), the attention mask (B, 1, T, T), the indices into the
    flattened B * T from which a token is predicted (N,), and those tokens (N,).
    """
    T = max(row_length(*row) for row in rows)
    padded = []
    reads, targets = [], []
    for b, row in enumerate(rows):
        tokens, positions, segments, row_reads, row_targets = pack_row(*row)
        padding = T - len(tokens)
        padded.append((tokens + [0] * padding,
                       positions + [0] * padding,
                       segments + [-1] * padding))
        reads += [b * T + i for i in row_reads]
        targets += row_targets
    idx, pos, segment = torch.tensor(padded, device=device).unbind(1)  # (B, T) each

    # A token attends to what stands before it, if that is context or belongs to the same ending.
    is_context = segment[:, None, :] == 0  # (B, 1, T)
    is_same_ending = segment[:, None, :] == segment[:, :, None]  # (B, T, T)
    mask = (is_context | is_same_ending).tril()[:, None]  # (B, 1, T, T)
    return idx, pos, mask, torch.tensor(reads, device=device), torch.tensor(targets, device=device)


class Packed:
    """Attention of rows that hold several sequences, with the methods of train_gpt2.py's Causal.

    pos (B, T): the positions of the tokens; mask (B, 1, T, T), boolean: which attends to which.
    """

    def __init__(self, pos, mask):
        self.pos, self.mask = pos, mask

    def positions(self, idx):
        return self.pos

    def attend(self, layer, q, k, v, dropout_p):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=dropout_p)


@torch.no_grad()
def ending_losses(model, batch, head_rows=512):
    """The loss in nats of every token of every ending: a list of four lists for each example.

    batch: (context tokens, [tokens of each ending]) of each example, none longer than the block
    size (see fit). head_rows: how many rows of 50k logits exist at a time. Call it under the
    autocast that the model should run in.
    """
    device = model.lm_head.weight.device
    idx, pos, mask, reads, targets = pack_batch(batch, device)
    with without_cudnn_attention(device):
        x = model.hidden(idx, Packed(pos, mask))  # (B, T, n_embd)
    x = x.flatten(0, 1)[reads]  # (N, n_embd), since the head is needed only where a loss is read
    losses = []
    for h, t in zip(x.split(head_rows), targets.split(head_rows), strict=True):
        logits = model.lm_head(h).float()  # (head_rows, vocab_size)
        losses.append(F.cross_entropy(logits, t, reduction="none"))

    remaining = iter(torch.cat(losses).tolist())  # one copy from the device for the whole batch
    return [[[next(remaining) for _ in ending] for ending in endings] for _, endings in batch]


def choose(losses, endings, n_characters):
    """The indices of the likeliest endings, by the sum of their tokens' losses, by its mean over
    the tokens, and by the sum over the number of characters.

    Of equal endings the first is chosen. They get the same losses: at two places of a row losses
    differ in the last digit, and rounding must not decide.
    """
    losses = [losses[endings.index(ending)] for ending in endings]
    sums = [sum(x) for x in losses]
    means = [s / len(x) for s, x in zip(sums, losses, strict=True)]
    per_character = [s / max(n, 1) for s, n in zip(sums, n_characters, strict=True)]
    return tuple(values.index(min(values)) for values in (sums, means, per_character))


# -----------------------------------------------------------------------------
# the accuracies


def count_correct(model, encoded, batches, autocast, show_progress):
    """Score the examples in batches: how many, and how many are right by each rule of choose."""
    n, correct = 0, [0, 0, 0]
    n_examples = sum(len(batch) for batch in batches)
    progress = tqdm(total=n_examples, desc="HellaSwag", unit="ex", leave=False, dynamic_ncols=True,
                    disable=None if show_progress else True)
    # one context for all batches: autocast keeps the weights that it cast until its context ends
    with autocast, progress:
        for batch in batches:
            rows = [encoded.rows[i] for i in batch]
            for i, losses in zip(batch, ending_losses(model, rows), strict=True):
                _, endings = encoded.rows[i]
                choices = choose(losses, endings, encoded.n_characters[i])
                n += 1
                for rule, choice in enumerate(choices):
                    correct[rule] += choice == encoded.labels[i]
            running = f"acc {correct[0] / n:.4f}, acc_norm {correct[1] / n:.4f}"
            progress.set_postfix_str(running, refresh=False)
            progress.update(len(batch))
    return n, *correct


def evaluate(model, examples, tokenizer, autocast, rank=0, world_size=1, batch_tokens=0):
    """The model's accuracies: {"examples": their number, "acc": by sum, "acc_norm": by mean over
    the tokens, "acc_norm_chars": over the characters, as EleutherAI's harness has its acc_norm}.

    examples: dicts as load_examples returns them, or EncodedExamples; then tokenizer may be None.
    batch_tokens: tokens per forward pass; 0 means 512 on a CPU, where little padding matters more
    than large batches, and 32768 elsewhere.

    Collective: all ranks call it with the same arguments, score their share of the batches and
    return the same result, which does not depend on the number of ranks. The model stays in eval
    mode.
    """
    model.eval()
    block_size = model.config.block_size
    encoded = examples
    if not isinstance(encoded, EncodedExamples):
        encoded = encode_examples(examples, tokenizer, block_size)
    assert encoded.block_size <= block_size, "these examples were encoded for a longer context"
    if encoded.n_cut and rank == 0:
        tqdm.write(f"HellaSwag: {encoded.n_cut} of {len(encoded.rows)} examples are longer than "
                   f"the model's {encoded.block_size} tokens; their contexts are cut from the left")

    if not batch_tokens:
        batch_tokens = 512 if model.lm_head.weight.device.type == "cpu" else 32768
    batches_of_rank = make_batches(encoded.rows, batch_tokens)[rank::world_size]
    counts = count_correct(model, encoded, batches_of_rank, autocast, show_progress=rank == 0)
    if world_size > 1:
        sums = torch.tensor(counts)
        dist.all_reduce(sums)
        counts = sums.tolist()
    n, *correct = counts
    accuracies = zip(("acc", "acc_norm", "acc_norm_chars"), correct, strict=True)
    return {"examples": n, **{name: count / max(n, 1) for name, count in accuracies}}
