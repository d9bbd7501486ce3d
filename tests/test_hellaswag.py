"""HellaSwag: the shared context read once, and still the choices of the plain method.

    python -m pytest tests/test_hellaswag.py
    HELLASWAG_DATA=hellaswag_val.jsonl python -m pytest tests/test_hellaswag.py  # on real examples too
"""

import base64
import contextlib
import json
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import run
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hellaswag
from gptlib.common import UserError
from gptlib.tokenizer import load_tokenizer
from train_gpt2 import GPT, GPTConfig
from gptlib import scoring

# a token a byte, as a checkpoint keeps it
BYTES_DICT = {"name": "bpe", "ranks": b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))}
BYTES = load_tokenizer(BYTES_DICT)
FLOAT32 = contextlib.nullcontext()


def gpt2_tokenizer():
    try:
        return load_tokenizer("gpt2")
    except UserError as e:
        pytest.skip(f"the GPT-2 vocabulary is not here: {e}")


def real_examples():
    path = os.environ.get("HELLASWAG_DATA")
    if not path:
        pytest.skip("HELLASWAG_DATA names no HellaSwag jsonl file")
    return scoring.load_examples(path)[:200]


def made_examples(n=40, seed=0):
    """Examples of all shapes: short and long contexts, endings of a letter or of many words, some of them twice."""
    rng = random.Random(seed)
    words = "the cat sat on a mat and ran home over it's wet roof with 12 dogs".split()

    def text(low, high):
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    examples = []
    for _ in range(n):
        endings = [text(1, rng.choice((1, 6, 20))) for _ in range(3)] + [rng.choice(("a", ".", text(2, 9)))]
        rng.shuffle(endings)
        examples.append({"ctx": text(1, rng.choice((3, 30))), "endings": endings, "label": rng.randrange(4)})
    return examples


