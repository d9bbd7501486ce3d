"""The processes of one run: how torchrun's join, what they exchange, signals, and who is missing.

With one process nothing here communicates: the same code serves a laptop and eight hosts.
"""

import contextlib
import ipaddress
import os
import signal
import socket
import struct
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from gptlib.common import UserError, first_line, warn
from gptlib.runtime import resolve_device

# The longest that rank 0 works while the others wait for it: samples, or reading a large
# checkpoint from a slow disk. A rank that dies or hangs ends the others after this time.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
FIRST_EXCHANGE_SECONDS = 120  # NCCL's first exchange makes its connections
PATIENCE = 5.0  # seconds within which all ranks that are alive notice the same failure
POLL_INTERVAL = 0.2

# -----------------------------------------------------------------------------
# joining


@dataclass(frozen=True)
class World:
    """This process among those of torchrun; alone by default."""
    rank: int = 0
    local_rank: int = 0
    size: int = 1


@contextlib.contextmanager
def join(device="auto"):
    """Join the processes that torchrun started, if it did, and leave them at the end of the block.

    device: the name of the device that will compute, as resolve_device takes it. Raises UserError
    if the processes cannot reach each other.
    """
    if not os.environ.get("RANK"):
        warn_of_separate_tasks(os.environ)
        yield World()
        return
    rank, local_rank, size = read_ranks(os.environ)
    # Large pages for large tensors on a CPU, which torch asks for at its first one: a sharded model
    # frees and takes memory all the time, and with pages of 4 KiB that was a third of its time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    device = resolve_device(device, local_rank if size > 1 else None)
    if device.type == "cuda":  # before the group is made: it opens a context on the current GPU
        torch.cuda.set_device(device)
    # NCCL for tensors on a GPU; gloo for the rest, such as a checkpoint that rank 0 reads and
    # sends to the others
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = join_store(rank, size)
    choose_interface(store, rank, size, os.environ)
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, store=store, rank=rank,
                            world_size=size)
    check_exchange(device if device.type == "cuda" else torch.device("cpu"), size)
    try:
        yield World(rank, local_rank, size)
    except Exception as e:
        if is_failed_exchange(e):
            raise UserError(describe_failure(e, rank, size)) from e
        raise
    dist.destroy_process_group()  # not after an error: the others may be waiting in a collective


def check_exchange(device, size):
    """Add up a number over all processes, before data and model are made.

    Raises UserError if a broken network or link between GPUs prevents that.
    """
    total = torch.ones(1, device=device)
    work = dist.all_reduce(total, async_op=True)
    end = time.monotonic() + FIRST_EXCHANGE_SECONDS
    while not work.is_completed():
        if time.monotonic() > end:
            raise UserError(f"{size} processes have met, but after {FIRST_EXCHANGE_SECONDS} s they "
                            f"have not exchanged one number between {device.type} devices: look at "
                            "the network and the links between GPUs; NCCL_DEBUG=INFO shows more")
        time.sleep(0.001)
    work.wait()
    if total.item() != size:
        raise UserError(f"{size} processes added up a 1 of each, and found {total.item():g}: "
                        f"{device} or its links are broken")


def warn_of_separate_tasks(environment):
    """Warn if a launcher has started several tasks of this script that do not know each other."""
    launchers = (("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
                 ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))
    for size, rank in launchers:
        n = environment.get(size, "")
        if n.isdecimal() and int(n) > 1 and environment.get(rank) == "0":
            warn(f"{size} is {n}, but RANK is not set: {n} processes run, each by itself. Start "
                 "one torchrun on each host instead: srun --ntasks-per-node=1 torchrun "
                 "--nnodes=... (docs/slurm.sh)")


def read_ranks(environment):
    """(rank, local rank, world size) of torchrun's environment variables.

    Raises UserError if they are incomplete, as some clusters leave them, or not numbers.
    """
    numbers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    values = [environment.get(name, "") for name in numbers]
    are_numbers = all(value.isdecimal() for value in values)
    are_ranks = are_numbers and int(values[0]) < int(values[2])
    if not are_ranks or not environment.get("MASTER_ADDR"):
        names = (*numbers, "MASTER_ADDR")
        found = ", ".join(f"{name}={environment.get(name, '')}" for name in names)
        raise UserError(f"the environment has {found}: expected four numbers, RANK below "
                        "WORLD_SIZE, and an address, as torchrun sets them. Start the script with "
                        "torchrun, or unset RANK for one process")
    return tuple(map(int, values[:3]))


def join_store(rank, size):
    """The key-value store through which the processes meet; if torchrun's agent keeps it, under a
    prefix that no earlier processes have used.

    After a failure torchrun starts the processes again with the same store as before
    (next_rendezvous in torch 2.13's dynamic_rendezvous.py). It still holds the addresses of the
    dead processes, so a process that is faster than its peer tries to connect to a dead one, for
    up to half a minute, and then fails ("connectFullMesh failed").
    """
    store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=COLLECTIVE_TIMEOUT))
    store.set_timeout(COLLECTIVE_TIMEOUT)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    return dist.PrefixStore(agree_on_name(store, rank, size), store)


