"""Which ranks are missing when an exchange between processes has failed."""

import os
import time
from datetime import timedelta

import torch.distributed as dist

from gptlib.common import first_line

PATIENCE = 5.0  # seconds within which all that are alive notice the same failure
INTERVAL = 0.2


def is_failed_exchange(error):
    """Whether an error comes from the exchange of tensors between processes."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text)


def describe_failure(error, rank, size):
    """What to tell the user on this rank after a failed exchange: which ranks are gone, and why.

    Every rank that is alive has come here for the same reason, and signs in the store through
    which torchrun's processes have met. Those that do not sign are gone, or hang.
    """
    missing = missing_ranks(rank, size)
    names = ", ".join(map(str, missing))
    who = f"rank {names} does not answer any more" if missing else "a rank did not answer in time"
    return (f"rank {rank} of {size} ends: {who} ({first_line(error)}). Look for the first error "
            "above, or on that host; --auto_resume goes on from the last checkpoint")


def missing_ranks(rank, size):
    """The ranks that do not sign within a few seconds; none where the store can't be reached."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    missing = set(range(size))
    end = time.monotonic() + PATIENCE
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                              is_master=False, timeout=timedelta(seconds=PATIENCE))
        store.set(f"failed/{attempt}/{rank}", "here")
    except (RuntimeError, KeyError):
        return []
    while missing and time.monotonic() < end:
        try:
            missing = {r for r in missing if not store.check([f"failed/{attempt}/{r}"])}
        except RuntimeError:  # the rank that held the store has ended already
            break
        time.sleep(INTERVAL)
    return sorted(missing)
