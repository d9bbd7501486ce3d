"""Weights in 8 bits: decoding a token then reads half the bytes of bfloat16, from any checkpoint.

Each row of a weight (an output channel) is stored as int8 with one float32 scale. A CPU multiplies
whole numbers, so activations are rounded to 8 bits as well, with a scale for each token. GPT-2 has
a few features far larger than the others of a token, which would leave the others only a few
values. They are found when the model is loaded, and multiplied in full (the idea of LLM.int8(),
arXiv:2208.07339, but with the same features for all tokens).
"""

import functools
import time

import torch
import torch.nn.functional as F
from torch import nn

from gptlib.common import UserError
from gptlib.inference.int8.kernel import load_int8_linear
from gptlib.runtime import compile_model

QUANTIZE_CHOICES = ("none", "int8")
WEIGHT_LIMIT = 127  # weights become whole numbers from -127 to 127
BYTE_LIMIT = 127  # activations from -127 to 127, which are stored with 128 added
LARGEST_ERROR = 0.02  # of a layer's outputs; without outliers it is 0.011 to 0.015
OUTLIER_COUNTS = (0, 4, 16, 64)  # features in float32, of which the first that is enough is taken
CALIBRATION_TOKENS = 32
OUTLIER_BITS = 23  # nearly all of float32's 24; 64 products of two such numbers stay below 2**53
FEW_ROWS = 4  # up to which torch's own product with int8 weights is faster than converting them


def quantize_rows(weight):
    """A weight (N, K) as int8 and the scale of each row, (N,): weight is about int8 * scale.

    Raises UserError if a value is not finite.
    """
    weight = weight.detach().float()
    # twice as fast as one pass by vector_norm or aminmax
    largest = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1))
    if not largest.isfinite().all():
        raise UserError("cannot quantize the model: a weight is not finite")
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / WEIGHT_LIMIT
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def round_to_byte(x, largest, zero_byte):
    """Activations x (..., K) as unsigned bytes; largest (..., 1): the largest magnitude of each
    token. x is about (byte - 128) * largest / BYTE_LIMIT.

    zero_byte: a tensor of 128.5, as the conversion to bytes cuts decimals off. (One
    operation fewer than adding 128 and rounding: at one stream each of them counts.)
    """
    return torch.addcdiv(zero_byte, x, largest, value=BYTE_LIMIT).to(torch.uint8)


ONE, ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)


def multiply_bytes(x_bytes, packed):
    """Unsigned bytes (R, K) times packed int8 weights (N, K): whole numbers as float32 (R, N).

    oneDNN adds up in 32-bit integers and converts each sum to float32. All scales are 1 and no
    zero point is given, so it rounds nowhere else, whichever kernel it takes for R rows.
    """
    return torch.ops.onednn.qlinear_pointwise(
        x_bytes, 1.0, 0, packed, ONE, ZERO, None, 1.0, 0, torch.float32, "none", [], "")