def agree_on_name(store, rank, size):
    """A name that the processes of one start share, and that no earlier start has used.

    TORCHELASTIC_RESTART_COUNT is no such name: it differs between hosts. And the store may hold
    what earlier processes wrote here. Each process therefore asks under a random id, and rank 0,
    which chooses the name, answers every id until all have joined.
    """
    own_id = uuid.uuid4().hex
    if rank > 0:
        store.set(f"start/id_of_rank/{rank}", own_id)
        name = store.get(f"start/answer_to/{own_id}").decode()  # waits for the answer
        store.add(f"start/joined/{name}", 1)
        return name
    name = own_id
    deadline = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
    while (joined := store.add(f"start/joined/{name}", 0)) < size - 1:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{joined + 1} of {size} processes have started")
        for other in range(1, size):
            key = f"start/id_of_rank/{other}"
            if store.check([key]):  # it may be the id of a dead process: nobody reads the answer
                other_id = store.get(key).decode()
                store.set(f"start/answer_to/{other_id}", name)
        time.sleep(0.01)
    return name


# -----------------------------------------------------------------------------
# the network card


def choose_interface(store, rank, size, environment):
    """If there are several hosts, name in GLOO_SOCKET_IFNAME the network card of this one by which
    it reaches MASTER_ADDR, unless the user has named one.

    gloo itself would take the address that the host's name stands for, which in Debian's /etc/hosts
    is 127.0.1.1. On its own host MASTER_ADDR may stand for that too: this host then asks the other
    ranks, through the store, by which address they know it.
    """
    one_host = environment.get("LOCAL_WORLD_SIZE", str(size)) == str(size)
    if one_host or environment.get("GLOO_SOCKET_IFNAME"):
        return
    own, master = addresses_towards(environment["MASTER_ADDR"])
    is_loopback = ipaddress.ip_address(own).is_loopback
    store.set(f"start/address_seen_by/{rank}", "" if is_loopback else master)
    if is_loopback:
        seen = (store.get(f"start/address_seen_by/{other}").decode() for other in range(size))
        own = next(filter(None, seen), own)
    interface = interface_of(own)
    if interface:
        environment["GLOO_SOCKET_IFNAME"] = interface


def addresses_towards(host):
    """(address of this host by which it would send to `host`, the address of `host`)."""
    family, kind, protocol, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as s:
        s.connect(place)  # of a datagram socket: chooses a route and sends nothing
        return s.getsockname()[0].split("%")[0], place[0].split("%")[0]


def interface_of(address):
    """The name of the network card that has an IP address; None if there is none, or if the system
    does not tell, as only Linux does.
    """
    if sys.platform != "linux":
        return None
    import fcntl  # Windows has none
    wanted = ipaddress.ip_address(address)
    if wanted.version == 6:
        path = Path("/proc/net/if_inet6")
        lines = path.read_text().splitlines() if path.exists() else []
        fields = [line.split() for line in lines]
        return next((f[-1] for f in fields if int(f[0], 16) == int(wanted)), None)
    for _, name in socket.if_nameindex():
        request = struct.pack("256s", name.encode())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, contextlib.suppress(OSError):
            answer = fcntl.ioctl(s, 0x8915, request)  # SIOCGIFADDR of <linux/sockios.h>
            if answer[20:24] == wanted.packed:
                return name
    return None


# -----------------------------------------------------------------------------
# collectives: every rank has to call them


def any_rank(flag, world):
    """Whether the flag is true on any rank; every rank has to call it."""
    if world.size == 1:
        return flag
    total = torch.tensor(float(flag))
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return total.item() > 0


def share_from_rank0(value, world):
    """The value that rank 0 has, on every rank; anything that can be pickled."""
    if world.size == 1:
        return value
    message = [value]
    dist.broadcast_object_list(message, src=0)
    return message[0]


