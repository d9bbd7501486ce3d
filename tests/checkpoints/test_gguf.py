"""GPT-2 as a GGUF file, read back by gguf, transformers and, if it is installed, llama.cpp.

    python -m pytest tests/checkpoints/test_gguf.py
    pip install llama-cpp-python  # compiles for ten minutes: the tests with llama.cpp run with it
"""

import itertools
import resource
import signal

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import load_gpt2_or_skip
from tokenizers import pre_tokenizers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from gptlib.common import UserError
from gptlib.checkpoints.gguf import DTYPES, derive_merges, dtype_from_name, export_gguf
from gptlib.data.tokenizer import BYTE_OF, EOT, make_encoding, train_bpe
from train_gpt2 import GPT, GPTConfig

TEXT = ("The cats aren't on the mats; we'll see 1234 of them, naïve 日本語 🙂🙂.\n\n"
        "  def f(x):\n\treturn x\n")
HOSTILE = ["", " ", "  ", "\n", " \n\n  a", "a  \u3000 b", "don't I'LL we've 'sample", "x\u0000y",
           "\r\n\t \t", EOT, "naïve e\u0301 ½ ² Ⅷ 日本語のカタカナー中文", "🙂🙂👩‍👩‍👧‍👦",
           "١٢٣ क्षि ไทย", "\u00a0\u0085\u2028 x",
           "\ufeffx\u200by", "a" * 300, " " * 70 + "x", "-" * 99,
           "\U000e0041\u0378\ue000\U0010ffff",
           "</s><|im_end|> <0x0A>", TEXT * 3]

INSTALL = "pip install llama-cpp-python (compiles for ten minutes)"


@pytest.fixture(scope="module")
def gpt2():
    return load_gpt2_or_skip()


@pytest.fixture(scope="module")
def bpe():
    """Other tokens than GPT-2's that split text as it does."""
    return make_encoding("bpe-gpt2", train_bpe([TEXT * 9], 400)._mergeable_ranks)


def make_model(tokenizer, bias=True, std=0.3, n_embd=32, gelu="tanh"):
    """A model with random weights that f16 holds exactly, and padded rows that would be drawn if
    they were kept."""
    torch.manual_seed(0)
    n_rows = -(-tokenizer.n_vocab // 64) * 64
    model = GPT(GPTConfig(128, n_rows, 2, 2, n_embd, bias=bias, gelu=gelu))
    model.eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
        p.copy_(p.half())
    model.transformer.wte.weight[tokenizer.n_vocab:] *= 10
    return model


def export(model, tokenizer, path, dtype="f16"):
    export_gguf(model, tokenizer, path, dtype)
    return path


def read_tensors(path):
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in tensors}


def transformers_logits(path, model, n_vocab, idx):
    """The logits of transformers' GPT-2 with the weights that its own reader finds in the file."""
    c = model.config
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=n_vocab, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head)).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=hf)["tensors"]
    missing = hf.load_state_dict(tensors, strict=False).missing_keys
    assert missing == ["lm_head.weight"], "all but the head, which is the embedding, is in the file"
    return hf(idx).logits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [("f16", 1e-6), ("bf16", 2**-8), ("q8_0", 0.02)])
def test_every_tensor_is_in_the_file(tmp_path, bpe, dtype, tolerance, bias):
    """Guards against a tensor under another's name, transposed, left out, or with padded rows."""
    model = make_model(bpe, bias)
    found = read_tensors(export(model, bpe, tmp_path / "m.gguf", dtype))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    state = model.state_dict()
    state["transformer.wte.weight"] = state.pop("lm_head.weight")[:bpe.n_vocab]
    for key, weight in state.items():
        values = found.pop(names.get_name(key, try_suffixes=(".weight", ".bias")))
        assert values.shape == tuple(weight.shape), key
        np.testing.assert_allclose(values, weight, rtol=tolerance, atol=0.5 * tolerance,
                                   err_msg=key)
    assert all(name.endswith(".bias") for name in found), "nothing else but biases"
    assert len(found) == (0 if bias else 2 * 6 + 1), "zeros for the biases the model lacks"
    assert not any(values.any() for values in found.values())


