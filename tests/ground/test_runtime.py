"""Processes, devices, precision and signals.

    python -m pytest tests/ground/test_runtime.py
"""

import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import command, environment

from gptlib import distributed
from gptlib.common import UserError, print0
from gptlib.distributed import StopSignal, World, interface_of, join, read_ranks
from gptlib.runtime import (
    git_commit, nondeterministic_algorithms, prepare_attention, prepare_device,
)


def handlers():
    return [signal.getsignal(number) for number in StopSignal.SIGNALS]


def test_handlers_are_restored_after_an_error():
    """Guards against a failed run that leaves its signal handlers, after which Ctrl-C ends nothing.
    """
    before = handlers()
    with pytest.raises(ZeroDivisionError):
        with StopSignal():
            assert handlers() != before
            raise ZeroDivisionError
    assert handlers() == before


@pytest.fixture
def torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a signalled process of torchrun keeps it off


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_torchruns_own_sigterm_is_no_second_one(torchrun, number):
    """Guards against a save that is lost because Slurm signals the processes and torchrun, which
    passes the signal on."""
    with StopSignal() as stop_signal:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signal.received
        assert handlers() == [signal.SIG_IGN, signal.SIG_DFL], "a second Ctrl-C does not end it"
    os.kill(os.getpid(), signal.SIGTERM)  # the log is still to be closed


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_the_first_signal_is_remembered_only(number):
    """Guards against a first signal that ends the process before the step is saved, or a second one
    that does not."""
    before = handlers()
    with StopSignal() as stop_signal:
        assert not stop_signal.received
        os.kill(os.getpid(), number)
        assert stop_signal.received
        assert handlers() == [signal.SIG_DFL, signal.SIG_DFL]
    assert handlers() == before


@pytest.fixture
def settings_of_torch(monkeypatch):
    """What prepare_device sets, recorded instead of done: {setting: value}."""
    found = {}

    def set_deterministic(enabled, warn_only=False):
        found.update(enabled=enabled, warn_only=warn_only)

    def set_precision(precision):
        found["precision"] = precision

    def set_device(device):
        found["device"] = device

    monkeypatch.setattr(torch, "use_deterministic_algorithms", set_deterministic)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_precision)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # removed or restored at the end
    return found


def test_deterministic_on_cuda_is_strict_and_without_tf32(settings_of_torch):
    """Guards against a warning alone, with which flash attention keeps a backward pass that varies.
    """
    device = torch.device("cuda", 3)
    prepare_device(device, deterministic=True)
    assert settings_of_torch == dict(enabled=True, warn_only=False, precision="highest",
                                     device=device)


def test_cuda_is_fast_unless_determinism_is_asked_for(settings_of_torch):
    """Guards against runs on CUDA that pay for a determinism which only --deterministic asks for.
    """
    device = torch.device("cuda", 3)
    prepare_device(device)
    assert settings_of_torch == dict(precision="high", device=device)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_cpu_is_deterministic_with_warnings(settings_of_torch, deterministic):
    """Guards against a CPU run that ends at a kernel which only CUDA has in a deterministic form.
    """
    try:
        prepare_device(torch.device("cpu"), deterministic)
        assert torch.get_deterministic_debug_mode() == 1  # warn
    finally:
        torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("dtype, block_size, has_bfloat16, is_flash", [
    (torch.bfloat16, 128, True, False), (torch.bfloat16, 128, False, True),
    (torch.bfloat16, 256, True, True), (torch.float32, 128, True, True)])
