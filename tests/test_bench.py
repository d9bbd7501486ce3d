"""bench.py measures what it says it measures. Nothing here asserts how fast anything is.

    python -m pytest tests/test_bench.py
"""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import run

from benches import gpu, processes, turns
from gptlib.common import UserError


def results_of(done, name):
    """What a run of bench.py printed as its last line, for one bench."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["results"][name]


# -----------------------------------------------------------------------------
# turns and processes


def test_ratios_are_medians_of_pairs(monkeypatch):
    """Guards against ratios of medians, and a first turn that counts: it warms up."""
    clock = iter([0, 0,  # warming up
                  0, 1, 0, 2,  # 10 / s and 5 / s: x 2
                  0, 2, 0, 2,  # 5 / s and 5 / s: x 1
                  0, 5, 0, 40])  # 2 / s and 0.25 / s: x 8
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock))
    ours, peer = turns.take_turns({"ours": lambda: 10, "peer": lambda: 10}, 3, "tok")
    assert ours == dict(name="ours", unit="tok/s", median=5, low=2, high=10, ratio=2)
    assert peer == dict(name="peer", unit="tok/s", median=5, low=0.25, high=5, ratio=1)


def report_process(amount):
    return lambda: (amount, os.getpid())


def fail():
    raise ValueError("no such thing")


def die():
    os._exit(7)


def test_contenders_run_in_separate_processes():
    """Guards against contenders that share an allocator, threads or a compiler."""
    contenders = dict(a=(report_process, 1), b=(report_process, 2))
    with turns.separate_processes(**contenders) as works:
        a, process_of_a = works["a"]()
        b, process_of_b = works["b"]()
        assert (a, b) == (1, 2)
        assert len({process_of_a, process_of_b, os.getpid()}) == 3
        assert works["a"]() == (1, process_of_a)


@pytest.mark.parametrize("contender, message", [
    (fail, "fail: no such thing"),
    (die, "exit code 7"),
])
def test_a_contender_that_fails_says_why(contender, message):
    """Guards against a lost reason, and against waiting for ever for a process that has died."""
    with pytest.raises(UserError, match=message), turns.separate_processes(a=(contender,)):
        pass


# -----------------------------------------------------------------------------
# failures of child processes

TORCHRUN_REPORT = """\
Traceback (most recent call last):
ValueError: the real reason
E1121 15:00:00 torch/distributed/elastic/multiprocessing/api.py:882] failed (exitcode: 1)
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError
"""


def test_the_reason_comes_before_torchruns_report():
    """Guards against fifty lines of torchrun that hide why its worker failed."""
    assert turns.last_lines(TORCHRUN_REPORT, 1) == "ValueError: the real reason"
    assert turns.last_lines("a\n\nb\nc\n", 2) == "b\nc"
    assert turns.last_lines("") == ""


def test_processes_says_why_a_worker_failed(tmp_path, monkeypatch):
    """Guards against `bench.py processes` that names an exit code and hides the worker's error."""
    script = "import sys\nsys.exit('error: this GPU is on fire')\n"
    (tmp_path / "train_gpt2.py").write_text(script)
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    with pytest.raises(UserError) as e:
        processes.bench_processes(SimpleNamespace(rounds=1))
    assert "train_gpt2.py" in str(e.value)
    assert "error: this GPU is on fire" in str(e.value)
    assert len(str(e.value).splitlines()) <= 11


# -----------------------------------------------------------------------------
# bench.py gpu, its flow on a CPU


