"""Models of other programs go through every script, and are compared with those programs' code.

    python -m pytest tests/checkpoints/test_interop.py
    git clone https://github.com/karpathy/nanoGPT
    git clone https://github.com/karpathy/build-nanogpt
    NANOGPT=nanoGPT BUILD_NANOGPT=build-nanogpt \
        python -m pytest tests/checkpoints/test_interop.py  # against their code as well
"""

import ast
import contextlib
import dataclasses
import importlib.util
import json
import os
import random
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import TINY, english, flags, read_log, run, write_dataset
from interop_helpers import (SIZES, WHAT, WHEN, WHERE, WHO, chinese, greedy, hugging_face,
                             main_of)
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import fineweb
import hellaswag
import train_gpt2
from fineweb import PrepareConfig, prepare
from gptlib.common import UserError
from gptlib.data.shards import read_meta
from gptlib.data.tokenizer import EOT, find_tokenizer, load_tokenizer, tokenizer_to_dict
from inference import generate_text, load_model_from_checkpoint
from gptlib.checkpoints.formats import load_checkpoint
from train_gpt2 import GPT, GPTConfig
from gptlib.data.shards import list_shards
from gptlib.data.tokenizer import train_bpe

# the shape is that of the model to start from
SHAPELESS = {k: v for k, v in TINY.items() if not k.startswith("n_")}


# -----------------------------------------------------------------------------
# checkpoints of build-nanogpt and nanoGPT


def as_main(monkeypatch, cls):
    """Let a class be pickled as one of the script that runs, as build-nanogpt's GPTConfig is."""
    cls.__module__, cls.__qualname__ = "__main__", cls.__name__
    monkeypatch.setattr(sys.modules["__main__"], cls.__name__, cls, raising=False)


def write_in_their_layout(kind, path, monkeypatch):
    """A file as the other program writes it, from transformers' model; returns the function idx ->
    logits."""
    bias, n_vocab = kind != "nanoGPT, no bias", 50257 if kind == "nanoGPT, bias" else 50304
    hf = hugging_face(n_vocab, "gelu_new" if kind == "build-nanogpt" else "gelu", bias)
    conv = {f"{name}.weight" for name, module in hf.named_modules() if isinstance(module, Conv1D)}
    state = {k: v.t().contiguous() if k in conv else v
             for k, v in hf.state_dict().items() if bias or "bias" not in k}
    sizes = dict(block_size=32, vocab_size=n_vocab, n_layer=2, n_head=2, n_embd=32)
    if kind == "build-nanogpt":
        config = dataclasses.make_dataclass("GPTConfig", [(k, int, v) for k, v in sizes.items()])
        as_main(monkeypatch, config)
        state = {f"module.{k}": v for k, v in state.items()}
        contents = {"model": state, "config": config(), "step": 1, "val_loss": 9.9}
    else:
        # the mask of old versions
        state["transformer.h.0.attn.bias"] = torch.ones(32, 32).tril().view(1, 1, 32, 32)
        contents = {"model": {f"_orig_mod.{k}": v for k, v in state.items()},
                    "optimizer": {"state": {}, "param_groups": []},
                    "model_args": {**sizes, "bias": bias, "dropout": 0.2},
                    "iter_num": 2, "best_val_loss": torch.tensor(9.9),
                    "config": {"out_dir": "out", "n_layer": 99, "compile": True}}
    torch.save(contents, path)
    return lambda idx: hf(idx).logits


