"""Linear layers in the layout of oneDNN's kernels, for decoding on a CPU."""

import copy

import torch
from torch import nn


class PackedLinear(nn.Module):
    """nn.Linear with its weight in the blocked layout of oneDNN's kernels, which read it a third faster on a CPU."""

    def __init__(self, linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(dtype):
    return dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(model):
    """A model that shares the weights of this one but for those of its linear layers, which are packed copies."""
    shared = [*model.parameters(), getattr(model, "tokenizer", None)]
    twin = copy.deepcopy(model, {id(x): x for x in shared})
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
    return twin.eval().requires_grad_(False)