def test_attention_of_short_contexts_multiplies_matrices(monkeypatch, dtype, block_size,
                                                         has_bfloat16, is_flash):
    """Guards against steps of the demo that take an eighth longer, against the memory of whole
    score matrices where contexts are long, and against products that a CPU has no instructions
    for."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, block_size, 16, generator=generator) for _ in range(3))
    kernels = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kernels.append(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    try:
        prepare_attention(cpu, dtype, block_size)
        with Record():
            y = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype),
                                               is_causal=True)
    finally:
        prepare_attention(cpu, torch.float32, 1024)
    assert ("_scaled_dot_product_flash_attention_for_cpu" in kernels) == is_flash
    scores = (q @ k.mT / 4).masked_fill(torch.ones(block_size, block_size).triu(1) > 0, -torch.inf)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(y.float(), scores.softmax(-1) @ v, rtol=0, atol=tolerance)


@pytest.mark.parametrize("enabled,warn_only", [(True, False), (True, True), (False, False)])
def test_sampling_restores_determinism_after_an_error(enabled, warn_only):
    """Guards against failed samples that leave the rest of the run without determinism."""
    def mode():
        return (torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled())

    before = mode()
    try:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        with pytest.raises(ZeroDivisionError):
            with nondeterministic_algorithms():
                assert mode()[0] is False
                raise ZeroDivisionError
        assert mode() == (enabled, warn_only)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# -----------------------------------------------------------------------------
# joining the processes of torchrun


@pytest.fixture
def calls(monkeypatch):
    """The calls of torch that join() makes as rank 5 of 8, in their order, without its peers."""
    calls = []
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8"),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)

    def record(owner, name):
        def call(*args, **options):
            calls.append((name, *args))
            if "timeout" in options:
                calls.append(("timeout", options["timeout"]))
        monkeypatch.setattr(owner, name, call)

    record(dist, "init_process_group")
    record(dist, "destroy_process_group")
    record(distributed, "join_store")
    record(distributed, "check_exchange")
    record(torch.cuda, "set_device")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    return calls


@pytest.mark.parametrize("has_cuda, backend", [(False, "gloo"), (True, "cpu:gloo,cuda:nccl")])
def test_joining_calls_torch_in_this_order(monkeypatch, calls, has_cuda, backend):
    """Guards against gloo's timeout of half an hour, against contexts of all ranks on GPU 0, and
    against a broken link that shows when data and model have been made."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    device = torch.device("cuda", 1) if has_cuda else torch.device("cpu")
    with join() as world:
        assert world == World(rank=5, local_rank=1, size=8)
        before = list(calls)
    assert before == [
        *([("set_device", device)] if has_cuda else []), ("join_store", 5, 8),
        ("init_process_group", backend), ("timeout", timedelta(minutes=10)),
        ("check_exchange", device, 8)]


@pytest.mark.parametrize("name", ["cuda:0", "cuda:1"])
def test_one_gpu_for_all_processes_is_refused(monkeypatch, calls, name):
    """Guards against eight processes that train on one GPU while seven idle."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=f"--device {name} names one GPU for all processes"):
        with join(name):
            pass
    assert calls == [], "the processes met before the flag was refused"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join(name):  # one process may choose its GPU
        assert ("set_device", torch.device(name)) in calls


@pytest.mark.parametrize("variables", [
    dict(RANK="3", WORLD_SIZE="4"),  # Kubeflow
    dict(RANK="abc", LOCAL_RANK="0", WORLD_SIZE="1"),
    dict(RANK="0", LOCAL_RANK="", WORLD_SIZE="2"),
    dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="-2"),
    dict(RANK="2", LOCAL_RANK="0", WORLD_SIZE="2"),
    dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR=""),
    dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_PORT="any"),
])
def test_a_partial_environment_names_torchrun(variables):
    """Guards against a KeyError on clusters that set some of torchrun's variables."""
    environment = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", **variables}
    with pytest.raises(UserError, match=f"RANK={variables['RANK']}, .* with torchrun"):
        read_ranks(environment)


