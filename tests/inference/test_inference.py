"""Loading a model, generating from Python, and the command as its user sees it.

    python -m pytest tests/inference/test_inference.py
"""

import dataclasses
import os
import subprocess
import sys

import pytest
import tiktoken
import torch
from byte_model import CONFIG, EOT, N_VOCAB, as_text, make_model, make_tokenizer, prompts, uncached
from conftest import ROOT, command, environment, run

import inference
from gptlib.common import UserError
from gptlib.data.tokenizer import tokenizer_to_dict
from inference import generate_text, load_for_sampling, load_model_from_checkpoint
from train_gpt2 import GPT


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    (tmp_path / "log").mkdir()
    path = tmp_path / "log" / "latest_checkpoint.pt"
    torch.save(dict(model=model.state_dict(), config=dataclasses.asdict(CONFIG),
                    tokenizer=tokenizer_to_dict(tokenizer),
                    train_config=dict(sample_prompt="def "), step=7), path)
    return path


# -----------------------------------------------------------------------------
# from Python


def test_generate_text_begins_with_the_prompt(model):
    """Guards against a lost prompt, and against a seed that does not repeat its sample."""
    one = generate_text(model, prompt="abc", max_length=20, temperature=0.8, top_k=50, seed=5)
    assert one.startswith("abc")
    assert len(one) > 3
    several = generate_text(model, "abc", 20, 0.8, 50, seed=5, num_samples=3)
    assert several[0] == one
    assert len(set(several)) == 3


def test_generate_text_greedy_equals_the_uncached_model(model):
    """Guards against a prompt that is encoded otherwise than its text."""
    greedy = generate_text(model, "abc", max_length=20, temperature=0)
    assert greedy == "abc" + as_text(uncached(model, b"abc", 20))


def test_more_samples_than_slots(model):
    """Guards against samples that are lost, or exchanged, where they wait for a slot."""
    n = inference.MAX_SLOTS + 3
    several = generate_text(model, "abc", 5, seed=1, num_samples=n)
    assert several == [generate_text(model, "abc", 5, seed=1 + i) for i in range(n)]


def test_an_empty_prompt_is_the_start_of_a_document(model):
    """Guards against an engine that is given no token at all."""
    assert generate_text(model, "", 20, temperature=0) == as_text(uncached(model, [EOT], 20))


def test_a_model_without_a_tokenizer_uses_gpt2s(monkeypatch, model, tokenizer):
    """Guards against an AttributeError for models that come from no checkpoint."""
    monkeypatch.setattr(inference, "load_tokenizer", lambda spec: {"gpt2": tokenizer}[spec])
    assert generate_text(GPT(CONFIG).eval(), "ab", 3).startswith("ab")


def test_dropout_is_switched_off(model, tokenizer):
    """Guards against sampling from a model in training mode."""
    twin = GPT(dataclasses.replace(CONFIG, dropout=0.5)).train()
    twin.load_state_dict(model.state_dict())
    twin.tokenizer = tokenizer
    expected = generate_text(model, "abc", 20, temperature=0)
    assert generate_text(twin, "abc", 20, temperature=0) == expected


@pytest.mark.parametrize("settings, message", [
    (dict(temperature=-1.0), "temperature is -1.0: expected 0.0 to 2.0"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(top_k=0), "top_k is 0: expected at least 1"),
    (dict(top_p=0), "top_p is 0.0: expected above 0 and up to 1"),
    (dict(max_length=2.5), "max_length is 2.5"),
    (dict(seed=-1), "seed is -1"),
])
def test_generate_text_checks_its_settings(model, settings, message):
    """Guards against a way in that skips the check of SamplingParams."""
    with pytest.raises(UserError) as error:
        generate_text(model, "a", **settings)
    assert message in str(error.value)


# -----------------------------------------------------------------------------
# checkpoints


def checkpoint_variants(model):
    """Checkpoints of the same weights as different programs write them."""
    state, config = model.state_dict(), dataclasses.asdict(CONFIG)
    model_args = dict(n_layer=2, n_head=2, n_embd=16, block_size=24, vocab_size=320, bias=True,
                      dropout=0.1)
    compiled = {"_orig_mod." + name: tensor for name, tensor in state.items()}
    distributed = {"module." + name: tensor for name, tensor in state.items()}
    return {
        "ours": dict(model=state, config=config, optimizer=[{"state": {}}]),
        "compiled": dict(model=compiled, config=config),
        "ddp": dict(model=distributed, config=config),
        "build-nanogpt": dict(model=state, config=CONFIG, step=3, val_loss=1.0),
        "nanogpt": dict(model=compiled, model_args=model_args, iter_num=1),
    }


