"""HellaSwag's scorer: the shared context is read once, the choices remain the plain method's.

    python -m pytest tests/training/test_scoring.py
    HELLASWAG_DATA=hellaswag_val.jsonl python -m pytest tests/training/test_scoring.py  # real ones
"""

import base64
import contextlib
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import load_gpt2_or_skip
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gptlib.training import scoring
from gptlib.data.tokenizer import load_tokenizer
from train_gpt2 import GPT, GPTConfig

# a tokenizer with one token per byte, as a checkpoint stores it
BYTE_RANKS = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
BYTES_DICT = {"name": "bpe", "ranks": BYTE_RANKS}
BYTES = load_tokenizer(BYTES_DICT)
FLOAT32 = contextlib.nullcontext()


def real_examples():
    path = os.environ.get("HELLASWAG_DATA")
    if not path:
        pytest.skip("HELLASWAG_DATA names no HellaSwag jsonl file")
    return scoring.load_examples(path)[:200]


def made_examples(n=40, seed=0):
    """Examples of all shapes: short and long contexts, endings of one letter or many words."""
    rng = random.Random(seed)
    words = "the cat sat on a mat and ran home over it's wet roof with 12 dogs".split()

    def text(low, high):
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    examples = []
    for _ in range(n):
        endings = [text(1, rng.choice((1, 6, 20))) for _ in range(3)]  # some of them twice
        endings.append(rng.choice(("a", ".", text(2, 9))))
        rng.shuffle(endings)
        context = text(1, rng.choice((3, 30)))
        examples.append({"ctx": context, "endings": endings, "label": rng.randrange(4)})
    return examples


def make_model(tokenizer=BYTES, block_size=512, std=0.5, **settings):
    """A model of random weights with firm opinions: biases and norms are random too."""
    torch.manual_seed(0)
    config = GPTConfig(block_size, tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32, **settings)
    model = GPT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def train_a_bit(model, examples, tokenizer):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = " ".join(e["ctx"] + " " + e["endings"][e["label"]] for e in examples)
    tokens = torch.tensor(tokenizer.encode_ordinary(text))
    for start in torch.randint(len(tokens) - 65, (20, 4)).tolist():
        x = torch.stack([tokens[s:s + 65] for s in start])
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def plain_losses(model, context, endings):
    """Each ending alone behind the context, the whole sequence through the model, in float32."""
    losses = []
    for ending in endings:
        tokens = torch.tensor([context + ending])
        logits, _ = model(tokens)
        loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
        losses.append(loss[-len(ending):])
    return losses


def tokens_of(example, tokenizer):
    endings = [tokenizer.encode_ordinary(" " + ending) for ending in example["endings"]]
    return tokenizer.encode_ordinary(example["ctx"]), endings


def flat(losses):
    return torch.tensor([x for endings in losses for ending in endings for x in ending])


def lengths(losses):
    return [[len(ending) for ending in endings] for endings in losses]


def assert_same_as_plain(model, examples, tokenizer, batch_tokens=0):
    """The losses equal plain_losses, and accuracies are 1 where its choices are the labels."""
    batch = [tokens_of(e, tokenizer) for e in examples]
    plain = [plain_losses(model, *row) for row in batch]
    ours = scoring.ending_losses(model, batch, head_rows=300)
    assert lengths(ours) == lengths(endings for _, endings in batch)
    expected = torch.cat([x for xs in plain for x in xs])
    torch.testing.assert_close(flat(ours), expected, rtol=1e-4, atol=1e-4)
    for key, measure in (("acc", torch.sum), ("acc_norm", torch.mean)):
        labels = [torch.stack([measure(x) for x in xs]).argmin().item() for xs in plain]
        assert len(set(labels)) > 1
        labelled = [{**e, "label": label} for e, label in zip(examples, labels, strict=True)]
        result = scoring.evaluate(model, labelled, tokenizer, FLOAT32, batch_tokens=batch_tokens)
        assert result["examples"] == len(examples)
        assert result[key] == 1.0


# -----------------------------------------------------------------------------
# the scoring rule


