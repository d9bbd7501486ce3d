"""Linear layers that decode faster, or more exactly, on a CPU than torch's own."""

import copy

import torch
from torch import nn

LARGEST_FLOAT16 = 65504.0


class PackedLinear(nn.Module):
    """An nn.Linear whose weight is stored in the blocked layout of oneDNN's kernels.

    The kernels read this layout a third faster on a CPU than the plain one.
    """

    def __init__(self, linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Float32Head(nn.Module):
    """A bfloat16 head (an nn.Linear without bias) whose logits are float32.

    bfloat16 logits of magnitude 64 to 128 are half a nat apart, so that many tokens would seem
    equally likely. torch's bfloat16 products round their float32 sums. FBGEMM's product for
    float16 weights does not, and reads as many bytes. float16 holds every bfloat16 weight of
    magnitude 6e-5 to 65504 exactly, and a smaller one to 3e-8.
    """

    def __init__(self, head):
        super().__init__()
        weight = head.weight.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, None)

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)


def can_pack(dtype):
    """Whether this CPU and this torch have oneDNN kernels for packed weights of that dtype."""
    if dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def can_give_float32(head):
    """Whether a Float32Head can stand in for this head here."""
    is_plain = isinstance(head, nn.Linear) and head.bias is None
    if not is_plain or head.weight.device.type != "cpu" or head.weight.dtype != torch.bfloat16:
        return False
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    return head.weight.abs().max().item() <= LARGEST_FLOAT16  # False for NaN


def use_cpu_layers(model):
    """A copy of a model with packed linear layers and a float32 head; it shares all else with it.

    The model itself is returned if its dtype gains nothing, or its layers are quantized already.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linears or not can_pack(model.lm_head.weight.dtype):
        return model
    shared = [*model.parameters(), getattr(model, "tokenizer", None)]
    packed = copy.deepcopy(model, memo={id(item): item for item in shared})
    for module in list(packed.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
    if can_give_float32(model.lm_head):
        packed.lm_head = Float32Head(model.lm_head)
    return packed.eval().requires_grad_(False)