@pytest.fixture
def gpt2_tokenizer(monkeypatch):
    """A tokenizer of bytes in the place of GPT-2's."""
    gpt2 = tiktoken.Encoding("gpt2", pat_str=r"[\s\S]", special_tokens={"<|endoftext|>": 256},
                             mergeable_ranks={bytes([i]): i for i in range(256)})
    monkeypatch.setattr(inference, "load_tokenizer", lambda spec: gpt2)
    return gpt2


@pytest.mark.parametrize("kind", ["ours", "compiled", "ddp", "build-nanogpt", "nanogpt"])
def test_checkpoints_of_all_kinds_give_the_same_model(model, tmp_path, gpt2_tokenizer, kind):
    """Guards against a format that loads with wrong names, untied weights or another GELU."""
    idx = torch.tensor(prompts(20))
    torch.save(checkpoint_variants(model)[kind], tmp_path / kind)
    loaded = load_model_from_checkpoint(tmp_path / kind, device="cpu", dtype="float32")
    assert not loaded.training
    assert loaded.tokenizer is gpt2_tokenizer
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    # nanoGPT has the exact GELU, the others its approximation
    atol = 0.05 if kind == "nanogpt" else 1e-5
    torch.testing.assert_close(loaded(idx)[0], model(idx)[0], atol=atol, rtol=1e-5)


def test_a_hugging_face_directory_gives_the_same_model(model, tmp_path, gpt2_tokenizer):
    """Guards against a directory that loses weights on the way out or back in."""
    idx = torch.tensor(prompts(20))
    model.save_pretrained(tmp_path / "hf")
    loaded = load_model_from_checkpoint(tmp_path / "hf", "cpu", torch.float32)
    torch.testing.assert_close(loaded(idx)[0], model(idx)[0][..., :N_VOCAB])


def test_the_model_has_the_requested_dtype(checkpoint):
    """Guards against weights that stay in the checkpoint's dtype."""
    half = load_model_from_checkpoint(checkpoint, "cpu", "bfloat16")
    assert half.lm_head.weight.dtype == torch.bfloat16
    single = load_model_from_checkpoint(checkpoint, "cpu", torch.float32)
    assert single.transformer.h[1].ln_1.bias.dtype == torch.float32


def test_load_for_sampling_returns_what_the_run_knew(checkpoint, tokenizer):
    """Guards against a server or a command that does not know the step or the run's prompt."""
    loaded = load_for_sampling(checkpoint, "cpu", "float32")
    assert loaded.step == 7
    assert loaded.sample_prompt == "def "
    assert loaded.tokenizer.encode_ordinary("def") == tokenizer.encode_ordinary("def")
    assert loaded.model.tokenizer is loaded.tokenizer


def test_load_for_sampling_without_a_run(model, tmp_path, gpt2_tokenizer):
    """Guards against an error on checkpoints of programs that store no step and no prompt."""
    torch.save(checkpoint_variants(model)["compiled"], tmp_path / "plain.pt")
    loaded = load_for_sampling(tmp_path / "plain.pt", "cpu", "float32")
    assert loaded.step is None
    assert loaded.sample_prompt == inference.DEFAULT_PROMPT


# -----------------------------------------------------------------------------
# the command


SAMPLE = ("inference.py", "--seed=3", "--max_length=20", "--device=cpu", "--dtype=float32")


def test_text_goes_to_stdout_and_the_rest_to_stderr(checkpoint, tmp_path, model):
    """Guards against status lines within text that another program reads."""
    result = run(*SAMPLE, cwd=tmp_path)
    expected = generate_text(model, "def ", 20, 0.8, 50, seed=3)
    assert result.stdout == expected + "\n", result.stderr
    assert "20 tokens in " in result.stderr
    assert "tokens/s; seed 3" in result.stderr


def test_several_samples_are_set_off_by_a_ruler(checkpoint, tmp_path, model):
    """Guards against samples that differ from those of generate_text with the same seed."""
    result = run(*SAMPLE, "--num_samples=3", "--prompt=é", cwd=tmp_path)
    expected = generate_text(model, "é", 20, 0.8, 50, seed=3, num_samples=3)
    assert result.stdout == "\n---\n".join(expected) + "\n", result.stderr


