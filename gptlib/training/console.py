"""What a run reports on the way: lines on the console and records in its log, on rank 0 alone."""

import contextlib
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from gptlib.common import UserError, duration, first_line, print0
from gptlib.runtime import device_name, git_commit
from gptlib.training.gpu_facts import peak_flops

MAX_BAD_STEPS = 10  # steps in a row without a finite gradient norm
WAIT_AFTER_SIGNAL = 2.0  # seconds that the device gets, at least, to finish its step


# -----------------------------------------------------------------------------
# the course of a run


class Console:
    """Prints and logs the course of a run. Every rank has one; only rank 0's prints and writes.

    On CUDA a step is reported while the device computes the next one (`late`): reading its loss at
    once would make the host wait, and then the device, until the host has queued another step.
    Elsewhere a step is reported at once. A context manager: leaving it, even by an error, reports
    the last step, notes the error in the log and closes the log.
    """

    def __init__(self, run_log, device, world, max_steps, tokens_per_step, flops_per_token,
                 log_interval=1, start_step=0, tokens_per_byte=None, divergence=None, late=None):
        """run_log: a RunLog, or None on all ranks but 0. start_step: the step that a resumed run
        continues at. tokens_per_byte: of the val split, None if it is not known. divergence: a
        loss_watch.Divergence that ends the run, or None.
        """
        self.log, self.device, self.world = run_log, device, world
        self.max_steps, self.tokens_per_step = max_steps, tokens_per_step
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops(device)
        self.log_interval, self.tokens_per_byte = log_interval, tokens_per_byte
        self.late = device.type == "cuda" if late is None else late
        self.pending = None  # the figures of a step that is not reported yet
        self.bad_steps = 0
        self.divergence = divergence
        self.drawing = None  # a future
        self.signalled = False
        self.step_seconds = 20.0  # of the last step; of the first it is not known
        self.began, self.first_report = time.perf_counter(), None
        self.steps_done = start_step
        self.bar = tqdm(total=max_steps, initial=start_step, desc="training", unit="step",
                        dynamic_ncols=True, disable=None if run_log else True)

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        if error_type is None:
            self.flush()
        else:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                if self.pending and has_passed(self.pending[-1]):  # else it may never end
                    self.flush()
        self.bar.close()
        if self.log:
            if error_type:
                self._log_end(self.steps_done, error=first_line(error))
            self.log.close()

    def stop_waiting(self):
        """From now on, don't wait long for the device. A signal handler calls this."""
        self.signalled = True

    def step_begins(self):
        """Note when a step begins."""
        self.step_began = time_mark(self.device)

    def step_ended(self, step, loss, lr, norm):
        """Take the loss and norm of a step, tensors of one value, once the step is queued.

        Raises UserError after ten steps in a row whose norm is not finite.
        """
        loss, norm = (value.to("cpu", non_blocking=self.late) for value in (loss, norm))
        earlier = self.pending
        self.pending = (step, loss, lr, norm, self.step_began, time_mark(self.device))
        if not self.late:
            self.flush()
        elif earlier:
            self._read_and_report(*earlier)

    @property
    def is_loss_high(self):
        """Whether the last reported loss is so high that the run may be diverging. A checkpoint
        written now may replace the last good one."""
        return self.divergence is not None and self.divergence.high_steps > 0

    def flush(self):
        """Report the pending step, so that whatever is logged next follows in order."""
        if self.pending:
            pending, self.pending = self.pending, None
            self._read_and_report(*pending)

    def _read_and_report(self, step, loss, lr, norm, began, ended):
        self._wait_for(ended)
        seconds = self.step_seconds = seconds_between(began, ended)
        loss, norm = loss.item(), norm.item()
        self._report(step, loss, lr, norm, seconds)
        self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1
        if self.bad_steps == MAX_BAD_STEPS:
            self.pending = None  # the run stops here, though the device has begun another step
            raise UserError(
                f"stopped at step {step}: the gradient norm was not finite ten steps in a row. "
                "Start again from the last checkpoint with a smaller --max_lr, or look at the "
                "data")
        if self.divergence and self.divergence.add(step, loss):
            self.pending = None
            raise UserError(self._log_divergence(step, loss))

    def _log_divergence(self, step, loss):
        """Note in the log that the run has diverged; returns the message for the user."""
        since, mean = self.divergence.since, self.divergence.mean
        message = (f"stopped at step {step}: the loss is {loss:.2f}, and since step {since} it has "
                   f"been far above its running mean of {mean:.2f}. ")
        good = self.log.last_checkpoint(since) if self.log else None
        if good:
            message += (f"The last good checkpoint, {good}, is kept. Go on from there with a "
                        f"smaller rate: --resume --checkpoint_path {good} --max_lr ..., ")
        else:
            message += "Start again with a smaller --max_lr or more --warmup_steps, "
        message += "or train on with --no-stop_on_divergence"
        if self.log:
            self.log.note(step, "diverged", message=message)
        return message

    def _wait_for(self, mark):
        """Wait until the device has reached a time mark.

        By polling: Python handles no signal while the process waits inside of CUDA. After a signal
        three steps' time is enough. If it is not, another rank is gone and the device waits for it:
        raises DistError.
        """
        end = math.inf
        while not has_passed(mark):
            if self.signalled and self.world.size > 1:
                wait = max(WAIT_AFTER_SIGNAL, 3 * self.step_seconds)
                end = min(end, time.monotonic() + wait)
                if time.monotonic() > end:
                    raise dist.DistError(f"no step ended within {wait:.0f} s of the signal")
            time.sleep(0.001)

    def _report(self, step, loss, lr, norm, seconds):
        tokens_per_second = self.tokens_per_step / seconds
        mfu = None
        if self.peak_flops:
            achieved = tokens_per_second * self.flops_per_token
            mfu = achieved / (self.peak_flops * self.world.size)
        if not math.isfinite(norm):
            print0(f"step {step:5d} | warning: the gradient norm is {norm}, the update is skipped")
        if step % self.log_interval == 0:
            line = (f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
                    f"dt: {seconds * 1000:.2f}ms | tok/sec: {tokens_per_second:.2f}")
            line += f" | mfu: {mfu:.2%}" if mfu else ""
            print0(line + self._time_left(step))
        self._write(step, "train", loss=loss, lr=lr, norm=norm, ms=seconds * 1000,
                    tokens_per_second=tokens_per_second, mfu=mfu,
                    memory_mib=peak_gpu_memory(self.device))
        self.steps_done = step + 1
        self.bar.update()

    def _time_left(self, step):
        """The end of a console line that says how long the rest of the run takes.

        It is computed from the time of the steps so far. Evaluations between them count. The first
        step does not, because it compiles.
        """
        now = time.perf_counter()
        if self.first_report is None:
            self.first_report = step, now
        first, began = self.first_report
        left = self.max_steps - step - 1
        if step == first or left == 0:
            return ""
        return f" | {duration((now - began) / (step - first) * left)} left"

    def validation(self, step, loss):
        """Report a validation loss in nats per token, and in bits per byte if the bytes are known.
        """
        bits, shown = {}, ""
        if self.tokens_per_byte:
            bits = {"bpb": loss * self.tokens_per_byte / math.log(2)}
            shown = f" | {bits['bpb']:.4f} bits per byte"
        print0(f"step {step:5d} | validation loss: {loss:.4f}{shown}")
        self._write(step, "val", loss=loss, **bits)
        if self.log:
            self.log.tell_overfitting(step)

    def hellaswag(self, step, scores):
        """Report the accuracies that scoring.evaluate returns."""
        n = scores["examples"]
        print0(f"step {step:5d} | HellaSwag accuracy: {scores['acc_norm']:.4f} on {n} examples")
        self._write(step, "hella", **{name: scores[name] for name in scores if name != "examples"})

    def samples(self, step, texts):
        """Report what the model has written."""
        for text in texts:
            print0(f"sample: {text}")
        if self.log and texts:
            self.log.note(step, "samples", texts=texts, elapsed=self._elapsed())

    def draw_in(self, thread):
        """Redraw in a thread, a ThreadPoolExecutor, unless a drawing waits there already: that one
        will show the latest records."""
        waits = self.drawing and not (self.drawing.running() or self.drawing.done())
        if self.log and not waits:
            self.drawing = thread.submit(self.draw)

    def draw(self):
        """Redraw log.png and report.md."""
        if self.log:
            self.log.draw()
            self.log.write_report()

    def end(self, step, position, val_loss):
        """Report where a run has ended; position is in tokens."""
        if self.log:
            self._log_end(step)
        if step < self.max_steps:
            print0(f"stopped after {step} of {self.max_steps} steps; --auto_resume goes on")
            return
        shown = "" if val_loss is None else f", val loss {val_loss:.4f}"
        print0(f"done: {step} steps, {position:,} tokens{shown}")

    def _elapsed(self):
        return round(time.perf_counter() - self.began, 2)

    def _write(self, step, kind, **values):
        if self.log:
            self.log.write(step, kind, **values, elapsed=self._elapsed())

    def _log_end(self, step, **values):
        self.log.note(step, "end", max_steps=self.max_steps, elapsed=self._elapsed(), **values)
        self.log.write_report()


