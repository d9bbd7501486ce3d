"""Linear layers in 8 bits, beside the formula in float64 and beside the float32 model.

    python -m pytest tests/inference/test_quantize.py
"""

import copy
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from byte_model import CONFIG, N_VOCAB, drain, make_model, make_tokenizer, prompts, uncached
from conftest import run
from torch.nn import functional as F

from gptlib.inference.int8 import kernel as int8_kernel
from gptlib.inference import quantize
from gptlib.common import UserError
from gptlib.inference.engine import Engine
from gptlib.inference.int8.kernel import has_instructions, load_int8_linear
from gptlib.inference.quantize import (Int8Linear, VnniLinear, WeightOnlyLinear, quantize_int8,
                             quantize_rows)
from gptlib.data.tokenizer import tokenizer_to_dict
from inference import load_model_from_checkpoint
from train_gpt2 import GPT

pytestmark = pytest.mark.usefixtures("one_thread")
needs_int8 = pytest.mark.skipif(not quantize.has_exact_products(Int8Linear),
                                reason="this CPU or torch has no exact int8 products")


def skip_without_kernel():
    if load_int8_linear() is None:
        pytest.skip("this CPU has no AVX-512 VNNI, or no C++ compiler works here")


@pytest.fixture(params=[pytest.param(Int8Linear, marks=needs_int8), VnniLinear])
def kind(request):
    """The classes of layers that multiply whole numbers."""
    if request.param is VnniLinear:
        skip_without_kernel()
    return request.param


@pytest.fixture
def chosen(monkeypatch, request):
    """The class of layers that quantize_int8 takes, whatever this machine would choose."""
    kind = getattr(request, "param", Int8Linear)
    if kind is VnniLinear:
        skip_without_kernel()
    monkeypatch.setattr(quantize, "fastest_cpu_linear", lambda: kind)
    return kind


INT8_KIND = pytest.param(Int8Linear, marks=needs_int8)
WHOLE_NUMBERS = pytest.mark.parametrize("chosen", [INT8_KIND, VnniLinear], indirect=True)
KINDS = pytest.mark.parametrize("chosen", [INT8_KIND, VnniLinear, WeightOnlyLinear],
                                indirect=True)


def rounded(values, limit=127):
    """The formula by hand, in float64: whole numbers and the scale of each row."""
    scale = np.abs(values).max(-1, keepdims=True) / limit
    return np.rint(values / np.where(scale == 0, 1, scale)), scale


def random_linear(K=96, N=40, bias=True):
    torch.manual_seed(0)
    return torch.nn.Linear(K, N, bias=bias).requires_grad_(False)


# -----------------------------------------------------------------------------
# one layer


def test_weights_are_rounded_row_by_row():
    """Guards against one scale for all rows, and a row of zeros that becomes NaN."""
    weight = random_linear().weight
    weight[3] *= 1000
    weight[5] = 0
    int8, scale = quantize_rows(weight)
    expected, expected_scale = rounded(weight.double().numpy())
    assert int8.dtype == torch.int8
    np.testing.assert_array_equal(int8.numpy(), expected)
    np.testing.assert_allclose(scale.numpy(), expected_scale[:, 0], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows, K, N", [(1, 96, 40), (3, 97, 33), (8, 96, 64), (41, 96, 40)])
def test_products_equal_the_formula(kind, rows, K, N, bias):
    """Guards against a wrong zero point, a scale of another row or token, a bias that is lost."""
    linear = random_linear(K, N, bias)
    x = torch.randn(rows, K)
    weights, weight_scale = rounded(linear.weight.double().numpy())
    numbers, scale = rounded(x.double().numpy())
    expected = numbers @ weights.T * scale * weight_scale.T
    if bias:
        expected += linear.bias.double().numpy()
    result = kind(linear)(x).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=0.02)
    # a number on the border between two may be rounded either way: that is one step of one feature
    assert np.median(np.abs(result - expected)) < 1e-5


def test_outliers_are_multiplied_in_float32(kind):
    """Guards against a feature that is left out, counted twice, or sets the others' scale."""
    linear = random_linear()
    x = torch.randn(5, 96)
    x[:, [7, 90]] *= 1000
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    error = (kind(linear, [7, 90])(x) - expected).abs().max().item()
    assert error < 0.05
    assert (kind(linear)(x) - expected).abs().max().item() > 1, "this test is too easy"


