"""Logits in float32 from a head of two bytes a weight, on a CPU."""

import torch
from torch import nn

LARGEST_FLOAT16 = 65504.0


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


def can_give_float32(head):
    """Whether a Float32Head can stand in for this head here."""
    is_plain = isinstance(head, nn.Linear) and head.bias is None
    if not is_plain or head.weight.device.type != "cpu" or head.weight.dtype != torch.bfloat16:
        return False
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    return head.weight.abs().max().item() <= LARGEST_FLOAT16  # False for NaN