def gather_from_all(value, world):
    """Each rank's value, a list in the order of ranks, on every rank. Collective."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def require_equal(facts, world):
    """Raise UserError on every rank if any rank has other facts than rank 0. Collective.

    facts: {what it is: value}, with the same keys on every rank.
    """
    if world.size == 1:
        return
    expected = share_from_rank0(facts, world)
    differing = [name for name in facts if facts[name] != expected[name]]
    mine = None
    if differing:
        name = differing[0]
        mine = f"{name} is {facts[name]} on rank {world.rank}, but {expected[name]} on rank 0"
    found = [text for text in gather_from_all(mine, world) if text]
    if found:
        raise UserError(f"{found[0]}: start all hosts with the same flags and the same data")


# -----------------------------------------------------------------------------
# nests


def map_leaves(nest, function):
    """The same nest of dicts, lists and tuples, every leaf replaced by function(leaf)."""
    return map_named(nest, lambda leaf, name: function(leaf))


def map_named(nest, function, name=""):
    """The same nest, every leaf replaced by function(leaf, name).

    A leaf's name is made of the keys that lead to it, such as "model.lm_head.weight".
    """
    if isinstance(nest, dict):
        return {key: map_named(value, function, f"{name}{key}.") for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        items = [map_named(value, function, f"{name}{i}.") for i, value in enumerate(nest)]
        return type(nest)(items)
    return function(nest, name[:-1])


# -----------------------------------------------------------------------------
# from rank 0 to the others, one tensor at a time: pickling the whole nest, as
# broadcast_object_list does, would hold three to four copies of it in memory


@dataclass(frozen=True)
class TensorPlace:
    """Stands for a tensor of a nest whose tensors are sent separately."""

    index: int
    shape: torch.Size
    dtype: torch.dtype


def split_tensors(nest):
    """(skeleton, tensors): the nest with a TensorPlace for each tensor, and the list of tensors.

    A tensor that stands in several places is listed once.
    """
    tensors, places = [], {}

    def replace_tensor(leaf):
        if not torch.is_tensor(leaf):
            return leaf
        key = leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype
        if leaf.numel() == 0 or key not in places:
            places[key] = TensorPlace(len(tensors), leaf.shape, leaf.dtype)
            tensors.append(leaf.detach())
        return places[key]

    return map_leaves(nest, replace_tensor), tensors


def broadcast_nest(nest, rank, keep_own=False):
    """Rank 0's nest, on every process. Its tensors must lie in CPU memory.

    Collective: every process calls it. A process with keep_own takes part, because a broadcast
    needs all of them, and returns the nest that it passed in.
    """
    skeleton, tensors = split_tensors(nest) if rank == 0 else (None, [])
    places = [TensorPlace(i, tensor.shape, tensor.dtype) for i, tensor in enumerate(tensors)]
    message = [(skeleton, places)]
    dist.broadcast_object_list(message, src=0)
    skeleton, places = message[0]

    received = []
    for place in places:
        if rank == 0:
            tensor = tensors[place.index].contiguous()
        else:
            tensor = torch.empty(place.shape, dtype=place.dtype)
        if tensor.numel() > 0:
            # as bytes: the same for every dtype, including those that gloo does not know
            dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)
        received.append(None if keep_own else tensor)
    if rank == 0 or keep_own:
        return nest

    def fill_place(leaf):
        return received[leaf.index] if isinstance(leaf, TensorPlace) else leaf

    return map_leaves(skeleton, fill_place)


# -----------------------------------------------------------------------------
# sharded tensors


def is_sharded(tensor):
    """Whether a tensor is sharded, a DTensor. While nobody has imported that class, which takes
    seconds, no tensor is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor):
    """The whole of a tensor that may be sharded. Collective if it is: every process calls it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_rows(tensor, mesh):
    """The rows of a whole tensor that this rank keeps: torch.chunk along the first dimension."""
    chunks = tensor.chunk(mesh.size(-1))
    rank = mesh.get_local_rank(mesh.ndim - 1)
    return chunks[rank] if rank < len(chunks) else tensor[:0]


def shard_like(tensor, parameter):
    """This rank's part of a whole tensor, laid out as the parameter is: a DTensor like it.

    The tensor itself is returned if the parameter is not sharded or has another shape (a step
    count has). Nothing is copied from an empty tensor on the meta device.
    """
    if not is_sharded(parameter) or tensor.shape != parameter.shape:
        return tensor
    part = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
    if not tensor.is_meta:
        part.to_local().copy_(own_rows(tensor, parameter.device_mesh))
    return part


# -----------------------------------------------------------------------------
# signals


class StopSignal:
    """Remembers that SIGTERM or SIGINT came; the second signal ends the process at once.

    Under torchrun a second SIGTERM is ignored: Slurm, systemd and pkill signal the processes and
    torchrun, which passes the signal on to the processes. A second Ctrl-C ends them even then.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, world=World(), on_signal=lambda: None):
        """on_signal: called in the signal handler; it may set a flag, and take no lock."""
        self.world, self.on_signal = world, on_signal
        self.received = False
        self.previous = {}

    def on_any_rank(self):
        """Whether a signal came to any rank; every rank has to call it."""
        return any_rank(self.received, self.world)

    def __enter__(self):
        for number in self.SIGNALS:
            self.previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # the log is not closed yet
                signal.signal(number, handler)

    def _on_signal(self, number, frame):
        self.received = True
        self.on_signal()
        has_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        signal.signal(signal.SIGTERM, signal.SIG_IGN if has_torchrun else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


# -----------------------------------------------------------------------------
# who is missing after a failed exchange


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
    """The ranks that do not sign within a few seconds; none if the store can't be reached."""
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
        time.sleep(POLL_INTERVAL)
    return sorted(missing)