def test_a_row_depends_on_no_other(kind):
    """Guards against samples that change with the neighbours that a batch happens to have."""
    layer = kind(random_linear(N=64), [5])
    x = torch.randn(2, 9, 96)
    x[0, 1] *= 1000
    x[1, 2] = 0
    x[1, 3] = float("nan")
    together = layer(x)
    assert together[1, 3].isnan().all()
    for i in range(2):
        for j in range(9):
            alone = layer(x[i:i + 1, j:j + 1])[0, 0]
            assert torch.equal(alone.nan_to_num(7e7), together[i, j].nan_to_num(7e7))
    assert torch.equal(together[1, 2], layer.bias), "zeros give the bias"


@pytest.fixture
def int8_linear(monkeypatch):
    """The class Int8Linear over an exact product, for a CPU whose own is not."""
    def multiply(x_bytes, weight):
        # rows and terms in an order that depends on the number of rows, as another kernel's would
        K = weight.size(1)
        order = torch.randperm(K, generator=torch.Generator().manual_seed(len(x_bytes)))
        x_bytes, weight = x_bytes[..., order], weight[:, order]
        return (x_bytes.long() @ weight.t().long()).float()

    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", lambda weight, _: weight.clone())
    monkeypatch.setattr(quantize, "multiply_bytes", multiply)
    return Int8Linear