@pytest.mark.parametrize("source, get_tokenizer, trained", [
    (made_examples, lambda: BYTES, False),
    (made_examples, lambda: BYTES, True),
    (real_examples, lambda: BYTES, False),
    (real_examples, lambda: BYTES, True),
    (lambda: real_examples()[:80], load_gpt2_or_skip, True),  # 80, for its 50k columns take long
], ids=["made-random", "made-trained", "real-random", "real-trained", "real-trained-gpt2"])
def test_choices_and_losses_equal_the_plain_method(source, get_tokenizer, trained):
    """Guards against a packed row in which an ending sees another, or the wrong positions."""
    examples, tokenizer = source(), get_tokenizer()
    model = make_model(tokenizer, block_size=1024, std=0.05 if trained else 0.5)
    if trained:
        train_a_bit(model, examples, tokenizer)
    assert_same_as_plain(model.eval(), examples, tokenizer)


@pytest.mark.parametrize("batch_tokens", [1, 2000, 10**9])
def test_the_size_of_batches_changes_no_choice(batch_tokens):
    """Guards against padding that leaks into a loss, and batches that lose an example."""
    assert_same_as_plain(make_model().eval(), made_examples(seed=1), BYTES, batch_tokens)


def test_an_ignorant_model_takes_the_shortest_ending():
    """Guards against accuracies by mean and by sum that are exchanged: equal losses, by hand."""
    model = make_model()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    endings = ["was over then", "was over", "was", "was so"]
    example = {"ctx": "it", "endings": endings, "label": 2}
    assert scoring.evaluate(model, [example], BYTES, FLOAT32)["acc"] == 1
    [losses] = scoring.ending_losses(model, [tokens_of(example, BYTES)])
    np.testing.assert_allclose(np.concatenate(losses), np.log(257), rtol=1e-6)


def test_of_equal_endings_the_first_is_chosen():
    """Guards against rounding that decides: equal endings in one row differ in the last digit.

    The original script takes the first of equals.
    """
    a, b = [5, 6], [7]
    losses = [[2.0, 2.0], [1.0, 1.0000002], [3.0], [1.0, 1.0]]
    assert scoring.choose(losses, [b, a, b, a], [1, 2, 1, 2]) == (1, 1, 1)
    losses = [[1.0, 1.0], [1.5], [0.9, 0.9, 0.9], [9.0]]
    assert scoring.choose(losses, [[1, 2], [3], [4, 5, 6], [7]], [9, 3, 9, 90]) == (1, 2, 3)


def test_characters_are_counted_as_the_harness_does():
    """Guards against a third accuracy that divides by bytes, or counts the space before.

    Every token is as likely as another, ln 257 each, and é is two: the endings have 8, 6, 4 and 2
    tokens and 5, 4, 2 and 1 characters, so 1.6, 1.5, 2 and 2 tokens for each.
    """
    model = make_model()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    example = {"ctx": "it", "endings": ["aaaéé", "aaaé", "aé", "a"], "label": 1}
    scores = scoring.evaluate(model, [example], BYTES, FLOAT32)
    assert scores["acc_norm_chars"] == 1
    assert scores["acc"] == 0, "the shortest by sum is the last"


def test_a_long_context_is_cut_from_the_left(capsys):
    """Guards against an example that does not fit, and one that is cut without a message."""
    model = make_model(block_size=64).eval()
    endings = ["x" * 39, "y" * 10, "z", "xyz"]
    example = {"ctx": "abcdefghij" * 8, "endings": endings, "label": 0}
    short = {"ctx": "abc", "endings": ["a", "b", "c", "d"], "label": 0}
    cut = {**example, "ctx": example["ctx"][-(64 - 40):]}  # fits: the longest ending and its space
    losses = plain_losses(model, *tokens_of(cut, BYTES))
    example["label"] = torch.stack([x.mean() for x in losses]).argmin().item()
    assert scoring.fit(*tokens_of(example, BYTES), 64) == tokens_of(cut, BYTES)
    assert scoring.evaluate(model, [cut, short], BYTES, FLOAT32)["examples"] == 2
    assert "cut" not in capsys.readouterr().out
    assert scoring.evaluate(model, [example], BYTES, FLOAT32)["acc_norm"] == 1
    capsys.readouterr()
    scoring.evaluate(model, [example, short, example], BYTES, FLOAT32)
    expected = "2 of 3 examples are longer than the model's 64 tokens"
    assert expected in capsys.readouterr().out


