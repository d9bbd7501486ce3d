"""The command hellaswag.py, beside the original script and under torchrun.

    python -m pytest tests/training/test_hellaswag.py
"""

import json
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import load_gpt2_or_skip, run
from test_scoring import (BYTES, BYTES_DICT, FLOAT32, made_examples,
                          make_model)
from torch.nn import functional as F

import hellaswag
from gptlib.training import scoring


def write_examples(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))


def write_checkpoint(path, model):
    torch.save({"model": model.state_dict(), "config": asdict(model.config),
                "tokenizer": BYTES_DICT}, path)


@torch.no_grad()
def original_choices(model, enc, example):
    """What the original script chooses, by sum and by mean, and the harness by characters.

    Four padded rows, and a mask.
    """
    context = enc.encode(example["ctx"])
    endings = [enc.encode(" " + ending) for ending in example["endings"]]
    tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, ending in enumerate(endings):
        end = len(context) + len(ending)
        tokens[i, :end] = torch.tensor(context + ending)
        mask[i, len(context):end] = 1
    logits = model(tokens).logits[:, :-1].transpose(1, 2)
    losses = F.cross_entropy(logits, tokens[:, 1:], reduction="none")
    sums = (losses * mask[:, 1:]).sum(dim=1)
    means = sums / mask[:, 1:].sum(dim=1)
    per_character = sums / torch.tensor([len(ending) for ending in example["endings"]])
    return sums.argmin().item(), means.argmin().item(), per_character.argmin().item()


def test_equals_the_original_on_a_hugging_face_directory(tmp_path, monkeypatch, capsys):
    """Guards against accuracies that are not comparable with those of build-nanogpt."""
    transformers = pytest.importorskip("transformers")
    load_gpt2_or_skip()  # skips where there is no vocabulary
    import tiktoken
    enc = tiktoken.get_encoding("gpt2")
    make_model(enc).save_pretrained(tmp_path / "hf")
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    examples = made_examples(50, seed=2)
    n_correct = n_correct_norm = n_correct_chars = 0
    for example in examples:
        by_sum, by_mean, by_characters = original_choices(hf, enc, example)
        n_correct += by_sum == example["label"]
        n_correct_norm += by_mean == example["label"]
        n_correct_chars += by_characters == example["label"]
    assert 0 < n_correct < 50
    assert 0 < n_correct_norm < 50
    assert n_correct != n_correct_norm

    write_examples(tmp_path / "data.jsonl", examples)
    monkeypatch.setattr(sys, "argv", [
        "hellaswag.py", "--model_type", str(tmp_path / "hf"),
        "--data", str(tmp_path / "data.jsonl"), "--device", "cpu"])
    hellaswag.main()
    expected = (f"50 examples, acc: {n_correct / 50:.4f}, acc_norm: {n_correct_norm / 50:.4f} "
                f"by tokens, {n_correct_chars / 50:.4f} by characters\n")
    assert capsys.readouterr().out == expected


def test_command_line_under_torchrun(tmp_path):
    """Guards against two processes that print twice, or whose shares give another result."""
    model, examples = make_model(), made_examples()
    write_checkpoint(tmp_path / "model.pt", model)
    write_examples(tmp_path / "data.jsonl", examples)
    done = run("hellaswag.py", "--checkpoint_path=model.pt", "--data=data.jsonl", "--limit=33",
               "--device=cpu", cwd=tmp_path, nproc=2)
    assert done.returncode == 0, done.stderr
    scores = scoring.evaluate(model, examples[:33], BYTES, FLOAT32)
    expected = (f"33 examples, acc: {scores['acc']:.4f}, acc_norm: {scores['acc_norm']:.4f} "
                f"by tokens, {scores['acc_norm_chars']:.4f} by characters\n")
    assert done.stdout == expected


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    """Guards against an IndexError, on CUDA a failed assertion, for a token without embedding."""
    model = make_model()
    config = {**asdict(model.config), "vocab_size": 256}
    state = model.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name][:256].clone()
    torch.save({"model": state, "config": config, "tokenizer": BYTES_DICT}, tmp_path / "model.pt")
    write_examples(tmp_path / "data.jsonl", made_examples(2))
    done = run("hellaswag.py", "--checkpoint_path=model.pt", "--data=data.jsonl", "--device=cpu",
               cwd=tmp_path)
    assert done.returncode == 1
    assert "the model has 256 tokens, but its tokenizer bpe has 257" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_limit_of_zero_is_refused(tmp_path):
    """Guards against an accuracy of no examples."""
    done = run("hellaswag.py", "--limit=0", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: --limit is 0: expected at least 1\n"