@pytest.mark.parametrize("n_outliers", [0, 1, 16])
def test_a_row_depends_on_no_other_on_any_cpu(int8_linear, n_outliers):
    """Guards against a product with scales, or an order of sums, that a library chooses by the
    number of rows: with those a sample depended on its neighbours on a CPU with AMX.
    """
    linear = random_linear(K=768, N=100)
    layer = int8_linear(linear, range(n_outliers))
    x = torch.randn(18, 768) * 10.0 ** torch.arange(-9, 9)[:, None]
    x[:, :n_outliers] *= 1000
    together = layer(x)
    for i in range(18):
        assert torch.equal(layer(x[i:i + 1])[0], together[i]), f"row {i}"
        assert torch.equal(layer(x[i:i + 3])[0], together[i]), f"row {i} of three"
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    error = (together - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 0.03


@pytest.mark.parametrize("n", [1, 16, 64])
def test_products_of_outliers_are_sums_of_whole_numbers(n):
    """Guards against sums that float64 cannot hold, whose rounding depends on their order."""
    torch.manual_seed(n)
    weight = torch.randn(50, n)
    product = quantize.ExactProduct(weight)
    x = torch.randn(9, n) * 1000
    expected = x.double() @ weight.double().t()
    torch.testing.assert_close(product(x).double(), expected, rtol=1e-6, atol=0.01)
    largest = n * (2**quantize.OUTLIER_BITS)**2
    assert product.numbers.abs().max() == 2**quantize.OUTLIER_BITS
    assert largest + 1.0 != largest, "float64 holds every whole number up to the largest sum"


@pytest.mark.parametrize("rows", [1, 4, 5, 40])
def test_weight_only_products_equal_the_formula(rows):
    """Guards against a kernel for few rows that means other scales than the one for many."""
    linear = random_linear(K=96, N=64)
    x = torch.randn(rows, 96)
    weights, scale = rounded(linear.weight.double().numpy())
    expected = x.double().numpy() @ (weights * scale).T + linear.bias.double().numpy()
    np.testing.assert_allclose(WeightOnlyLinear(linear)(x).numpy(), expected, atol=1e-4)


def test_weights_that_are_not_finite_are_refused():
    """Guards against a broken checkpoint that is rounded to something that looks like one."""
    linear = random_linear()
    linear.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        quantize_rows(linear.weight)


# -----------------------------------------------------------------------------
# a model


def held_out(n=64):
    """Windows of a text with a pattern that a tiny model learns at once: each byte plus 7."""
    starts = torch.randint(256, (n, 1), generator=torch.Generator().manual_seed(1))
    return (starts + 7 * torch.arange(CONFIG.block_size + 1)) % 256


@pytest.fixture(scope="module")
def trained():
    """A tiny model after a brief training; its loss is far from that of its random weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = GPT(dataclasses.replace(CONFIG, n_embd=64))
    model.tokenizer = make_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        starts = torch.randint(256, (32, 1))
        noise = torch.randint(256, (32, CONFIG.block_size + 1))
        rows = (starts + 7 * torch.arange(CONFIG.block_size + 1)) % 256
        rows = torch.where(torch.rand(rows.shape) < 0.1, noise, rows)
        loss = model(rows[:, :-1], rows[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def perplexity(model):
    rows = held_out()
    logits = model(rows[:, :-1])[0].float()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).exp().item()


def plant_outliers(model, factor=200):
    """Make three features of each layer norm's output huge and take it back in the next weight.

    The function of the model stays the same.
    """
    torch.manual_seed(0)
    for block in model.transformer.h:
        for norm, linear in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
            features = torch.randperm(norm.weight.numel())[:3]
            norm.weight[features] *= factor
            norm.bias[features] *= factor
            linear.weight[:, features] /= factor
    return model


@KINDS
def test_perplexity_is_within_half_a_percent(trained, chosen):
    """Guards against 8 bits that cost quality, as weights in the wrong layer or order would."""
    before = perplexity(trained)
    assert before < 100, "the model has learnt something"
    after = perplexity(quantize_int8(copy.deepcopy(trained)))
    assert after == pytest.approx(before, rel=0.005)


@WHOLE_NUMBERS
def test_planted_outliers_cost_nothing(trained, chosen, monkeypatch):
    """Guards against activation outliers, which leave all other features a few values."""
    planted = plant_outliers(copy.deepcopy(trained))
    before = perplexity(planted)
    assert before == pytest.approx(perplexity(trained), rel=1e-4)
    after = perplexity(quantize_int8(copy.deepcopy(planted)))
    assert after == pytest.approx(before, rel=0.005)
    monkeypatch.setattr(quantize, "OUTLIER_COUNTS", (0,))
    without = perplexity(quantize_int8(planted))
    assert without > 1.05 * before, "the outliers are too small to test anything"


@KINDS
def test_the_engine_equals_the_uncached_quantized_model(chosen):
    """Guards against a cache or a batch that computes something else in 8 bits."""
    model = quantize_int8(make_model(), torch.bfloat16)
    engine = Engine(model, slots=3, n_vocab=N_VOCAB)
    requests = [engine.submit(p, max_length=30, temperature=0) for p in prompts(5, 24, 1, 9)]
    drain(engine)
    for request in requests:
        assert request.error is None
        assert request.tokens == uncached(model, request.prompt, 30)


@KINDS
def test_parameters_are_counted_as_before(chosen):
    """Guards against /health, and the choice of threads, that miss the weights in 8 bits."""
    model = GPT(dataclasses.replace(CONFIG, n_embd=32))  # other sizes are padded by zeros
    before = sum(p.numel() for p in model.parameters())
    quantized = quantize_int8(model, torch.bfloat16)
    assert sum(p.numel() for p in quantized.parameters()) == before
    assert quantized.lm_head.weight is quantized.transformer.wte.weight
    linears = [m for m in quantized.modules() if isinstance(m, torch.nn.Linear)]
    assert linears == []


@WHOLE_NUMBERS
def test_a_bias_free_model_quantizes(chosen):
    """Guards against nanoGPT's checkpoints without biases."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(CONFIG, bias=False)).eval().requires_grad_(False)
    idx = torch.tensor(prompts(20))
    expected = model(idx)[0]
    logits = quantize_int8(copy.deepcopy(model))(idx)[0]
    torch.testing.assert_close(logits, expected, atol=0.02 * expected.abs().max().item(), rtol=0)


# -----------------------------------------------------------------------------
# which layers this machine takes


@pytest.mark.parametrize("seconds, exact, expected", [
    ({Int8Linear: 1.0, VnniLinear: 0.9, WeightOnlyLinear: 0.9}, True, Int8Linear),
    ({Int8Linear: 1.0, VnniLinear: 0.9, WeightOnlyLinear: 0.5}, True, WeightOnlyLinear),
    ({Int8Linear: 1.0, VnniLinear: 0.5, WeightOnlyLinear: 0.9}, True, VnniLinear),
    ({Int8Linear: 1.0, VnniLinear: 1.0, WeightOnlyLinear: 9.0}, False, WeightOnlyLinear)])
def test_the_clearly_faster_kernel_is_chosen(monkeypatch, seconds, exact, expected):
    """Guards against a choice that noise decides, and against kernels with wrong sums."""
    skip_without_kernel()
    monkeypatch.setattr(quantize, "has_exact_products", lambda kind: exact)
    monkeypatch.setattr(quantize, "seconds_per_pass", lambda layers, rows: seconds[type(layers[0])])
    assert quantize.fastest_cpu_linear.__wrapped__() is expected


def test_a_cpu_without_exact_products_is_noticed(monkeypatch, kind):
    """Guards against sums that overflow, and against a torch without the kernels."""
    assert quantize.has_exact_products(kind)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * 0.9)
    assert not quantize.has_exact_products(kind)

    def missing(self, x):
        raise AttributeError("no such operator")

    monkeypatch.setattr(kind, "forward", missing)
    assert not quantize.has_exact_products(kind)


# -----------------------------------------------------------------------------
# this repository's own kernel


