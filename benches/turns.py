"""Let contenders take turns, in this process or in ones of their own, and show their ratios."""

import contextlib
import multiprocessing
import statistics
import subprocess
import time
from pathlib import Path

from gptlib.common import UserError, log

ROOT = Path(__file__).resolve().parents[1]

# -----------------------------------------------------------------------------
# contenders and their turns


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
        log(f"  {r['name']:42} {r['median']:13,.2f} {r['unit']:7} {spread}  x {r['ratio']:.2f}")


def show_seconds(results):
    """The same results as seconds per run, under the contenders' names up to the first comma."""
    seconds = []
    for r in results:
        name = r["name"].split(",")[0].split(":")[0]
        seconds.append(f"{name} {1 / r['median']:.2f}")
    log("  in seconds: " + ", ".join(seconds))


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def last_lines(text, count=10):
    """The last lines that a failed process wrote, without torchrun's own report after them."""
    lines = [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if number > 0 and "failed (exitcode:" in line:
            lines = lines[:number]
            break
    return "\n".join(lines[-count:])


def run_command(argv, **options):
    """Run a command to its end. Raises UserError with the last lines of its stderr if it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, **options)
    if done.returncode != 0:
        command = " ".join(argv)
        raise UserError(f"exit code {done.returncode} from: {command}\n{last_lines(done.stderr)}")


# -----------------------------------------------------------------------------
# contenders in processes of their own


def serve_turns(pipe, build, args):
    """In the process of a contender: build its work, then do a turn of it for each request."""
    try:
        work = build(*args)
        pipe.send(None)
        while pipe.recv():
            pipe.send(work())
    except EOFError:
        pass
    except Exception as e:
        pipe.send(UserError(f"{build.__name__}: {e}"))


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
        self.process.kill()


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