def time_mark(device):
    """A point in the device's time: an event in its queue on CUDA, elsewhere the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def has_passed(mark):
    """Whether the device has reached a time mark."""
    return isinstance(mark, float) or mark.query()


def seconds_between(first, second):
    """Seconds between two time marks that have passed."""
    if isinstance(second, float):
        return second - first
    return first.elapsed_time(second) / 1000


def peak_gpu_memory(device):
    """MiB that tensors have taken on the GPU at most, or None on any other device."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


# -----------------------------------------------------------------------------
# the facts of a run


def describe_run(settings, model, device, dtype, world, batch_size, data):
    """The facts of the log's first record: what a reader needs to run the same again.

    settings: the run's flags as a dict; data: the loader's Dataset.
    """
    gpt2_tokens = data.tokenizer.name == "gpt2"
    return dict(
        config=settings, parameters=sum(p.numel() for p in model.parameters()),
        git_commit=git_commit(), torch=torch.__version__, device=device_name(device),
        dtype=str(dtype), world_size=world.size, batch_size=batch_size,
        vocab_size=model.config.vocab_size, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=describe_command(), machine=describe_machine(), data=data.description,
        # published accuracies are of models with these tokens, published losses of this text too
        gpt2_tokens=gpt2_tokens, fineweb_edu=gpt2_tokens and data.is_fineweb_edu)