def test_the_header_describes_model_and_tokenizer(tmp_path, bpe):
    """Guards against a wrong hyperparameter, which llama.cpp computes with, or a special token that
    it does not stop at."""
    fields = gguf.GGUFReader(export(make_model(bpe), bpe, tmp_path / "m.gguf")).fields
    expected = {
        "general.architecture": "gpt2", "gpt2.context_length": 128, "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 128, "gpt2.block_count": 2, "gpt2.attention.head_count": 2,
        "gpt2.vocab_size": bpe.n_vocab,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": bpe.eot_token, "tokenizer.ggml.eos_token_id": bpe.eot_token,
        "tokenizer.ggml.add_bos_token": False}
    assert {key: fields[key].contents() for key in expected} == expected
    assert fields["gpt2.attention.layer_norm_epsilon"].contents() == pytest.approx(1e-5)
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[bpe.eot_token] == EOT
    spelled = [bytes(BYTE_OF[c] for c in token) for token in tokens if token != EOT]
    assert spelled == sorted(bpe._mergeable_ranks, key=bpe._mergeable_ranks.get)
    types = fields["tokenizer.ggml.token_type"].contents()
    assert [i for i, kind in enumerate(types) if kind != gguf.TokenType.NORMAL] == [bpe.eot_token]
    assert types[bpe.eot_token] == gguf.TokenType.CONTROL


@pytest.mark.parametrize("vocabulary", ["bpe", "gpt2"])
def test_merges_of_the_file_give_the_same_ids(request, tmp_path, vocabulary):
    """Guards against merges in another order, or too few: Hugging Face's BPE with those of the file
    makes tiktoken's ids."""
    enc = request.getfixturevalue(vocabulary)
    fields = gguf.GGUFReader(export(make_model(enc), enc, tmp_path / "m.gguf")).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    vocab = {token: i for i, token in enumerate(tokens)}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert len(merges) == enc.n_vocab - 257
    for text in HOSTILE:
        assert theirs.encode(text).ids == enc.encode_ordinary(text), repr(text)


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_computes_the_same_logits(tmp_path, bpe, bias):
    """Guards against weights that are all there and yet mean another function: queries for keys, a
    layer for the next."""
    model = make_model(bpe, bias)
    path = export(model, bpe, tmp_path / "m.gguf")
    idx = torch.randint(bpe.n_vocab, (2, 64))
    theirs = transformers_logits(path, model, bpe.n_vocab, idx)
    torch.testing.assert_close(theirs, model(idx)[0][..., :bpe.n_vocab], rtol=1e-4, atol=1e-4)


def test_rows_that_do_not_divide_into_blocks_stay_f16(tmp_path, bpe):
    """Guards against an error of numpy for a width of 40: q8_0 has blocks of 32 weights."""
    model = make_model(bpe, n_embd=40)
    tensors = gguf.GGUFReader(export(model, bpe, tmp_path / "m.gguf", "q8_0")).tensors
    types = {t.name: t.tensor_type.name for t in tensors}
    assert types["token_embd.weight"] == "F16"
    assert types["blk.0.ffn_down.weight"] == "Q8_0"


def test_what_llama_cpp_would_run_otherwise_is_refused(tmp_path, bpe):
    """Guards against a file that loads everywhere, and splits text or computes other than its
    model."""
    path = tmp_path / "m.gguf"
    ours = make_encoding("bpe", bpe._mergeable_ranks)
    with pytest.raises(UserError, match="--tokenizer bpe --pattern gpt2"):
        export(make_model(ours), ours, path)
    with pytest.raises(UserError, match="exact GELU"):
        export(make_model(bpe, gelu="none"), bpe, path)
    with pytest.raises(UserError, match="q4_0"):
        export(make_model(bpe), bpe, path, "q4_0")
    large = make_model(bpe)
    large.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e5
    with pytest.raises(UserError, match="use bf16"):
        export(large, bpe, path)
    large.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        export(large, bpe, path, "q8_0")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_the_file_is_made(tmp_path, bpe):
    """Guards against an export into a new folder that fails for a file, though not for Hugging
    Face's directory."""
    export(make_model(bpe), bpe, tmp_path / "a" / "b" / "m.gguf")
    assert (tmp_path / "a" / "b" / "m.gguf").exists()


def test_a_changed_model_is_not_exported(tmp_path, bpe):
    """Guards against a GGUF file of a model with ReLU^2, which llama.cpp runs as if it had GELU."""
    model = make_model(bpe)
    for block in model.transformer.h:
        block.mlp.gelu = Square()
    with pytest.raises(UserError, match="its code computes something else than GPT-2"):
        export(model, bpe, tmp_path / "a" / "m.gguf")
    assert list(tmp_path.iterdir()) == []


class Square(torch.nn.ReLU):
    def forward(self, x):
        return super().forward(x).square()


def test_a_token_out_of_reach_of_merges_is_refused():
    """Guards against a token that llama.cpp never makes: tiktoken finds one that is a whole word
    even if no merges lead to it."""
    ranks = {bytes([i]): i for i in range(256)}
    assert derive_merges({**ranks, b"ab": 256, b"abc": 257}) == [(b"a", b"b"), (b"ab", b"c")]
    with pytest.raises(UserError, match="b'xyz'"):
        derive_merges({**ranks, b"xyz": 256})
    with pytest.raises(UserError, match="single bytes"):
        derive_merges(ranks)
    with pytest.raises(UserError, match="256 bytes"):
        derive_merges({b"a": 0})


