"""A step's update and its report, without making the host wait for a GPU."""

import contextlib
import math
import time

import torch

from gptlib.common import UserError

MAX_BAD_STEPS = 10  # steps in a row without a finite gradient norm


# -----------------------------------------------------------------------------
# the update


def update_if_finite(optimizers, norm):
    """Step the optimizers, unless the gradient norm, a tensor of one value, is not finite; then
    weights and moments stay as they are.

    The device decides and the host does not ask: the optimizers that can read `found_inf`, as
    torch.amp.GradScaler sets it. Only for those that can't, AdamW where it is not fused, the host
    looks at the norm.
    """
    is_finite = torch.isfinite(norm)
    for optimizer in optimizers:
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = (~is_finite).float()
            optimizer.step()
            del optimizer.found_inf
        elif is_finite:
            optimizer.step()


# -----------------------------------------------------------------------------
# the report


class StepLog:
    """Reports each step when its loss and norm have arrived from the device.

    On CUDA a step is reported while the device computes the next one (`late`): reading its loss at
    once would make the host wait, and then the device, until the host has queued another step.
    Elsewhere it is reported at once. A context manager: leaving it, even by an error, reports the
    last step.
    """

    def __init__(self, reporter, device, late=None):
        self.reporter, self.device = reporter, device
        self.late = device.type == "cuda" if late is None else late
        self.pending = None  # the figures of a step that is not reported yet
        self.bad_steps = 0

    def __enter__(self):
        return self

    def __exit__(self, error_type, *error):
        if error_type is None:
            self.flush()
            return
        with contextlib.suppress(Exception):  # the first error is the one to tell
            self.flush()

    def start(self):
        """Note when a step begins."""
        self.started = time_mark(self.device)

    def end(self, step, loss, lr, norm):
        """Take the loss and norm of a step, tensors of one value, when it has been queued.

        Raises UserError after ten steps in a row whose norm is not finite.
        """
        loss, norm = (value.to("cpu", non_blocking=self.late) for value in (loss, norm))
        earlier = self.pending
        self.pending = (step, loss, lr, norm, self.started, time_mark(self.device))
        if not self.late:
            self.flush()
        elif earlier:
            self._report(*earlier)

    def flush(self):
        """Report the step that is pending. Whatever is logged next then follows in order."""
        if self.pending:
            pending, self.pending = self.pending, None
            self._report(*pending)

    def _report(self, step, loss, lr, norm, started, ended):
        seconds = seconds_between(started, ended)  # waits until the copies have arrived too
        loss, norm = loss.item(), norm.item()
        self.reporter.step(step, loss, lr, norm, seconds)
        self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1
        if self.bad_steps == MAX_BAD_STEPS:
            self.pending = None  # it stops here, though the device has begun another step
            raise UserError(
                f"stopped at step {step}: the gradient norm was not finite ten steps in a row. "
                "Start again from the last checkpoint with a smaller --max_lr, or look at the "
                "data")


def time_mark(device):
    """A point in the device's time: an event in its queue on CUDA, else the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first, second):
    """Seconds between two marks; it waits until the device has come to the second."""
    if isinstance(second, float):
        return second - first
    second.synchronize()
    return first.elapsed_time(second) / 1000
