"""GPT-2 models and tokenizers from and to Hugging Face, against transformers' own code.

    python -m pytest tests/checkpoints/test_huggingface.py
"""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from byte_model import make_tokenizer
from conftest import run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interop_helpers import chinese, greedy, hugging_face, main_of
from safetensors import SafetensorError

import fineweb
import inference
import train_gpt2
from gptlib.common import UserError
from gptlib.checkpoints.huggingface import identity_of_hugging_face
from gptlib.data.tokenizer import EOT, load_tokenizer, tokenizer_to_dict
from inference import generate_text, load_model_from_checkpoint
from gptlib.checkpoints.formats import load_checkpoint
from gptlib.training.presets import PRESETS
from train_gpt2 import GPT, GPTConfig
from gptlib.data.tokenizer import export_tokenizer

GELU = {"tanh": "gelu_new", "none": "gelu"}


# -----------------------------------------------------------------------------
# GPT-2 and Hugging Face directories


@pytest.mark.parametrize("name, n_layer, n_head, n_embd, parameters", [  # as published
    ("gpt2", 12, 12, 768, 124_439_808), ("gpt2-medium", 24, 16, 1024, 354_823_168),
    ("gpt2-large", 36, 20, 1280, 774_030_080), ("gpt2-xl", 48, 25, 1600, 1_557_611_200)])