@pytest.mark.parametrize("prompt", ["FILE:story.txt", "-"])
def test_prompts_from_a_file_and_from_stdin(checkpoint, tmp_path, model, prompt):
    """Guards against line ends or bytes that are changed when a prompt is read, a byte order mark
    in it, and the newline that an editor appends.
    """
    text = "one\r\ntwo é\n"
    (tmp_path / "story.txt").write_bytes(text.encode("utf-8-sig") + b"\n")
    args = [*SAMPLE, "--temperature=0", "--stop", "zq", "--prompt", prompt]
    stdin = text.encode("utf-8-sig") if prompt == "-" else b""
    result = subprocess.run(command(*args), cwd=tmp_path, env=environment(), input=stdin,
                            capture_output=True, timeout=300)
    expected = generate_text(model, text, 20, 0, stop=["zq"]) + "\n"
    assert result.stdout.decode() == expected, result.stderr


def test_a_closed_pipe_is_no_error(checkpoint, tmp_path):
    """Guards against a traceback where the reader, such as `head`, has read enough."""
    # greedy: a random sample may end before `head` does, and its line on stderr is no error
    args = ("--max_length=3000", "--temperature=0", "--device=cpu")
    line = " ".join(command("inference.py", *args))
    result = subprocess.run(f"{line} | head -c 5", shell=True, cwd=tmp_path, env=environment(),
                            capture_output=True, timeout=300)
    assert result.stdout[:4] == b"def "
    assert not result.stderr


@pytest.mark.parametrize("args, message", [
    (["--checkpoint_path=log/model_00009.pt"],
     "no checkpoint 'log/model_00009.pt'; checkpoints beside it: log/model_00003.pt"),
    (["--checkpoint_path=log/torn.pt"], "'log/torn.pt' is no checkpoint that can be read"),
    (["--checkpoint_path=log/other.pt"],
     "'log/other.pt' is no checkpoint of a GPT: it has no model and no config"),
    (["--temperature=-0.5"], "temperature is -0.5: expected 0.0 to 2.0"),
    (["--temperature=2.5"], "temperature is 2.5: expected 0.0 to 2.0"),
    (["--top_k=0"], "top_k is 0: expected at least 1"),
    (["--num_samples=0"], "num_samples is 0"),
    (["--dtype=int8"], "dtype is 'int8': choose one of auto, float32, bfloat16, float16"),
    (["--prompt=FILE:nothing.txt"], "--prompt FILE:nothing.txt: No such file or directory"),
    (["--prompt=FILE:spaces.txt"], "the tokenizer cannot encode this text"),
    (["--device=tpu9"], "--device is 'tpu9'"),
])
def test_user_errors_are_one_line(checkpoint, tmp_path, monkeypatch, args, message):
    """Guards against a traceback where the user has to correct a flag."""
    monkeypatch.chdir(tmp_path)
    os.link(checkpoint, tmp_path / "log" / "model_00003.pt")
    (tmp_path / "log" / "torn.pt").write_bytes(checkpoint.read_bytes()[:5000])
    torch.save({"weights": 1}, tmp_path / "log" / "other.pt")
    (tmp_path / "spaces.txt").write_text(" " * 1040000)
    monkeypatch.setattr("sys.argv", ["inference.py", *args])
    with pytest.raises(UserError) as error:
        inference.main()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_longer_than_the_context_is_reported(checkpoint, tmp_path):
    """Guards against a beginning that the model never saw, without a word about it."""
    text = "abcdefghijklmnopqrstuvwxyz0123456789"
    result = run(*SAMPLE, "--prompt", text, cwd=tmp_path)
    assert result.stdout.startswith(text)
    expected = ("the prompt has 36 tokens, the context 24: the first 12 are left out, "
                "it begins at 'mnop")
    assert expected in result.stderr


def test_a_missing_checkpoint_ends_without_a_traceback(tmp_path):
    """Guards against a traceback as the first thing a new user sees."""
    result = run("inference.py", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: no checkpoint 'log/latest_checkpoint.pt' here yet.")
    assert "python train_gpt2.py --preset demo" in result.stderr
    assert "Traceback" not in result.stderr


SAMPLE_AND_LIST_IMPORTS = """
import sys, torch
before = set(sys.modules)
import inference
sys.argv = ["inference.py", "--device=cpu", "--max_length=3"]
inference.main()
print(*(set(sys.modules) - before), file=sys.stderr)
"""


def test_sampling_imports_no_heavy_package(checkpoint, tmp_path):
    """Guards against seconds of imports before the first token."""
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", SAMPLE_AND_LIST_IMPORTS], cwd=tmp_path,
                            text=True, capture_output=True, timeout=300, env=env)
    loaded = set(result.stderr.splitlines()[-1].split())
    heavy = {"datasets", "transformers", "tokenizers", "matplotlib", "pyarrow", "torch._dynamo",
             "flask"}
    assert "inference" in loaded
    assert not loaded & heavy