def make_model(tokenizer=BYTES, block_size=512, std=0.5, **settings):
    """A model of random weights with firm opinions: every parameter is drawn, biases and norms too."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32, **settings))
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
    """Each ending by itself behind the context, the whole sequence through the model, in float32: no trick at all."""
    losses = []
    for ending in endings:
        tokens = torch.tensor([context + ending])
        logits, _ = model(tokens)
        losses.append(F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")[-len(ending):])
    return losses


def tokens_of(example, tokenizer):
    return (tokenizer.encode_ordinary(example["ctx"]), [tokenizer.encode_ordinary(" " + e) for e in example["endings"]])


def assert_same(model, examples, tokenizer, batch_tokens=0):
    """The losses are the plain method's, and evaluate's accuracy is 1 where its choices, by sum or by mean, are labels."""
    batch = [tokens_of(e, tokenizer) for e in examples]
    plain = [plain_losses(model, *e) for e in batch]
    ours = scoring.ending_losses(model, batch, head_rows=300)
    assert [[len(x) for x in xs] for xs in ours] == [[len(x) for x in endings] for _, endings in batch]
    torch.testing.assert_close(flat(ours), torch.cat([x for xs in plain for x in xs]), rtol=1e-4, atol=1e-4)
    for key, measure in (("acc", torch.sum), ("acc_norm", torch.mean)):
        labels = [torch.stack([measure(x) for x in xs]).argmin().item() for xs in plain]
        assert len(set(labels)) > 1
        labelled = [{**e, "label": label} for e, label in zip(examples, labels, strict=True)]
        result = scoring.evaluate(model, labelled, tokenizer, FLOAT32, batch_tokens=batch_tokens)
        assert result["examples"] == len(examples)
        assert result[key] == 1.0


def flat(losses):
    return torch.tensor([x for endings in losses for ending in endings for x in ending])


# -----------------------------------------------------------------------------
# the scoring rule


@pytest.mark.parametrize("source, get_tokenizer, trained", [
    (made_examples, lambda: BYTES, False), (made_examples, lambda: BYTES, True),
    (real_examples, lambda: BYTES, False), (real_examples, lambda: BYTES, True),
    (lambda: real_examples()[:80], gpt2_tokenizer, True),  # its 50k columns take their time
], ids=["made-random", "made-trained", "real-random", "real-trained", "real-trained-gpt2"])
def test_choices_and_losses_equal_the_plain_method(source, get_tokenizer, trained):
    examples, tokenizer = source(), get_tokenizer()
    model = make_model(tokenizer, block_size=1024, std=0.05 if trained else 0.5)
    if trained:
        train_a_bit(model, examples, tokenizer)
    assert_same(model.eval(), examples, tokenizer)


@pytest.mark.parametrize("batch_tokens", [1, 2000, 10**9])
def test_the_size_of_batches_changes_no_choice(batch_tokens):
    assert_same(make_model().eval(), made_examples(seed=1), BYTES, batch_tokens)


def test_equals_the_original_script_on_a_hugging_face_directory(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    gpt2_tokenizer()
    import tiktoken
    enc = tiktoken.get_encoding("gpt2")
    make_model(enc).save_pretrained(tmp_path / "hf")
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    examples = made_examples(50, seed=2)
    right = right_norm = 0
    for e in examples:  # as the original does it: four padded rows, and a mask over the endings
        ctx, endings = enc.encode(e["ctx"]), [enc.encode(" " + end) for end in e["endings"]]
        tokens = torch.zeros(4, len(ctx) + max(map(len, endings)), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, end in enumerate(endings):
            tokens[i, :len(ctx) + len(end)] = torch.tensor(ctx + end)
            mask[i, len(ctx):len(ctx) + len(end)] = 1
        with torch.no_grad():
            losses = F.cross_entropy(hf(tokens).logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        sums = (losses * mask[:, 1:]).sum(dim=1)
        right += sums.argmin().item() == e["label"]
        right_norm += (sums / mask[:, 1:].sum(dim=1)).argmin().item() == e["label"]
    assert 0 < right < 50 and 0 < right_norm < 50 and right != right_norm

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(e) + "\n" for e in examples))
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", "--model_type", str(tmp_path / "hf"), "--data", str(data),
                                      "--device", "cpu"])
    hellaswag.main()
    assert capsys.readouterr().out == f"50 examples, acc: {right / 50:.4f}, acc_norm: {right_norm / 50:.4f}\n"


def test_a_model_that_knows_nothing_takes_the_shortest_ending():
    model = make_model()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    example = {"ctx": "it", "endings": ["was over then", "was over", "was", "was so"], "label": 2}
    assert scoring.evaluate(model, [example], BYTES, FLOAT32)["acc"] == 1
    [losses] = scoring.ending_losses(model, [tokens_of(example, BYTES)])
    np.testing.assert_allclose(np.concatenate(losses), np.log(257), rtol=1e-6)


def test_of_equal_endings_the_first_wins_whatever_the_rounding():
    """The same ending at two places of a row differs in the last digit; the original takes the first of equals."""
    a, b = [5, 6], [7]
    assert scoring.choose([[2.0, 2.0], [1.0, 1.0000002], [3.0], [1.0, 1.0]], [b, a, b, a]) == (1, 1)
    assert scoring.choose([[1.0, 1.0], [1.5], [0.9, 0.9, 0.9], [9.0]], [[1, 2], [3], [4, 5, 6], [7]]) == (1, 2)


def test_a_context_too_long_is_cut_from_the_left_and_that_is_said(capsys):
    model = make_model(block_size=64).eval()
    example = {"ctx": "abcdefghij" * 8, "endings": ["x" * 39, "y" * 10, "z", "xyz"], "label": 0}
    short = {"ctx": "abc", "endings": ["a", "b", "c", "d"], "label": 0}
    cut = {**example, "ctx": example["ctx"][-(64 - 40):]}  # with the longest ending and its space, 64 tokens
    losses = plain_losses(model, *tokens_of(cut, BYTES))
    example["label"] = torch.stack([x.mean() for x in losses]).argmin().item()
    assert scoring.fit(*tokens_of(example, BYTES), 64) == tokens_of(cut, BYTES)
    assert scoring.evaluate(model, [cut, short], BYTES, FLOAT32)["examples"] == 2
    assert "cut" not in capsys.readouterr().out
    assert scoring.evaluate(model, [example], BYTES, FLOAT32)["acc_norm"] == 1
    scoring.evaluate(model, [example, short, example], BYTES, FLOAT32)
    assert "2 of 3 examples are longer than the model's 64 tokens" in capsys.readouterr().out


def test_an_ending_longer_than_the_model_keeps_a_token_of_context():
    context, endings = scoring.fit([1, 2, 3], [[4] * 20, [5] * 3], block_size=8)
    assert (context, endings) == ([3], [[4] * 7, [5] * 3])
    example = {"ctx": "abc", "endings": ["x" * 99, "y" * 10, "z", "xyz"], "label": 0}
    assert scoring.evaluate(make_model(block_size=8), [example], BYTES, FLOAT32)["examples"] == 1


# -----------------------------------------------------------------------------
# what it costs, and what it leaves alone


def test_the_context_is_read_once_and_the_head_only_where_a_loss_is():
    model = make_model()
    rows = {}
    model.lm_head.register_forward_hook(lambda m, x, y: rows.update(head=x[0].shape[0]))
    model.transformer.wte.register_forward_hook(lambda m, x, y: rows.update(embedding=x[0].numel()))
    scoring.ending_losses(model, [(list(range(50)), [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]])])
    assert rows == {"head": 3 + 1 + 2 + 4, "embedding": 50 + 2 + 0 + 1 + 3}


def test_batches_hold_every_example_once_and_little_padding():
    encoded = [tokens_of(e, BYTES) for e in made_examples(300)]
    lengths = [scoring.row_length(*e) for e in encoded]
    batches = scoring.make_batches(encoded, 2000)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    assert max(padded) <= 2000
    assert sum(padded) < 1.1 * sum(lengths)  # 1.8 times as many in the order of the file


def test_bfloat16_is_close_and_casts_a_weight_once():
    model, examples = make_model(), made_examples()
    casts = 0

    class CountCasts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal casts
            casts += func is torch.ops.aten._to_copy.default and args[0] is model.transformer.h[0].mlp.c_fc.weight
            return func(*args, **(kwargs or {}))

    with CountCasts():
        scoring.evaluate(model, examples, BYTES, torch.autocast("cpu", torch.bfloat16), batch_tokens=500)
    assert casts == 1
    batch = [tokens_of(e, BYTES) for e in examples]
    with torch.autocast("cpu", torch.bfloat16):
        losses = flat(scoring.ending_losses(model, batch))
    assert 0 < (losses - flat(scoring.ending_losses(model, batch))).abs().max() < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_finds_the_same_losses():
    model = make_model()
    batch = [tokens_of(e, BYTES) for e in made_examples()]
    exact = flat(scoring.ending_losses(model, batch))
    model.to("cuda")
    torch.testing.assert_close(flat(scoring.ending_losses(model, batch)), exact, rtol=1e-3, atol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(flat(scoring.ending_losses(model, batch)), exact, rtol=0.05, atol=0.2)


def test_training_goes_on_as_if_there_had_been_no_evaluation():
    model = make_model(dropout=0.5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    model.train()
    result = scoring.evaluate(model, made_examples(), BYTES, FLOAT32)
    assert not model.training  # the loop says train() before each step
    assert result == scoring.evaluate(make_model(), made_examples(), BYTES, FLOAT32)  # no dropout
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# -----------------------------------------------------------------------------
# many processes


@pytest.mark.parametrize("world_size", [2, 3, 50])
def test_every_rank_of_any_world_has_the_result_of_one(world_size, monkeypatch):
    """Ranks as threads, all_reduce as a sum behind a barrier. Of 50, most have no batch at all."""
    model, examples = make_model(), made_examples()
    alone = scoring.evaluate(model, examples, BYTES, FLOAT32)
    counts, barrier = [], threading.Barrier(world_size)

    def all_reduce(x):
        counts.append(x.clone())
        barrier.wait(timeout=60)
        x.copy_(torch.stack(counts).sum(dim=0))

    monkeypatch.setattr(scoring.dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(world_size) as threads:
        results = list(threads.map(lambda rank: scoring.evaluate(
            model, examples, BYTES, contextlib.nullcontext(), rank, world_size), range(world_size)))
    assert results == [alone] * world_size
    assert sum(c[0] > 0 for c in counts) > 1  # the work was shared


def test_command_line_under_torchrun(tmp_path):
    model, examples = make_model(), made_examples()
    torch.save({"model": model.state_dict(), "config": asdict(model.config), "tokenizer": BYTES_DICT},
               tmp_path / "model.pt")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    done = run("hellaswag.py", "--checkpoint_path=model.pt", "--data=data.jsonl", "--limit=33", "--device=cpu",
               cwd=tmp_path, nproc=2)
    assert done.returncode == 0, done.stderr
    scores = scoring.evaluate(model, examples[:33], BYTES, FLOAT32)
    assert done.stdout == f"33 examples, acc: {scores['acc']:.4f}, acc_norm: {scores['acc_norm']:.4f}\n"


# -----------------------------------------------------------------------------
# the data

GOOD = {"ctx": "A man sits on a roof. he", "endings": ["a", "b", "c", "d"], "label": 3}


@pytest.mark.parametrize("line, complaint", [
    ('{"ctx": "A man', "broken JSON"),
    ("[1, 2]", "expected an object"),
    (json.dumps({**GOOD, "label": 4}), "label is 4"),
    (json.dumps({**GOOD, "label": "3"}), "label is '3'"),
    (json.dumps({**GOOD, "label": True}), "label is True"),
    (json.dumps({k: GOOD[k] for k in ("ctx", "endings")}), "label is None"),
    (json.dumps({**GOOD, "endings": ["a", "b", "c"]}), "expected a list of 4 texts"),
    (json.dumps({**GOOD, "endings": ["a", "b", "c", 4]}), "expected a list of 4 texts"),
    (json.dumps({**GOOD, "ctx": ""}), "ctx is ''"),
])
def test_a_broken_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(UserError) as e:
        scoring.load_examples(str(path))
    assert f"{path}, line 3: " in str(e.value) and complaint in str(e.value)
    assert "\n" not in str(e.value)


def test_a_file_is_loaded_as_it_is(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({**GOOD, "ind": 7}) + "\n\n" + json.dumps({**GOOD, "ctx": "Ein Mann säße"}) + "\n",
                    encoding="utf-8")
    assert scoring.load_examples(path) == [{**GOOD, "ind": 7}, {**GOOD, "ctx": "Ein Mann säße"}]


@pytest.mark.parametrize("content", [None, b"\n", b"\xff\xfe\x00"])
def test_a_file_with_no_examples_in_it(tmp_path, content):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="data.jsonl"):
        scoring.load_examples(path)


def test_without_a_path_it_downloads_once(tmp_path, monkeypatch):
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps(GOOD) + "\n")
    monkeypatch.setattr(scoring, "URL", source.as_uri())
    monkeypatch.setattr(scoring, "CACHE", tmp_path / "hellaswag" / "hellaswag_val.jsonl")
    assert scoring.load_examples() == [GOOD]
    source.unlink()
    assert scoring.load_examples("") == [GOOD]


@pytest.mark.parametrize("short", [False, True], ids=["refused", "cut short"])
def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch, short):
    import http.server

    class Half(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if short else 404)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write((json.dumps(GOOD) + "\n").encode())

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Half)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(scoring, "URL", f"http://127.0.0.1:{server.server_port}/hellaswag_val.jsonl")
    monkeypatch.setattr(scoring, "CACHE", tmp_path / "hellaswag" / "hellaswag_val.jsonl")
    try:
        with pytest.raises(UserError, match="--data") as e:
            scoring.load_examples()
    finally:
        server.shutdown()
        server.server_close()
    assert "\n" not in str(e.value)
    assert not list(tmp_path.rglob("*.jsonl*"))