def test_a_long_ending_keeps_a_token_of_context():
    """Guards against an ending longer than the model, whose first token nothing would predict."""
    context, endings = scoring.fit([1, 2, 3], [[4] * 20, [5] * 3], block_size=8)
    assert context == [3]
    assert endings == [[4] * 7, [5] * 3]
    example = {"ctx": "abc", "endings": ["x" * 99, "y" * 10, "z", "xyz"], "label": 0}
    result = scoring.evaluate(make_model(block_size=8), [example], BYTES, FLOAT32)
    assert result["examples"] == 1


# -----------------------------------------------------------------------------
# examples that were encoded before


class CountingTokenizer:
    """BYTES, counting the texts that it encodes."""

    def __init__(self):
        self.n_texts = 0

    def encode_ordinary(self, text):
        self.n_texts += 1
        return BYTES.encode_ordinary(text)


@pytest.mark.parametrize("block_size", [64, 512], ids=["some-cut", "none-cut"])
def test_encoded_examples_give_the_same_result(block_size, capsys):
    """Guards against encoding anew at each evaluation, and a second way that scores differently."""
    model, examples = make_model(block_size=block_size), made_examples()
    tokenizer = CountingTokenizer()
    encoded = scoring.encode_examples(examples, tokenizer, block_size)
    assert tokenizer.n_texts == 5 * len(examples)
    assert (encoded.n_cut > 0) == (block_size == 64)
    expected = scoring.evaluate(model, examples, BYTES, FLOAT32)
    message = capsys.readouterr().out
    for _ in range(2):
        assert scoring.evaluate(model, encoded, tokenizer, FLOAT32) == expected
        assert capsys.readouterr().out == message
    assert scoring.evaluate(model, encoded, None, FLOAT32) == expected
    assert tokenizer.n_texts == 5 * len(examples)


def test_examples_encoded_for_a_longer_context_are_refused():
    """Guards against positions that the model has no embedding for."""
    encoded = scoring.encode_examples(made_examples(), BYTES, 512)
    with pytest.raises(AssertionError, match="longer context"):
        scoring.evaluate(make_model(block_size=64), encoded, BYTES, FLOAT32)


# -----------------------------------------------------------------------------
# what it costs, and what it leaves as it was


def test_context_is_read_once_and_head_where_needed():
    """Guards against scoring that is right but reads the context four times."""
    model = make_model()
    rows = {}

    def record_head(module, inputs, output):
        rows["head"] = inputs[0].shape[0]

    def record_embedding(module, inputs, output):
        rows["embedding"] = inputs[0].numel()

    model.lm_head.register_forward_hook(record_head)
    model.transformer.wte.register_forward_hook(record_embedding)
    scoring.ending_losses(model, [(list(range(50)), [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]])])
    assert rows == {"head": 3 + 1 + 2 + 4, "embedding": 50 + 2 + 0 + 1 + 3}


def test_batches_hold_every_example_once_with_little_padding():
    """Guards against lost examples, batches beyond the limit, and rows that are mostly padding."""
    rows = [tokens_of(e, BYTES) for e in made_examples(300)]
    row_lengths = [scoring.row_length(*row) for row in rows]
    batches = scoring.make_batches(rows, 2000)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    padded = [len(batch) * max(row_lengths[i] for i in batch) for batch in batches]
    assert max(padded) <= 2000
    assert sum(padded) < 1.1 * sum(row_lengths)  # in the order of the file it would be 1.8