def write_by_build_nanogpt(path, monkeypatch):
    """Its own classes, and its own line that makes the dict; the script around them would train at
    import."""
    with open(os.path.join(os.environ["BUILD_NANOGPT"], "train_gpt2.py")) as f:
        tree = ast.parse(f.read())
    theirs = types.ModuleType("build_nanogpt")
    monkeypatch.setitem(sys.modules, "build_nanogpt", theirs)  # dataclasses look there
    kinds = ast.ClassDef | ast.Import | ast.ImportFrom
    body = [node for node in tree.body
            if isinstance(node, kinds) and getattr(node, "module", "") != "hellaswag"]
    exec(compile(ast.Module(body, []), "train_gpt2.py", "exec"), theirs.__dict__)
    as_main(monkeypatch, theirs.GPTConfig)
    torch.manual_seed(0)
    sizes = dict(block_size=32, vocab_size=50304, n_layer=2, n_head=2, n_embd=32)
    model = theirs.GPT(theirs.GPTConfig(**sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    made = next(node for node in ast.walk(tree) if isinstance(node, ast.Assign)
                and getattr(node.targets[0], "id", "") == "checkpoint")
    names = dict(raw_model=model, step=1, val_loss_accum=torch.tensor(9.9))
    exec(compile(ast.Module([made], []), "train_gpt2.py", "exec"), names)
    torch.save(names["checkpoint"], path)
    return lambda idx: model(idx)[0]


def write_by_nanogpt(bias, path, folder):
    """Two steps of its own training script."""
    checkout = os.path.abspath(os.environ["NANOGPT"])
    for name in ("train.bin", "val.bin"):
        np.random.default_rng(0).integers(50257, size=500).astype(np.uint16).tofile(folder / name)
    done = subprocess.run(
        [sys.executable, "train.py", f"--dataset={folder}", f"--out_dir={folder}", f"--bias={bias}",
         "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=2",
         "--gradient_accumulation_steps=1", "--max_iters=2", "--eval_iters=1", "--eval_interval=2",
         "--device=cpu", "--dtype=float32", "--compile=False"],
        cwd=checkout, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, text=True,
        capture_output=True)
    assert done.returncode == 0, done.stderr
    path_of_model = os.path.join(checkout, "model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path_of_model)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    saved = torch.load(folder / "ckpt.pt", weights_only=False)  # as nanoGPT does it
    for p in saved["model"].values():  # two steps leave the biases at almost nothing
        p.add_(torch.randn(p.shape) * 0.3)
    saved["model"]["lm_head.weight"] = saved["model"]["transformer.wte.weight"]
    torch.save(saved, path)
    model = theirs.GPT(theirs.GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    return lambda idx: model(idx, idx)[0]


@pytest.fixture(scope="module", params=[
    "build-nanogpt", "nanoGPT, bias", "nanoGPT, no bias",
    "BUILD_NANOGPT", "NANOGPT, bias", "NANOGPT, no bias"])
def foreign(request, tmp_path_factory):
    """A checkpoint in another program's layout, and what its model computes; in capitals: by that
    program's own code."""
    kind, folder = request.param, tmp_path_factory.mktemp("foreign")
    path = folder / "theirs.pt"
    variable = kind.split(",")[0]
    if variable.isupper() and not os.environ.get(variable):
        pytest.skip(f"{variable} names no checkout (see the top of this file)")
    with pytest.MonkeyPatch.context() as monkeypatch:
        if kind == "BUILD_NANOGPT":
            logits_of = write_by_build_nanogpt(path, monkeypatch)
        elif variable == "NANOGPT":
            logits_of = write_by_nanogpt(kind == "NANOGPT, bias", path, folder)
        else:
            logits_of = write_in_their_layout(kind, path, monkeypatch)
    gelu = "none" if kind.lower().startswith("nano") else "tanh"
    return path, torch.no_grad()(logits_of), "no bias" not in kind, gelu


def test_the_logits_of_a_foreign_checkpoint(foreign):
    """Guards against another layout, GELU or missing biases that give other logits in silence."""
    path, logits_of, bias, gelu = foreign
    model = GPT.from_checkpoint(load_checkpoint(path), dropout=0.0).eval()
    assert (model.config.bias, model.config.gelu) == (bias, gelu)
    idx = torch.randint(50257, (2, 32))
    torch.testing.assert_close(model(idx)[0], logits_of(idx), rtol=1e-4, atol=1e-4)


def test_inference_on_a_foreign_checkpoint(foreign, gpt2):
    """Guards against sampling a checkpoint without a tokenizer with another one than GPT-2's, as
    the other program does."""
    path, logits_of, *_ = foreign
    model = load_model_from_checkpoint(path, "cpu", "float32")
    prompt = "Hello, I'm a language model,"
    expected = greedy(logits_of, gpt2.encode_ordinary(prompt), 12, 50257)
    assert generate_text(model, prompt, 12, temperature=0) == gpt2.decode(expected)


def test_hellaswag_on_a_foreign_checkpoint(foreign, gpt2, tmp_path, monkeypatch, capsys):
    """Guards against accuracies other than those of the other program's own logits."""
    path, logits_of, *_ = foreign
    rng = random.Random(0)
    words = "the cat sat on a mat and ran home over wet roof with dogs".split()
    examples, right = [], 0
    for _ in range(8):
        lengths = (9, *rng.choices(range(1, 12), k=4))
        ctx, *endings = (" ".join(rng.choices(words, k=k)) for k in lengths)
        sums, means = [], []
        for ending in endings:  # each by itself, its losses read from whole logits
            a, b = gpt2.encode_ordinary(ctx), gpt2.encode_ordinary(" " + ending)
            logits = logits_of(torch.tensor([a + b]))[0]
            losses = F.cross_entropy(logits[len(a) - 1:-1], torch.tensor(b), reduction="none")
            sums.append(losses.sum().item()), means.append(losses.mean().item())
        label = means.index(min(means))  # so that acc_norm is 1 only if every choice is the same
        right += sums.index(min(sums)) == label
        examples.append({"ctx": ctx, "endings": endings, "label": label})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, examples)))
    main_of(monkeypatch, hellaswag, "--checkpoint_path", path, "--data", tmp_path / "data.jsonl",
            "--device", "cpu")
    expected = f"8 examples, acc: {right / 8:.4f}, acc_norm: 1.0000 by tokens, "
    assert capsys.readouterr().out.startswith(expected)


def test_training_from_a_foreign_checkpoint(foreign, gpt2, tmp_path, monkeypatch):
    """Guards against fine-tuning, with a shorter context, from other weights: the first loss is the
    other program's, and a step of rate 0 keeps the weights."""
    path, logits_of, bias, gelu = foreign
    rng = np.random.default_rng(0)
    tokens = {split: rng.integers(50257, size=800).astype(np.uint16) for split in ("train", "val")}
    (tmp_path / "data").mkdir()
    for split in tokens:  # as build-nanogpt writes them: no meta.json
        np.save(tmp_path / "data" / f"edufineweb_{split}_000000.npy", tokens[split])
    monkeypatch.chdir(tmp_path)
    settings = {**SHAPELESS, "block_size": 16, "max_steps": 1, "max_lr": 0, "val_tokens": 640}
    main_of(monkeypatch, train_gpt2, *flags(**settings), "--init_from", path, "--data_root", "data")
    windows = torch.tensor(tokens["val"][:641].astype(np.int64)).unfold(0, 17, 16)  # (40, 17)
    expected = F.cross_entropy(logits_of(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    assert float(read_log("log")["val"][0]) == pytest.approx(expected.item(), abs=2e-4)
    model = GPT.from_checkpoint(load_checkpoint("log/model_00001.pt")).eval()
    assert (model.config.block_size, model.config.bias, model.config.gelu) == (16, bias, gelu)
    idx = torch.randint(50257, (2, 16))
    torch.testing.assert_close(model(idx)[0], logits_of(idx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module."])
def test_all_prefixes_of_ddp_and_compile(tmp_path, prefix):
    """Guards against refusing a model that was saved from inside DDP or torch.compile."""
    model = GPT(GPTConfig(**SIZES))
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state, "config": SIZES}, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt")["model"].keys() == model.state_dict().keys()


# -----------------------------------------------------------------------------
# fine-tuning on a text of one's own


def test_a_text_is_prepared_with_the_tokenizer_of_a_model(bpe, tmp_path, checkpoint):
    """Guards against shards for fine-tuning with other token ids than the model's own, whatever
    the tokenizer is taken from."""
    text = fineweb.__doc__ * 30
    (tmp_path / "a.txt").write_text(text)
    load_model_from_checkpoint(checkpoint, "cpu").save_pretrained(tmp_path / "hf")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "tokenizer.tiktoken").write_bytes(tokenizer_to_dict(bpe)["ranks"])
    (tmp_path / "dataset" / "meta.json").write_text('{"tokenizer": "bpe"}')
    shards = []
    for i, source in enumerate((checkpoint, tmp_path / "hf", tmp_path / "dataset")):
        root = tmp_path / f"data{i}"
        cfg = PrepareConfig(str(root), files=str(tmp_path / "a.txt"), tokenizer=str(source))
        meta = prepare(cfg)
        assert (meta["tokenizer"], meta["vocab_size"]) == ("bpe", 700)
        assert find_tokenizer(root) == tokenizer_to_dict(bpe)
        train, val = (np.load(list_shards(root, split)[0]) for split in ("train", "val"))
        assert bpe.decode(np.concatenate((train, val))) == EOT + text
        shards.append(train.tolist())
        checkpoint.unlink(missing_ok=True)  # once prepared, the directory needs nothing else
        assert prepare(cfg) == meta
    assert shards[0] == shards[1]
    assert shards[1] == shards[2]
    with pytest.raises(UserError, match="no tokenizer in .*nowhere"):
        prepare(PrepareConfig(str(tmp_path / "data9"), files=str(tmp_path / "a.txt"),
                              tokenizer=str(tmp_path / "nowhere")))
    assert not (tmp_path / "data9").exists()


def test_fine_tuning_a_hugging_face_directory(bpe, tmp_path, monkeypatch):
    """Guards against the README's two commands that do not fit together: prepare with the model's
    tokenizer, train from its weights."""
    (tmp_path / "a.txt").write_text(fineweb.__doc__ * 30)
    model = GPT(GPTConfig(64, 704, 2, 2, 32))
    model.save_pretrained(tmp_path / "hf", bpe)
    for args in (["fineweb.py", "--files", "a.txt", "--tokenizer", "hf", "--data_root", "data"],
                 ["train_gpt2.py", "--init_from", "hf", "--data_root", "data",
                  *flags(**{**SHAPELESS, "max_steps": 30})]):
        done = run(*args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    val = {step: float(loss) for step, loss in read_log(tmp_path / "log")["val"].items()}
    assert val[0] == pytest.approx(np.log(700), abs=0.2)
    assert val[30] < 4.5
    tuned = load_checkpoint(tmp_path / "log" / "latest_checkpoint.pt")
    assert tuned["tokenizer"] == tokenizer_to_dict(bpe)
    wrong = write_dataset(tmp_path / "bytes", [english(900)], [english(300)])
    expected = r"is not the checkpoint's \(bpe\).* fineweb.py --tokenizer THE_CHECKPOINT"
    with pytest.raises(UserError, match=expected):
        main_of(monkeypatch, train_gpt2, "--init_from", tmp_path / "hf", "--data_root", wrong,
                *flags(**SHAPELESS))


# -----------------------------------------------------------------------------
# a language of one's own

def test_a_folder_of_chinese_becomes_a_model(tmp_path):
    """Guards against a recipe for any language (text, tokenizer, shards, model) whose samples are
    no whole characters of it."""
    files = {"书/春.txt": chinese(250, 1), "书/旧/夏.md": chinese(150, 2),
             "书/秋.txt": chinese(100, 3)}
    texts = {}
    for name, sentences in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        texts[name] = "".join(sentences)
        (tmp_path / name).write_text(texts[name], encoding="utf-8")
    settings = dict(n_layer=2, n_head=2, n_embd=64, block_size=32, total_batch_size=512,
                    batch_size=16, max_steps=120, warmup_steps=10, max_lr=1e-2, optimizer="muon",
                    num_samples=2, sample_length=24, sample_temperature=0.8)
    for args in (["fineweb.py", "--files", "书/**/*.*", "--tokenizer", "bpe",
                  "--vocab_size", 600, "--data_root", "data"],
                 ["train_gpt2.py", "--preset", "demo", "--data_root", "data",
                  "--sample_prompt", "春天来了，",
                  *flags(**settings, device="cpu")],
                 ["inference.py", "--prompt", "奶奶", "--max_length", 40, "--top_k", 5,
                  "--seed", 1, "--num_samples", 3, "--device=cpu", "--dtype=float32"]):
        done = run(*args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        if args[0] == "train_gpt2.py":
            said = [line.removeprefix("sample: ") for line in done.stdout.splitlines()
                    if line.startswith("sample: ")]
    assert len(said) == 2
    assert all(text.startswith("春天来了，") for text in said)

    # the tokenizer round-trips every document, and splits them into fewer tokens than others do
    enc = load_tokenizer(tmp_path / "data")
    val, train = (np.load(list_shards(tmp_path / "data", split)[0]) for split in ("val", "train"))
    documents = enc.decode(np.concatenate((train, val))).split(EOT)
    assert documents[0] == ""
    assert sorted(documents[1:]) == sorted(texts.values())
    meta = read_meta(tmp_path / "data")
    assert sum(meta["bytes"].values()) == sum(len(text.encode()) for text in texts.values())
    text = "".join(chinese(50, 4))  # unseen
    english_bpe = train_bpe([fineweb.__doc__ * 20], 600)
    others = [english_bpe]
    with contextlib.suppress(UserError):  # no GPT-2 vocabulary
        others.append(load_tokenizer("gpt2"))
    tokens = enc.encode_ordinary(text)
    assert enc.decode(tokens) == text
    assert len(tokens) < len(text)  # more than a character a token
    for other in others:
        assert len(tokens) < 0.5 * len(other.encode_ordinary(text))

    # the samples are of whole characters, and of this language
    samples = done.stdout.split("\n---\n")
    assert len(samples) == 3
    assert all(sample.startswith("奶奶") for sample in samples)
    written = "".join(samples + said)
    assert "\ufffd" not in written
    assert len(written) > 150
    assert set(written) <= set("".join(texts.values())) | set("-\n")
    words = sum(written.count(word) for word in WHO + WHEN + WHERE + WHAT)
    assert words > len(written) / 12, written  # a sentence is four of them, of some 17 characters