def test_the_four_sizes(monkeypatch, tmp_path, name, n_layer, n_head, n_embd, parameters):
    """Guards against a size whose names, shapes or counts of tensors differ; on the meta device,
    which takes no memory."""
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)

    def snapshot_download(asked, **options):
        assert asked == name
        transformers.GPT2Config(**sizes).save_pretrained(tmp_path)
        return str(tmp_path)

    def from_pretrained(asked, **options):
        assert asked == str(tmp_path)
        hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        assert hf.num_parameters() == parameters
        return hf, {"missing_keys": set(), "unexpected_keys": set()}

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", from_pretrained)
    with torch.device("meta"):
        model = GPT.from_pretrained(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config == GPTConfig(1024, 50257, n_layer, n_head, n_embd)
    shape = [PRESETS[name][k] for k in ("n_layer", "n_head", "n_embd", "block_size")]
    assert shape == [n_layer, n_head, n_embd, 1024]


@pytest.mark.parametrize("gelu", ["tanh", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocabulary", ["bpe", "gpt2"])
def test_an_exported_model_in_transformers(request, tmp_path, vocabulary, gelu, bias):
    """Guards against an export whose logits, greedy text or tokenizer differ from our own model's,
    there and back again."""
    tokenizer = request.getfixturevalue(vocabulary)
    n = tokenizer.n_vocab
    torch.manual_seed(0)
    model = GPT(GPTConfig(48, -(-n // 64) * 64, 2, 2, 32, gelu=gelu, bias=bias))
    model.eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.transformer.wte.weight[n:] *= 10  # padding that would be drawn, were it still there
    model.tokenizer = tokenizer
    model.save_pretrained(tmp_path / "hf")

    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert hf.config.vocab_size == n
    assert len(theirs) == n
    assert hf.config.activation_function == GELU[gelu]
    assert hf.config.eos_token_id == tokenizer.eot_token
    assert theirs.eos_token_id == tokenizer.eot_token
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"]
    idx = torch.randint(n, (2, 48))
    torch.testing.assert_close(hf(idx).logits, model(idx)[0][..., :n], rtol=1e-4, atol=1e-4)
    prompt = "Hello, 春天来了"
    inputs = theirs(prompt, return_tensors="pt")
    ids = hf.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
    text = theirs.decode(ids)
    assert text == generate_text(model, prompt, 20, temperature=0)

    back = load_model_from_checkpoint(tmp_path / "hf", "cpu", "float32")  # and home again
    torch.testing.assert_close(back(idx)[0], model(idx)[0][..., :n], rtol=1e-4, atol=1e-4)
    assert tokenizer_to_dict(back.tokenizer) == tokenizer_to_dict(tokenizer)


CHARACTERS = (st.sampled_from(" \n\t'sltab19.,中の々カー春天\u0301<|>🙂")
              | st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module", params=["bpe", "gpt2"])
def exported(request, tmp_path_factory):
    """A tokenizer, and what transformers makes of its export."""
    tokenizer = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("exported")
    export_tokenizer(tokenizer, folder, 1024)
    return tokenizer, transformers.AutoTokenizer.from_pretrained(folder), folder


@example(parts=["it's naïve, ", EOT, "中文没有空格。", EOT, EOT,
                " \n\n  日本語のカタカナー 🙂 e\u0301 1234567 don't"])
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(parts=st.lists(st.just(EOT) | st.text(CHARACTERS, max_size=30), max_size=6))
def test_an_exported_tokenizer_gives_the_same_ids(exported, parts):
    """Guards against a text, also with special tokens in it, that has other ids in transformers,
    or does not come back from them."""
    ours, theirs, _ = exported
    text = "".join(parts)
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode(text, allowed_special={EOT})
    assert ours.decode(ids) == text
    assert theirs.decode(ids) == text


def test_an_exported_tokenizer_on_real_text(exported):
    """Guards against an export without the merges that short strings never reach."""
    ours, theirs, folder = exported
    for module in (fineweb, train_gpt2, transformers):
        text = Path(module.__file__).read_text(encoding="utf-8")
        assert theirs(text)["input_ids"] == ours.encode(text, allowed_special={EOT})
    assert tokenizer_to_dict(load_tokenizer(folder)) == tokenizer_to_dict(ours)


@pytest.mark.parametrize("old", [False, True], ids=["tokenizer.json", "vocab.json"])
def test_a_directory_with_a_tokenizer_of_its_own(tmp_path, old):
    """Guards against other ids for a BPE of Hugging Face's own class, with <|endoftext|> as id 0
    and a padding token."""
    from tokenizers import ByteLevelBPETokenizer
    theirs = ByteLevelBPETokenizer()
    text = fineweb.__doc__ * 5 + "".join(chinese(100))
    theirs.train_from_iterator([text], vocab_size=500, special_tokens=[EOT], show_progress=False)
    hf = hugging_face(501, block_size=24)
    hf.save_pretrained(tmp_path)
    if old:
        theirs.save_model(str(tmp_path))
    else:
        theirs.add_special_tokens(["<pad>"])
        theirs.save(str(tmp_path / "tokenizer.json"))
    model = load_model_from_checkpoint(tmp_path, "cpu", "float32")
    assert model.tokenizer.n_vocab == 500
    assert model.tokenizer.eot_token == 0
    for text in (fineweb.__doc__, "中文 naïve, it's 1234\n\n  x 🙂"):
        assert model.tokenizer.encode(text, allowed_special={EOT}) == theirs.encode(text).ids
    ids = theirs.encode("shards ").ids
    expected = greedy(lambda idx: hf(idx).logits, ids, 10, 500)
    assert generate_text(model, "shards ", 10, temperature=0) == model.tokenizer.decode(expected)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(EOT + fineweb.__doc__)["input_ids"] == [0, *theirs.encode(fineweb.__doc__).ids]
    back = load_tokenizer(tmp_path / "again")
    assert tokenizer_to_dict(back) == tokenizer_to_dict(model.tokenizer)


OTHER_PIECES = "it splits text in another way"


@pytest.mark.parametrize("change, message", [
    (lambda t: t["model"].update(type="Unigram"), "it is Unigram, not BPE"),
    (lambda t: t.update(normalizer={"type": "NFC"}), "it changes the text"),
    (lambda t: t["pre_tokenizer"].update(pretokenizers=[{"type": "Whitespace"}]), OTHER_PIECES),
    (lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"),
     OTHER_PIECES),
    (lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), OTHER_PIECES),
    (lambda t: t["added_tokens"][0].update(content="<s>"),
     f"expected {EOT} and no other special token"),
    (lambda t: t["model"]["merges"].reverse(), "its merges are not in the order of the ids"),
    (lambda t: t["model"]["vocab"].pop("a"), "expected"),
    (lambda t: t.pop("model"), "can't be read (KeyError: 'model')"),
])
def test_a_tokenizer_of_another_kind_is_refused(bpe, tmp_path, change, message):
    """Guards against a tokenizer that splits text in another way and gives other ids in silence."""
    export_tokenizer(bpe, tmp_path, 1024)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    change(spec)
    spec.get("model", {}).get("vocab", {}).pop(EOT, None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, message", [
    (dict(gelu="relu"), "its activation_function is relu, expected gelu_new"),
    (dict(scale_attn_by_inverse_layer_idx=True),
     "its scale_attn_by_inverse_layer_idx is True, expected False"),
    (dict(layer_norm_epsilon=1e-6), "its layer_norm_epsilon is 1e-06"),
    (dict(n_inner=48), "its n_inner is 48"),
])
def test_a_gpt2_that_computes_something_else_is_refused(tmp_path, options, message):
    """Guards against options that our model does not have, and other logits in silence."""
    hugging_face(**options).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(tmp_path)


def test_a_shorter_context_of_a_hugging_face_directory(tmp_path):
    """Guards against a shorter context that keeps other position embeddings than the first."""
    hf = hugging_face(block_size=64)
    hf.save_pretrained(tmp_path)
    export_tokenizer(make_tokenizer(), tmp_path, 64)
    model = GPT.from_checkpoint(load_checkpoint(tmp_path), block_size=16).eval()
    idx = torch.randint(300, (2, 16))
    assert model.config.block_size == 16
    assert model.transformer.wpe.weight.shape == (16, 32)
    torch.testing.assert_close(model(idx)[0], hf(idx).logits, rtol=1e-4, atol=1e-4)


# -----------------------------------------------------------------------------
# the way out, from the command line


def test_a_directory_that_cannot_be_listed_has_no_identity(tmp_path):
    """Guards against a traceback on one rank, for which the others then wait."""
    assert identity_of_hugging_face(tmp_path / "gone") is None


def test_export_from_the_command_line(bpe, checkpoint, tmp_path, monkeypatch):
    """Guards against an export that is not in float32, as trained, or overwrites a directory."""
    done = run("inference.py", "--checkpoint_path", checkpoint, "--export", "to/hf", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"exported {checkpoint} to to/hf\n"
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "to" / "hf")
    idx = torch.randint(700, (1, 32))
    expected = GPT.from_checkpoint(load_checkpoint(checkpoint))(idx)[0][..., :700]
    assert hf.dtype == torch.float32
    torch.testing.assert_close(hf(idx).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="is there already: choose another name"):
        main_of(monkeypatch, inference, "--checkpoint_path", checkpoint,
                "--export", tmp_path / "to" / "hf")


def test_a_file_in_capitals_is_gguf(checkpoint, tmp_path, monkeypatch):
    """Guards against a Hugging Face directory of the name x.GGUF."""
    with pytest.raises(UserError, match="a GGUF file can't express how it splits text"):
        main_of(monkeypatch, inference, "--checkpoint_path", checkpoint,
                "--export", tmp_path / "x.GGUF")


class Rotary(train_gpt2.CausalSelfAttention):
    """Attention whose queries and keys are turned by their position."""

    def forward(self, x, attention):
        return super().forward(x, Turned(attention))


class Turned:
    """An attention that turns queries and keys before another one computes with them."""

    def __init__(self, attention):
        self.attention = attention

    def attend(self, layer, q, k, v, dropout_p):
        return self.attention.attend(layer, turn(q), turn(k), v, dropout_p)


def turn(x):
    angle = torch.arange(x.size(2))[:, None] / 10
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


def use_relu_squared(model):
    for block in model.transformer.h:
        block.mlp.gelu = torch.nn.ReLU()


def use_rms_norm(model):
    for block in model.transformer.h:
        block.ln_1 = torch.nn.RMSNorm(32)


def use_rotary(model):
    for block in model.transformer.h:
        block.attn.__class__ = Rotary


def use_wide_layers(model):
    for block in model.transformer.h:
        block.mlp.c_fc = torch.nn.Linear(32, 96, bias=block.mlp.c_fc.bias is not None)
        block.mlp.c_proj = torch.nn.Linear(96, 32, bias=block.mlp.c_proj.bias is not None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("change, message", [
    (use_relu_squared, "its code computes something else than GPT-2, so in other programs"),
    (use_rms_norm, "no plain|it has no transformer.h.0.ln_1.bias|computes something else"),
    (use_rotary, "its code computes something else than GPT-2, so in other programs"),
    (use_wide_layers, "it is not plain GPT-2: size mismatch"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_changed_model_is_not_exported(bpe, tmp_path, bias, change, message):
    """Guards against an export that says that it has worked, of a model which transformers then
    computes otherwise: missing tensors were filled with zeros, and the activation was a constant.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(48, 704, 2, 2, 32, bias=bias))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    change(model)
    with pytest.raises(UserError, match=message):
        model.save_pretrained(tmp_path / "hf", bpe)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), KeyboardInterrupt(),
    SafetensorError("I/O error: No space left on device (os error 28)")])
def test_an_export_that_is_cut_short_leaves_nothing(checkpoint, tmp_path, monkeypatch, error):
    """Guards against a full disk or Ctrl-C that leaves what looks like a whole model."""
    def fail(*args):
        raise error

    model = load_model_from_checkpoint(checkpoint, "cpu", "float32")
    monkeypatch.setattr("gptlib.checkpoints.huggingface.export_tokenizer", fail)
    (tmp_path / "hf").mkdir()  # an empty one may be filled
    (tmp_path / "hf.tmp").mkdir()  # of an export that was killed
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        model.save_pretrained(tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir() if p != checkpoint] == ["hf"]
    assert not any((tmp_path / "hf").iterdir())
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").exists()