def describe_command():
    """The command line of this run as one would type it again, torchrun included."""
    environment = os.environ
    command = "python"
    if environment.get("RANK"):
        hosts = environment.get("GROUP_WORLD_SIZE", "1")
        command = "torchrun --standalone" if hosts == "1" else f"torchrun --nnodes={hosts}"
        command += f" --nproc_per_node={environment.get('LOCAL_WORLD_SIZE', '1')}"
    return f"{command} {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"


def describe_machine():
    """Processor and system, such as "AMD EPYC, 2 cores, Linux x86_64"."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = found[0].split(":", 1)[1].strip() if found else name
    system = f"{platform.system()} {platform.machine()}"
    return ", ".join(filter(None, [name, f"{os.cpu_count()} cores", system]))


def print_run(facts, n_tokens):
    """Print in one line what is about to run: model, devices, precision, data and micro-batches."""
    settings = facts["config"]
    tokens_per_micro_step = facts["batch_size"] * settings["block_size"] * facts["world_size"]
    micro_batches = math.ceil(settings["total_batch_size"] / tokens_per_micro_step)
    dtype = facts["dtype"].removeprefix("torch.")
    millions = facts["parameters"] / 1e6
    print0(f"{millions:.1f}M parameters on {facts['world_size']} x {facts['device']}, {dtype}, "
           f"{n_tokens:,} training tokens, "
           f"micro-batches of {facts['batch_size']} x {settings['block_size']}, "
           f"{micro_batches} a step and process")