def test_the_kernel_is_compiled_where_it_can_be():
    """Guards against a source that no longer compiles: all its tests would be skipped."""
    if not has_instructions() or shutil.which("g++") is None:
        pytest.skip("this CPU has no AVX-512 VNNI, or there is no g++")
    assert load_int8_linear() is not None


def test_threads_do_not_change_the_products():
    """Guards against panels or rows that two threads compute, or none."""
    skip_without_kernel()
    layer = VnniLinear(random_linear(K=768, N=1000))
    x = torch.randn(50, 768)
    expected = layer(x)
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer(x), expected)
    finally:
        torch.set_num_threads(1)


def test_the_kernel_reads_no_further_than_its_input():
    """Guards against memory that is read past the end of an input with too few features."""
    skip_without_kernel()
    with pytest.raises(RuntimeError, match="expected 96 features, found 95"):
        VnniLinear(random_linear())(torch.randn(2, 95))


def test_the_compiler_is_told_the_right_shape():
    """Guards against a description of the operator with which torch.compile computes wrongly."""
    skip_without_kernel()
    layer = VnniLinear(random_linear(), [3])
    args = (layer.int8, layer.scale, layer.zero_sum, layer.bias, layer.mask, layer.outliers,
            layer.outlier_weight, layer.N)
    torch.library.opcheck(layer.kernel, (torch.randn(2, 3, 96), *args),
                          test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("script", [None, "#!/bin/sh\necho no header >&2\nexit 1\n"])
def test_without_a_compiler_torch_s_kernels_are_taken(script, tmp_path, monkeypatch, capsys):
    """Guards against a traceback, and a broken library that is left for the next start."""
    monkeypatch.setattr(int8_kernel, "has_instructions", lambda: True)
    compiler = tmp_path / "compiler"
    if script:
        compiler.write_text(script)
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    assert load_int8_linear.__wrapped__() is None
    assert "8-bit weights are slower" in capsys.readouterr().err
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(quantize, "load_int8_linear", lambda: None)
    assert quantize.fastest_cpu_linear.__wrapped__() is not VnniLinear


# -----------------------------------------------------------------------------
# the commands


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "model_00001.pt"
    torch.save(dict(model=trained.state_dict(), config=dataclasses.asdict(trained.config),
                    tokenizer=tokenizer_to_dict(trained.tokenizer)), path)
    return path


@WHOLE_NUMBERS
def test_loading_rounds_the_checkpoint_s_own_weights(checkpoint, trained, chosen):
    """Guards against weights that were rounded to bfloat16 before they are rounded to 8 bits."""
    model = load_model_from_checkpoint(checkpoint, "cpu", "bfloat16", "int8")
    idx = held_out()[:, :-1]
    expected = quantize_int8(copy.deepcopy(trained), torch.bfloat16)(idx)[0]
    assert torch.equal(model(idx)[0], expected)
    assert model.transformer.wte.weight.dtype == torch.bfloat16


def test_inference_samples_in_8_bits(checkpoint, tmp_path):
    """Guards against a flag that is read and forgotten, or that ends in a traceback."""
    done = run("inference.py", f"--checkpoint_path={checkpoint}", "--quantize=int8", "--prompt=abc",
               "--device=cpu", "--max_length=5", "--temperature=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 tokens" in done.stderr
    assert done.stdout.startswith("abc")


@pytest.mark.parametrize("argv", [
    ["inference.py", "--quantize=int3"], ["hellaswag.py", "--quantize=int3"],
    ["serve.py", "--quantize=int3"], ["inference.py", "--quantize=int8", "--export=m.gguf"]])
def test_a_bad_value_gives_one_line(argv, tmp_path):
    """Guards against a traceback, and against a model that is silently not quantized."""
    done = run(*argv, cwd=tmp_path)
    assert done.returncode != 0
    assert "quantize" in done.stderr.lower()  # serve.py names its setting, QUANTIZE
    assert "Traceback" not in done.stderr


def test_python_s_bad_value_is_named(checkpoint):
    """Guards against quantize="int4" that loads the model unquantized."""
    with pytest.raises(UserError, match="'int4': expected one of none, int8"):
        load_model_from_checkpoint(checkpoint, "cpu", quantize="int4")


def test_serve_hands_the_setting_to_the_loader(monkeypatch):
    """Guards against QUANTIZE=int8 that serves the model as it is."""
    import serve
    seen = []
    monkeypatch.setattr(serve, "load_for_sampling", lambda *args: seen.append(args))
    serve.create_app(serve.read_settings(env={"QUANTIZE": "int8"})).extensions["service"].load()
    assert seen == [("log/latest_checkpoint.pt", "auto", "auto", "int8")]
