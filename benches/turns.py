"""Let contenders take turns, in this process or in ones of their own, and show their ratios."""

import contextlib
import functools
import multiprocessing
import os
import signal
import statistics
import time
from pathlib import Path

from gptlib.common import UserError, log

ROOT = Path(__file__).resolve().parents[1]


def take_turns(contenders, rounds, unit):
    """Time contenders in turns, after a first turn of each that does not count.

    contenders: {name: a function that does the work and returns the amount of work done}. Returns a
    list of dicts, one per contender: name, unit ("tok/s" for "tok"), median, lowest and highest
    rate, and ratio: the median over the rounds of its rate to the last contender's in that round.
    """
    rates = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            t0 = time.perf_counter()
            amount = work()
            if turn > 0:
                rates[name].append(amount / (time.perf_counter() - t0))
    *_, peer = rates.values()
    results = []
    for name, rate in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rate, peer, strict=True))
        results.append(dict(name=name, unit=f"{unit}/s", median=statistics.median(rate),
                            low=min(rate), high=max(rate), ratio=ratio))
    return results


def show_results(title, results):
    log(f"\n{title}")
    for r in results:
        spread = f"({r['low']:,.2f} to {r['high']:,.2f})"
        seconds = f", {1 / r['median']:.2f} s each" if r["unit"] == "runs/s" else ""
        log(f"  {r['name']:42} {r['median']:13,.2f} {r['unit']:7} {spread}  x {r['ratio']:.2f}"
            f"{seconds}")


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


# -----------------------------------------------------------------------------
# contenders in processes of their own


def serve_turns(pipe, build, args):
    """In the process of a contender: build its work, then do a turn of it for each request."""
    if hasattr(os, "setsid"):
        os.setsid()  # so that it can be killed with the processes that it starts
    try:
        work = build(*args)
        pipe.send(None)
        while pipe.recv():
            pipe.send(work())
    except EOFError:
        pass
    except UserError as e:
        pipe.send(e)
    except Exception as e:
        pipe.send(UserError(f"{type(e).__name__}: {e}"))


class ContenderProcess:
    """A contender in a process of its own: calling it does one turn there and returns the result.

    Raises UserError with the reason if building or a turn fails, or if the process dies.
    """
    GRACE_SECONDS = 10  # from the request to end until the process is killed

    def __init__(self, build, args):
        context = multiprocessing.get_context("spawn")
        self.pipe, end_of_child = context.Pipe()
        self.process = context.Process(target=serve_turns, args=(end_of_child, build, args),
                                       daemon=True)
        self.process.start()
        end_of_child.close()  # so that the pipe ends with the process, however that dies

    def receive(self, timeout=None):
        try:
            if not self.pipe.poll(timeout):
                raise UserError(f"not finished after {timeout} seconds")
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            raise UserError(f"its process died with exit code {code}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __call__(self, timeout=None):
        self.pipe.send(True)
        return self.receive(timeout)

    def close(self):
        with contextlib.suppress(OSError):
            self.pipe.send(False)
        self.process.join(timeout=self.GRACE_SECONDS)
        self.kill()

    def kill(self):
        """Kill it, with the processes that it has started."""
        self.process.kill()
        if hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def separate_processes(**contenders):
    """Contenders in processes of their own, so that none shares allocator, threads or compiler.

    name=(build, *args): build(*args) returns the work, a function as take_turns wants it. Yields
    {name: work}.
    """
    works = {}
    try:
        for name, (build, *args) in contenders.items():
            works[name] = ContenderProcess(build, args)
            works[name].receive()  # it is built before the next one begins
        yield works
    finally:
        for work in works.values():
            work.close()


def run_alone(seconds, function, *args):
    """The result of a function, computed in a process of its own.

    So one that runs out of memory or breaks the CUDA context does not take others with it. Raises
    UserError if it fails or takes longer; seconds: None for no limit.
    """
    process = ContenderProcess(functools.partial, (function, *args))
    try:
        process.receive()
        return process(seconds)
    except UserError:
        process.kill()
        raise
    finally:
        process.close()
