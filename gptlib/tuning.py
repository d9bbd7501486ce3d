"""Choices that may make training on GPUs faster, in one place: --tuning.

None of them has been timed on a GPU yet (docs/speed.md), so all are off by default. They change
how a step is computed, never what: only the autotuned kernels may round differently.
"""

import dataclasses
from dataclasses import dataclass

from gptlib.common import UserError


@dataclass(frozen=True)
class Tuning:
    """What --tuning asks for; the defaults are torch's own."""
    # MiB of gradients that DDP exchanges at a time. Under torch.compile the model is cut into
    # graphs where a bucket ends: 25 MiB make 15 of GPT-2's, 100 MiB make 5.
    bucket_mb: int = 25
    # Zero the gradients instead of freeing them. They then stay views of DDP's buckets; freed ones
    # are made anew beside the buckets in each step, and copied in.
    keep_gradients: bool = False
    # Let inductor try neighbours of each Triton kernel's block sizes; compiling takes minutes.
    coordinate_descent: bool = False
    # Let inductor time Triton's matrix products beside cuBLAS's, without CUDA graphs.
    max_autotune: bool = False

    def ddp_options(self):
        """The arguments of DistributedDataParallel.

        Not static_graph: torch 2.13 then fails in the first micro-step that exchanges nothing.
        """
        return dict(bucket_cap_mb=self.bucket_mb, gradient_as_bucket_view=True)

    def compile_options(self):
        """The arguments of torch.compile."""
        options = dict(coordinate_descent_tuning=self.coordinate_descent or self.max_autotune,
                       max_autotune=self.max_autotune)
        chosen = {name: True for name, is_on in options.items() if is_on}
        return dict(options=chosen) if chosen else {}


def parse_tuning(text):
    """The Tuning of a text such as "keep_gradients,bucket_mb=100". Raises UserError for another
    name, or a value that is not a whole number above 0.
    """
    fields = {field.name: field.type for field in dataclasses.fields(Tuning)}
    chosen = {}
    for choice in filter(None, text.split(",")):
        name, _, value = choice.strip().partition("=")
        if name not in fields:
            raise UserError(f"--tuning has {name!r}: choose from {', '.join(fields)}")
        if fields[name] is bool and value:
            raise UserError(f"--tuning has {choice!r}: write {name} alone, without a value")
        if fields[name] is int and (not value.isdecimal() or int(value) == 0):
            raise UserError(f"--tuning has {choice!r}: expected {name}=N, a whole number above 0")
        chosen[name] = int(value) if fields[name] is int else True
    return Tuning(**chosen)