class CountCasts(TorchDispatchMode):
    """Counts how often a weight is cast."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.n_casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0] is self.weight:
            self.n_casts += 1
        return func(*args, **(kwargs or {}))


def test_bfloat16_casts_a_weight_once():
    """Guards against an autocast context per batch, each of which casts all weights again."""
    model = make_model()
    autocast = torch.autocast("cpu", torch.bfloat16)
    with CountCasts(model.transformer.h[0].mlp.c_fc.weight) as counter:
        scoring.evaluate(model, made_examples(), BYTES, autocast, batch_tokens=500)
    assert counter.n_casts == 1


def test_bfloat16_losses_are_close():
    """Guards against an autocast that is ignored, and losses computed in bfloat16 to the end."""
    model = make_model()
    batch = [tokens_of(e, BYTES) for e in made_examples()]
    with torch.autocast("cpu", torch.bfloat16):
        losses = flat(scoring.ending_losses(model, batch))
    difference = (losses - flat(scoring.ending_losses(model, batch))).abs().max()
    assert 0 < difference < 0.2


def cudnn_while_scoring(monkeypatch, device):
    """Whether cuDNN attention was enabled inside the model while it was scored `on` a device."""
    model = make_model()
    seen = []

    def hidden(*args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return GPT.hidden(model, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", hidden)
    exclusion = scoring.without_cudnn_attention
    monkeypatch.setattr(scoring, "without_cudnn_attention", lambda _: exclusion(device))
    scoring.ending_losses(model, [tokens_of(e, BYTES) for e in made_examples(2)])
    return seen


def test_cudnn_attention_is_not_used_on_cuda(monkeypatch):
    """Guards against a cuDNN plan for every new shape, and against a choice that outlives it.

    The switches of torch exist without a GPU, so that this runs on a CPU.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert cudnn_while_scoring(monkeypatch, torch.device("cuda", 1)) == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_attention_is_left_alone_on_a_cpu(monkeypatch):
    """Guards against switches of the CUDA backends that are set where they mean nothing."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert cudnn_while_scoring(monkeypatch, torch.device("cpu")) == [before]


def test_backends_that_were_disabled_stay_so(monkeypatch):
    """Guards against flash attention that comes back into a run that had excluded it."""
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        with scoring.without_cudnn_attention("cuda"):
            assert not torch.backends.cuda.flash_sdp_enabled()
            assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_finds_the_same_losses():
    """Guards against an attention backend that ignores the mask."""
    model = make_model()
    batch = [tokens_of(e, BYTES) for e in made_examples()]
    exact = flat(scoring.ending_losses(model, batch))
    model.to("cuda")
    losses = flat(scoring.ending_losses(model, batch))
    torch.testing.assert_close(losses, exact, rtol=1e-3, atol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        losses = flat(scoring.ending_losses(model, batch))
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.2)


def test_training_continues_as_if_never_evaluated():
    """Guards against an evaluation that draws random numbers, uses dropout or leaves gradients."""
    model = make_model(dropout=0.5)
    torch_state = torch.get_rng_state()
    python_state = random.getstate()
    numpy_state = np.random.get_state()[1].tolist()
    model.train()
    result = scoring.evaluate(model, made_examples(), BYTES, FLOAT32)
    assert not model.training  # the training loop calls train() before each step
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert np.random.get_state()[1].tolist() == numpy_state
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    without_dropout = make_model()
    assert result == scoring.evaluate(without_dropout, made_examples(), BYTES, FLOAT32)


# -----------------------------------------------------------------------------
# many processes


@pytest.mark.parametrize("world_size", [2, 3, 50])
def test_every_rank_returns_the_result_of_one(world_size, monkeypatch):
    """Guards against shares that overlap or are left out. Of 50 ranks most have no batch at all.

    Ranks are threads here, and all_reduce is a sum behind a barrier.
    """
    model, examples = make_model(), made_examples()
    alone = scoring.evaluate(model, examples, BYTES, FLOAT32)
    counts, barrier = [], threading.Barrier(world_size)

    def all_reduce(x):
        counts.append(x.clone())
        barrier.wait(timeout=60)
        x.copy_(torch.stack(counts).sum(dim=0))

    def evaluate_as(rank):
        autocast = contextlib.nullcontext()
        return scoring.evaluate(model, examples, BYTES, autocast, rank, world_size)

    monkeypatch.setattr(scoring.dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(world_size) as threads:
        results = list(threads.map(evaluate_as, range(world_size)))
    assert results == [alone] * world_size
    assert sum(c[0] > 0 for c in counts) > 1, "one rank did all the work"