def test_a_full_disk_leaves_nothing(tmp_path, bpe):
    """Guards against a truncated file under the final name, or a temporary one left behind."""
    model, path = make_model(bpe), tmp_path / "m.gguf"
    size = export(model, bpe, path).stat().st_size
    path.unlink()
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (1000, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(UserError, match="cannot write"):
                export(model, bpe, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == [], f"room for {room} of {size} bytes"
    signal.signal(signal.SIGXFSZ, before)


def test_the_file_name_tells_the_dtype():
    """Guards against a model-q8_0.gguf that holds f16."""
    names = {"m.gguf": "f16", "m-q8_0.gguf": "q8_0", "a/m.BF16.gguf": "bf16",
             "gpt2-f16.gguf": "f16"}
    assert {name: dtype_from_name(name) for name in names} == names
    with pytest.raises(UserError, match="llama-quantize"):
        dtype_from_name("m-Q4_K_M.gguf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", ["bpe", "gpt2"])
def test_llama_cpp_makes_the_same_ids_and_text(request, tmp_path, vocabulary, dtype):
    """Guards against what the readers above don't see: llama.cpp's own pre-tokenizer, special
    tokens and graph."""
    llama_cpp = pytest.importorskip("llama_cpp", reason=INSTALL)
    enc = request.getfixturevalue(vocabulary)
    model = make_model(enc, std=0.1, n_embd=64)
    path = export(model, enc, tmp_path / "m.gguf", dtype)
    llama = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, verbose=False, logits_all=True)
    try:
        for text in HOSTILE:
            ids = llama.tokenize(text.encode(), add_bos=False, special=False)
            assert ids == enc.encode_ordinary(text), repr(text)
        assert llama.token_eos() == enc.eot_token

        idx = enc.encode_ordinary("The cats")
        n_prompt, margins = len(idx), []
        while len(idx) < n_prompt + 100:
            logits = model(torch.tensor([idx]))[0][0, -1, :enc.n_vocab]
            first, second = logits.topk(2).values.tolist()
            margins.append(first - second)
            idx.append(logits.argmax().item())
        llama.eval(idx[:-1])
        scores = np.array(llama.scores[n_prompt - 1:len(idx) - 1])
        theirs = scores.argmax(-1).tolist()
        ours = model(torch.tensor([idx[:-1]]))[0][0, n_prompt - 1:, :enc.n_vocab].numpy()
        error = {"f16": 0.001, "bf16": 0.005, "q8_0": 0.02}[dtype]
        assert np.abs(scores - ours).max() < error
        wrong = [i for i in range(100) if theirs[i] != idx[n_prompt + i] and margins[i] > error]
        assert wrong == [], f"greedy tokens that differ by more than rounding, of {theirs}"
    finally:
        llama.close()


def train_on_text(model, enc, steps=60):
    """Train the model on TEXT, so that its likeliest token is likelier than any other by far."""
    tokens = torch.tensor(enc.encode_ordinary(TEXT * 4))[:129]
    for p in model.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model(tokens[None, :-1], tokens[None, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
@pytest.mark.parametrize("vocabulary", ["bpe", "gpt2"])
def test_llama_cpp_writes_the_same_100_tokens(request, tmp_path, vocabulary, dtype):
    """Guards against what given tokens can't show: llama.cpp's cache, its sampling, where it stops.
    """
    llama_cpp = pytest.importorskip("llama_cpp", reason=INSTALL)
    enc = request.getfixturevalue(vocabulary)
    model = train_on_text(make_model(enc, std=0.02, n_embd=64), enc)
    path = export(model, enc, tmp_path / "m.gguf", dtype)
    prompt = enc.encode_ordinary("The cats")
    idx, margins = list(prompt), []
    while len(idx) < len(prompt) + 100:
        logits = model(torch.tensor([idx]))[0][0, -1, :enc.n_vocab]
        first, second = logits.topk(2).values.tolist()
        margins.append(first - second)
        idx.append(logits.argmax().item())
    llama = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, verbose=False)
    try:
        ids = llama.tokenize(b"The cats", add_bos=False, special=False)
        theirs = list(itertools.islice(llama.generate(ids, temp=0.0, repeat_penalty=1.0), 100))
    finally:
        llama.close()
    assert ids == prompt
    assert theirs == idx[len(prompt):], f"the closest choice was decided by {min(margins):.3f}"