class ExactProduct(nn.Module):
    """The product with the weights of a few features, (N, n), which is the same for any batch.

    Both are rounded to whole numbers of OUTLIER_BITS bits. float64 holds the sums of their products
    exactly, so that the order in which a library adds them up makes no difference.
    """

    def __init__(self, weight):
        super().__init__()
        assert weight.size(1) * 2**(2 * OUTLIER_BITS) < 2**53
        weight = weight.double()
        peak = weight.abs().amax(1).clamp(min=1e-300)
        scale = peak / 2**OUTLIER_BITS
        self.register_buffer("numbers", (weight / scale[:, None]).round().t(), persistent=False)
        self.register_buffer("scale", scale / 2**OUTLIER_BITS, persistent=False)

    def forward(self, x):
        x = x.double()
        peak = x.abs().amax(-1, keepdim=True).clamp(min=1e-300)
        numbers = (x / peak).mul_(2**OUTLIER_BITS).round_()
        return (numbers @ self.numbers).mul_(self.scale).mul_(peak).float()


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, multiplied as whole numbers by oneDNN's kernels.

    outliers: the input features that are multiplied with full weights instead, a tensor of their
    indices. Results are float32. A token's result does not depend on the tokens beside it: the two
    products are sums of whole numbers, and all else is done element by element, one operation at a
    time (oneDNN's own scales, or a fused multiplication and addition, are rounded in another way
    for other numbers of rows; seen on a Xeon with AMX).
    """

    def __init__(self, linear, outliers=()):
        super().__init__()
        outliers = torch.as_tensor(outliers, dtype=torch.int64)
        weight = linear.weight.detach().float()
        self.has_outliers = len(outliers) > 0
        if self.has_outliers:
            is_rounded = torch.ones(weight.size(1)).index_fill(0, outliers, 0.0)
            self.register_buffer("outliers", outliers, persistent=False)
            self.register_buffer("is_rounded", is_rounded, persistent=False)
            self.outlier_product = ExactProduct(weight[:, outliers])
            weight = weight * is_rounded
        weight, scale = quantize_rows(weight)
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self.int8 = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale / BYTE_LIMIT, persistent=False)
        zero_sum = 128.0 * weight.sum(dim=1, dtype=torch.int32)
        self.register_buffer("zero_sum", zero_sum, persistent=False)
        if linear.bias is None:
            self.register_buffer("bias", torch.zeros(len(scale)), persistent=False)
        else:
            self.bias = nn.Parameter(linear.bias.detach().float(), requires_grad=False)
        self.register_buffer("zero_byte", torch.tensor(128.5), persistent=False)

    def forward(self, x):
        x = x.float()
        if self.has_outliers:
            outlier_y = self.outlier_product(x.index_select(-1, self.outliers))
            x = x * self.is_rounded
        largest = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True)
        # In a row of zeros 0 / 0 gives any bytes. Their products are multiplied by 0 at the end.
        y = multiply_bytes(round_to_byte(x, largest, self.zero_byte), self.int8)
        y = y.sub_(self.zero_sum).mul_(self.scale).mul_(largest)
        if self.has_outliers:
            y = y.add_(outlier_y)
        return y.add_(self.bias)


class VnniLinear(nn.Module):
    """A linear layer with int8 weights, multiplied as whole numbers by this repository's kernel.

    The formula is that of Int8Linear, in one call from float32 to float32. Weights are padded to
    PANEL outputs and GROUP inputs, and ordered as int8/int8_linear.cpp reads them.
    """

    PANEL = 32  # outputs that the kernel computes at a time
    GROUP = 4  # inputs that are multiplied by one instruction

    def __init__(self, linear, outliers=()):
        super().__init__()
        self.kernel = load_int8_linear()
        weight = linear.weight.detach().float()
        self.N, K = weight.shape
        pad_N, pad_K = -self.N % self.PANEL, -K % self.GROUP
        outliers = torch.as_tensor(outliers, dtype=torch.int64)
        mask = torch.ones(K).index_fill(0, outliers, 0.0)
        int8, scale = quantize_rows(weight * mask)
        int8 = F.pad(int8, (0, pad_K, 0, pad_N))
        groups = int8.view(torch.int32).view(-1, self.PANEL, int8.size(1) // self.GROUP)
        panels = groups.transpose(1, 2).contiguous()  # (panels, K / GROUP, PANEL)
        self.int8 = nn.Parameter(panels.view(torch.int8), requires_grad=False)
        bias = torch.zeros(self.N) if linear.bias is None else linear.bias.detach().float()
        buffers = dict(
            scale=F.pad(scale, (0, pad_N)),
            zero_sum=128 * int8.sum(dim=1, dtype=torch.int32),
            mask=mask, outliers=outliers,
            outlier_weight=F.pad(weight[:, outliers].t(), (0, pad_N)).contiguous())
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self.bias = F.pad(bias, (0, pad_N))
        if linear.bias is not None:
            self.bias = nn.Parameter(self.bias, requires_grad=False)

    def forward(self, x):
        return self.kernel(x.float(), self.int8, self.scale, self.zero_sum, self.bias, self.mask,
                           self.outliers, self.outlier_weight, self.N)


class WeightOnlyLinear(nn.Module):
    """A linear layer with int8 weights that are converted to the activations' dtype to multiply.

    On CUDA torch.compile makes one kernel of both, so that only int8 is read from memory; on a
    CPU torch has such a kernel for a few rows.
    """

    def __init__(self, linear):
        super().__init__()
        weight, scale = quantize_rows(linear.weight)
        self.int8 = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = linear.bias
        is_cuda = weight.device.type == "cuda"
        self.product = compiled_product(weight.device) if is_cuda else weight_only_product

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))
        if not x.is_cuda and rows.size(0) <= FEW_ROWS:
            y = torch._weight_int8pack_mm(rows, self.int8, self.scale.to(x.dtype))
        else:
            y = self.product(rows, self.int8, self.scale)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


def weight_only_product(x, weight, scale):
    """x (R, K) times int8 weight (N, K) times the scale of each row; (R, N) in x's dtype."""
    return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)


@functools.cache
def compiled_product(device):
    """weight_only_product under torch.compile, or as it is if no compiler works."""
    return compile_model(weight_only_product, device, dynamic=True)


# -----------------------------------------------------------------------------
# which of them is right for this machine


def has_exact_products(kind):
    """Whether the int8 kernels of a class of layers work on this CPU, and add up without overflow.

    oneDNN's for processors without VNNI add pairs of products in 16 bits: large values exceed
    these.
    """
    linear = nn.Linear(256, 32, bias=False)
    nn.init.ones_(linear.weight)
    try:
        result = kind(linear)(torch.ones(1, 256))
    except (AttributeError, RuntimeError):  # a build of torch without these kernels
        return False
    return bool(((result - 256).abs() < 0.1).all())