def test_a_partial_environment_is_one_line_of_the_command(tmp_path):
    """Guards against a message that no function on the way to the user lets through."""
    env = {**environment(), "RANK": "3", "WORLD_SIZE": "4"}
    done = subprocess.run(command("train_gpt2.py", "--preset=demo"), cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "Start the script with torchrun" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_an_empty_rank_means_alone(monkeypatch, capsys):
    """Guards against a run without a word, of which every line is left to a rank 0 elsewhere."""
    monkeypatch.setenv("RANK", "")
    with join() as world:
        assert world == World()
    print0("printed")
    assert "printed" in capsys.readouterr().out


@pytest.mark.parametrize("variables, warnings", [
    (dict(SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0"), 1),
    (dict(SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1"), 0),  # its first task has said it
    (dict(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="0"), 1),
    (dict(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"), 0),
    (dict(SLURM_NTASKS="2", SLURM_PROCID="0"), 0),  # in the batch script, which is one process
    ({}, 0),
])
def test_tasks_that_train_apart_are_told(monkeypatch, capsys, variables, warnings):
    """Guards against `srun python train_gpt2.py`, which trains the same model in each task."""
    monkeypatch.delenv("RANK", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with join():
        pass
    assert capsys.readouterr().err.count("one torchrun on each host") == warnings


# -----------------------------------------------------------------------------
# the network card


def test_the_card_of_an_address_is_found():
    """Guards against a search that finds no card, or any card, whatever the address is."""
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("198.51.100.7") is None  # nobody's: kept for documents


@pytest.fixture
def network(monkeypatch):
    """Two hosts of two ranks, 10.0.0.1 and 10.0.0.2; host1 takes its own name for 127.0.1.1.

    Returns a function (MASTER_ADDR, seen by) -> the variable GLOO_SOCKET_IFNAME of each rank.
    """
    cards = {"127.0.0.1": "lo", "10.0.0.1": "eth1", "10.0.0.2": "eth2"}
    here = threading.local()

    def addresses(name):
        if name in cards:  # an address, and no name
            return ("127.0.0.1" if name == "127.0.0.1" else f"10.0.0.{here.host}"), name
        own = f"10.0.0.{here.host}"
        return ("127.0.0.1", "127.0.1.1") if name == f"host{here.host}" else (own, "10.0.0.1")

    monkeypatch.setattr(distributed, "addresses_towards", addresses)
    monkeypatch.setattr(distributed, "interface_of", cards.get)

    def choose(master, **variables):
        store = dist.HashStore()

        def of_rank(rank):
            here.host = 1 + rank // 2
            env = {"MASTER_ADDR": master, "LOCAL_WORLD_SIZE": "2", **variables}
            distributed.choose_interface(store, rank, 4, env)
            return env.get("GLOO_SOCKET_IFNAME")

        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(of_rank, range(4), timeout=60))

    return choose


@pytest.mark.parametrize("master, variables, expected", [
    ("10.0.0.1", {}, ["eth1", "eth1", "eth2", "eth2"]),
    ("host1", {}, ["eth1", "eth1", "eth2", "eth2"]),
    ("127.0.0.1", {}, ["lo"] * 4),  # two torchruns on one machine
    ("host1", dict(GLOO_SOCKET_IFNAME="ib0"), ["ib0"] * 4),
    ("host1", dict(LOCAL_WORLD_SIZE="4"), [None] * 4),
], ids=["address", "name", "loopback", "the user's", "one host"])
def test_each_host_uses_the_card_that_reaches_the_others(network, master, variables, expected):
    """Guards against gloo on 127.0.1.1, which is what Debian's /etc/hosts makes of a host's own
    name: the other hosts cannot connect."""
    assert network(master, **variables) == expected


# -----------------------------------------------------------------------------
# the first exchange


class Work:
    def __init__(self, completed):
        self.completed = completed

    def is_completed(self):
        return self.completed

    def wait(self):
        pass


@pytest.mark.parametrize("completed, total, message", [
    (False, 4.0, "have not exchanged one number between cpu devices"),
    (True, 3.0, "added up a 1 of each, and found 3")])
def test_a_broken_link_is_found_at_the_start(monkeypatch, completed, total, message):
    """Guards against links between GPUs that hang or lie, found after minutes of preparation."""
    def all_reduce(tensor, async_op):
        tensor.fill_(total)
        return Work(completed)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed, "FIRST_EXCHANGE_SECONDS", 0)
    with pytest.raises(UserError, match=message):
        distributed.check_exchange(torch.device("cpu"), 4)


def test_the_commit_of_an_image_without_git(monkeypatch):
    """Guards against a run in a container whose report says that its commit is unknown."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("GIT_COMMIT", "0123abc")
    assert git_commit() == "0123abc"