def test_gpu_names_a_failed_part_and_continues(tmp_path):
    """Guards against an hour on a GPU that ends at the first part that does not work there."""
    done = run("bench.py", "gpu", "--out=figures", "--presets", "demo", "--device=cpu",
               "--rounds=1", "--streams", "2", "--length=3", "--batch_size=1", "--block_size=32",
               "--hellaswag_data=nowhere.jsonl", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: 1 parts failed: HellaSwag"
    results = json.loads((tmp_path / "figures" / "gpu.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1])["results"]["gpu"] == results
    assert list(results["failed"]) == ["HellaSwag"]
    assert "nowhere.jsonl" in results["failed"]["HellaSwag"]
    expected = ["training demo", "profile of demo", "decoding, 2 at once", "save and resume"]
    assert list(results["parts"]) == expected
    training = results["parts"]["training demo"]
    assert training["step_tokens"] == 32
    assert training["tokens_per_second"] == pytest.approx(32 / training["step_seconds"])
    assert results["parts"]["profile of demo"]["milliseconds"]["matrix products"] > 0
    table = (tmp_path / "figures" / "gpu.md").read_text()
    for name in expected:
        assert f"| {name} | {results['parts'][name]['summary']} |" in table
    assert "| HellaSwag | **failed**: " in table
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"gpu.json", "gpu.md"}


def test_gpu_needs_a_folder(tmp_path):
    """Guards against ten minutes whose figures are nowhere."""
    done = run("bench.py", "gpu", cwd=tmp_path)
    assert done.returncode == 1
    assert "name it with --out" in done.stderr


def sleep():
    time.sleep(60)


def test_a_part_that_hangs_is_ended(monkeypatch):
    """Guards against a hung kernel that holds up the parts after it."""
    monkeypatch.setattr(gpu, "GPU_PART_TIMEOUT", 0.1)
    monkeypatch.setattr(turns.ContenderProcess, "GRACE_SECONDS", 0.1)
    t0 = time.perf_counter()
    with pytest.raises(UserError, match="not finished after 0.1 seconds"):
        gpu.run_part(sleep)
    assert time.perf_counter() - t0 < 50


@pytest.mark.parametrize("name, kind", [
    ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
    ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
    ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
    ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
    ("triton_red_fused__log_softmax_nll_loss_forward_0", "fused by the compiler"),
    ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
    ("Memcpy DtoH (Device -> Pageable)", "copies"),
    ("aten::gelu", "other"),
])
def test_kernels_are_sorted_by_kind(name, kind):
    """Guards against a profile that counts attention, whose names mention cutlass, as products."""
    assert gpu.kernel_kind(name) == kind


def test_state_differs_by_a_bit():
    """Guards against a resume that is called equal because nothing was compared."""
    state = dict(model=dict(w=torch.zeros(3)), optimizer=[dict(step=1, m=torch.ones(2))])
    same = dict(model=dict(w=torch.zeros(3)), optimizer=[dict(step=1, m=torch.ones(2))])
    assert gpu.same_state(state, same)
    same["optimizer"][0]["m"][1] += 1e-6
    assert not gpu.same_state(state, same)
    assert not gpu.same_state(state, dict(model=state["model"]))
    assert not gpu.same_state([state, state], [state])


# -----------------------------------------------------------------------------
# the benches

PEER = """
from dataclasses import dataclass
import torch.nn as nn

raise SystemExit("this trains at import, and must not be run")

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, 4)
    def forward(self, x, y):
        logits = self.wte(x) @ self.wte.weight.t()
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


def test_training_is_measured_beside_a_peer(tmp_path):
    """Guards against a peer that is executed instead of read, and ratios to the wrong contender."""
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "train_gpt2.py").write_text(PEER)
    done = run("bench.py", "train", "--preset=demo", "--peer=peer", "--rounds=1", "--batch_size=1",
               "--block_size=16", "--device=cpu", cwd=tmp_path)
    results = results_of(done, "train")
    loader = results.pop("loader")
    (title, rows), = results.items()
    assert "1 x 1 x 16 tokens" in title
    assert rows[0]["name"] == "train_gpt2.py"
    assert rows[-1]["name"] == "peer, eager"
    assert rows[-1]["ratio"] == 1
    assert loader["tok/s"] > 0
    for row in rows:
        assert 0 < row["low"] <= row["median"] <= row["high"]
        assert row["mfu"] > 0


def test_a_checkpoint_is_measured_and_removed(tmp_path):
    """Guards against gigabytes that a benchmark leaves behind."""
    done = run("bench.py", "checkpoint", "--preset=demo", "--rounds=1", "--device=cpu",
               cwd=tmp_path)
    (title, rows), = results_of(done, "checkpoint").items()
    assert "checkpoint of demo" in title
    assert len(rows) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv, message", [
    (["train", "--peer=nowhere"], "--peer nowhere is no checkout of build-nanogpt or nanoGPT"),
    (["train", "--rounds=0"], "--rounds is 0: expected at least 1"),
    (["hellaswag", "--hellaswag_data=nowhere.jsonl"], "nowhere.jsonl"),
    (["growth", "--picture=nowhere/growth.png", "--preset=demo", "--rounds=1"], "nowhere"),
])
def test_a_mistake_gets_one_line(tmp_path, argv, message):
    """Guards against a traceback for what the user can fix."""
    done = run("bench.py", *argv, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