def seconds_per_pass(layers, rows, rounds=3):
    """The shortest of a few passes of `rows` rows through each of the layers."""
    x = torch.ones(rows, 1024)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for layer in layers:
            layer(x)
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def fastest_cpu_linear():
    """The class of linear layers that decodes fastest on this CPU, by a short measurement.

    One stream and eight count alike. Int8Linear, the faster for prompts, is given up only
    for one that is a quarter faster.
    """
    kinds = [WeightOnlyLinear]
    seconds = {}
    with torch.inference_mode():
        if load_int8_linear() is not None and has_exact_products(VnniLinear):
            kinds.append(VnniLinear)
        if has_exact_products(Int8Linear):
            kinds.append(Int8Linear)
        linear = nn.Linear(1024, 2048, bias=False)
        for kind in kinds:
            layers = [kind(linear) for _ in range(12)]  # 24 MB: more than most caches hold
            seconds[kind] = seconds_per_pass(layers, 1) * seconds_per_pass(layers, 8)
    if Int8Linear in seconds:
        seconds[Int8Linear] /= 1.25**2
    return min(seconds, key=seconds.get)


# -----------------------------------------------------------------------------
# a model


def check_quantize(name, value):
    """Raise UserError for a value that names no way to quantize; None is none."""
    if value not in (None, *QUANTIZE_CHOICES):
        expected = ", ".join(QUANTIZE_CHOICES)
        raise UserError(f"{name} is {value!r}: expected one of {expected}")


@torch.no_grad()
def quantize_calibrated(kind, linear, x):
    """The Int8Linear or VnniLinear (kind) of a layer, with as many outliers as its error on
    inputs x asks for.
    """
    x = x.flatten(0, -2).float()  # (tokens, K)
    expected = F.linear(x, linear.weight, linear.bias)
    bias = 0 if linear.bias is None else linear.bias
    largest_error = LARGEST_ERROR * (expected - bias).norm()
    typical = x.abs().median(dim=1, keepdim=True).values.clamp(min=1e-30)  # of each token
    by_size = (x.abs() / typical).amax(0).argsort(descending=True)
    for count in OUTLIER_COUNTS:
        quantized = kind(linear, by_size[:count])
        if (quantized(x) - expected).norm() <= largest_error:
            break
    return quantized


@torch.no_grad()
def read_calibration_inputs(model):
    """What each linear layer of a GPT in float32 is given when the model reads a few tokens.

    The tokens are random: the outliers of GPT-2 belong to certain features, whatever the text.
    """
    inputs, hooks = {}, []

    def keep(linear, args, _):
        inputs[linear] = args[0]

    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(keep))
    n_vocab = model.tokenizer.n_vocab if model.tokenizer else model.config.vocab_size
    length = min(CALIBRATION_TOKENS, model.config.block_size)
    generator = torch.Generator().manual_seed(0)
    try:
        model(torch.randint(n_vocab, (1, length), generator=generator))
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


@torch.no_grad()
def quantize_int8(model, dtype=torch.float32):
    """Replace the linear layers of a GPT by ones with int8 weights, in place; returns the model.

    The model's weights should be float32 still: rounding them to bfloat16 first would lose
    accuracy for nothing. dtype: the embedding's and, on other devices than a CPU, that of the
    computation. On a CPU norms and activations are float32, which costs nothing there. On other
    devices the head stays as it is: it is the embedding, and its logits need float32 sums.
    """
    model = model.eval().requires_grad_(False)
    make = layer_maker(model)
    for parent in list(model.transformer.h.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, make(child))
    on_cpu = model.lm_head.weight.device.type == "cpu"
    if on_cpu:
        model.lm_head = quantize_head(model.lm_head, make)
        model.lm_head.weight = model.transformer.wte.to(dtype).weight
    else:
        model.to(dtype)
    return model.requires_grad_(False)


def layer_maker(model):
    """The function that makes a quantized layer of a linear layer of this model."""
    on_cpu = model.lm_head.weight.device.type == "cpu"
    kind = fastest_cpu_linear() if on_cpu else WeightOnlyLinear
    if kind is WeightOnlyLinear:
        return kind
    inputs = read_calibration_inputs(model)
    return lambda linear: quantize_calibrated(kind, linear, inputs.pop(linear))


def quantize_head(head, make):
    """The head of a GPT as a quantized layer.

    Its int8 weights are a buffer: those who count parameters have counted the embedding already.
    """
    quantized = make(head)
    int8 = quantized.int8.data
    del quantized.int8
    quantized.register_buffer("int8", int8, persistent=False)
    return quantized
