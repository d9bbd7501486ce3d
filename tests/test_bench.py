"""bench.py measures what it says it measures. Nothing here asserts how fast anything is.

    python -m pytest tests/test_bench.py
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import command, english, environment, run, write_dataset

from benches import decoding, gpu, parts, training, turns
from benches.samples import judge_python
from gptlib.common import UserError
from train_gpt2 import GPT, GPTConfig


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
    (fail, "ValueError: no such thing"),
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
    assert parts.last_lines(TORCHRUN_REPORT, 1) == "ValueError: the real reason"
    assert parts.last_lines("a\n\nb\nc\n", 2) == "b\nc"
    assert parts.last_lines("") == ""


# -----------------------------------------------------------------------------
# bench.py gpu, on a CPU


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_a_rehearsal_of_the_gpu_bench_runs_every_part(tmp_path):
    """Guards against a script that fails for the first time on a rented GPU."""
    write_dataset(tmp_path / "data", [english(30001, 1)], [english(3000, 2)])
    example = dict(ctx="the cat", endings=[" sat", " ran", " home", " mat"], label=0)
    (tmp_path / "examples.jsonl").write_text(json.dumps(example) + "\n")
    argv = command("bench.py", "gpu", "--out=figures", "--presets", "demo", "gpt2", "--device=cpu",
                   "--rounds=1", "--streams", "1", "--length=3", "--batch_size=1",
                   "--block_size=32", "--micro_steps=1", "--data_root=data",
                   "--hellaswag_data=examples.jsonl", "--seconds=3000")
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), text=True, capture_output=True)
    results = results_of(done, "gpu")
    assert results["failed"] == results["left_out"] == {}
    measured = results["parts"]
    assert list(measured) == [
        "variants", "optimizers", "run", "training, micro-batch doubled", "training gpt2",
        "training gpt2, recomputed", "decoding demo x 1", "decoding gpt2 x 1", "serving",
        "checkpoint"]
    assert list(measured["variants"]["turns"]) == list(gpu.VARIANTS)
    assert "failed" not in str(measured["variants"]["rows"])
    assert measured["optimizers"]["seconds"].keys() == {"adamw", "muon"}
    text = measured["run"]["rows"]["train_gpt2.py, 25 steps"]
    for what in ("val", "hella", "samples", "kill -9"):
        assert what in text
    table = (tmp_path / "figures" / "gpu.md").read_text()
    for name, part in measured.items():
        for what, text in part["rows"].items():
            assert f"| {name} | {what} | {text} |" in table
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == {"gpu.json", "gpu.md", "kernels.txt", "train.jsonl"}


def test_gpu_says_what_it_left_out(tmp_path):
    """Guards against a budget that is overrun, and parts that vanish without a word."""
    done = run("bench.py", "gpu", "--out=figures", "--device=cpu", "--seconds=1",
               "--parts", "optimizers", "training", cwd=tmp_path)
    results = results_of(done, "gpu")
    assert results["parts"] == results["failed"] == {}
    assert list(results["left_out"]) == [
        "optimizers", "training, micro-batch doubled", "training gpt2-medium",
        "training gpt2-large", "training gpt2-xl", "training gpt2-xl, recomputed"]
    table = (tmp_path / "figures" / "gpu.md").read_text()
    assert "| training gpt2-xl | | left out: " in table


def test_gpu_names_a_failed_part_and_continues(tmp_path, monkeypatch):
    """Guards against an hour on a GPU that ends at the first part that does not work there."""
    def fail(seconds):
        raise UserError("no | memory\nand more")

    def fine(seconds):
        return dict(rows={"a step": "fine"}, files={"kernels.txt": "a kernel"})

    jobs = [("run", "bad", 1, fail), ("serving", "not asked for", 1, fail),
            ("training", "good", 1, fine), ("training", "long", 2000, fail)]
    monkeypatch.setattr(gpu, "jobs", lambda args: jobs)
    results = gpu.bench_gpu(SimpleNamespace(out=tmp_path / "new", device="cpu", dtype="auto",
                                            parts=["run", "training"], seconds=1000))
    assert results["failed"] == {"bad": "no | memory"}
    assert list(results["parts"]) == ["good"]
    assert list(results["left_out"]) == ["long"]
    assert json.loads((tmp_path / "new" / "gpu.json").read_text()) == results
    assert (tmp_path / "new" / "kernels.txt").read_text() == "a kernel"
    table = (tmp_path / "new" / "gpu.md").read_text()
    assert "| bad | | **failed**: no / memory |" in table
    assert "| good | a step | fine |" in table


def sleep():
    time.sleep(60)


def test_a_part_that_hangs_is_ended(monkeypatch):
    """Guards against a hung kernel that holds up the parts after it."""
    monkeypatch.setattr(turns.ContenderProcess, "GRACE_SECONDS", 0.1)
    t0 = time.perf_counter()
    with pytest.raises(UserError, match="not finished after 0.1 seconds"):
        turns.run_alone(0.1, sleep)
    assert time.perf_counter() - t0 < 50


def leave_a_child(path):
    path.write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
    raise ValueError("out of memory")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_decoding_is_measured_without_transformers(device, monkeypatch):
    """Guards against a part of bench.py gpu that fails where transformers is not installed."""
    def missing(*shape, **options):
        raise ModuleNotFoundError("No module named 'transformers'")

    monkeypatch.setattr(decoding, "decode_transformers", missing)
    args = SimpleNamespace(peer=[], length=2)
    device = torch.device(device)
    assert decoding.peer_contenders(args, None, [1], 1, device, torch.float32) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_part_that_fails_leaves_no_server(tmp_path):
    """Guards against a server that keeps the GPU's memory from the parts after it."""
    with pytest.raises(UserError, match="out of memory"):
        turns.run_alone(100, leave_a_child, tmp_path / "pid")
    stat = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    with contextlib.suppress(FileNotFoundError):
        while stat.read_text().split()[2] != "Z":  # killed, but nobody has asked for its code
            time.sleep(0.01)


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


def test_variants_set_options_that_exist():
    """Guards against a variant that is the same step as before under another name."""
    from torch._inductor import config
    for variant in gpu.VARIANTS.values():
        for name in variant.get("inductor", {}):
            assert getattr(config, name) is False, name
        if "attention" in variant:
            assert hasattr(torch.backends.cuda, f"enable_{variant['attention']}_sdp")


def test_a_bfloat16_stream_is_the_same_model(monkeypatch):
    """Guards against a stream that stays in float32, or that changes what the model computes."""
    config = GPTConfig(16, 64, 2, 2, 32)
    monkeypatch.setattr(training, "GPT", GPT)
    gpu.use_variant(stream=torch.bfloat16)
    plain, model = GPT(config), training.GPT(config)
    model.load_state_dict(plain.state_dict())
    dtypes = []
    model.transformer.ln_f.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    idx = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = plain(idx, idx)
        _, loss = model(idx, idx)
    assert dtypes == [torch.bfloat16]
    assert loss.item() != expected.item()
    assert loss.item() == pytest.approx(expected.item(), abs=0.01)


def test_decoding_reports_its_traffic():
    """Guards against bytes of one stream that are counted for each of many."""
    results = [dict(name="inference.py", median=200.0), dict(name="--quantize int8", median=1.0)]
    decoding.show_traffic(results, streams=8, n_bytes=2 * 10**9, bandwidth=10**11)
    assert results[0]["microseconds"] == pytest.approx(40_000)
    assert results[0]["GB/s"] == pytest.approx(50)
    assert "GB/s" not in results[1]


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


def test_training_is_measured_beside_a_peer(tmp_path, monkeypatch):
    """Guards against a peer that is executed instead of read, and ratios to the wrong contender."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling took most of two minutes here
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "train_gpt2.py").write_text(PEER)
    done = run("bench.py", "train", "--preset=demo", "--peer=peer", "--rounds=1", "--batch_size=1",
               "--block_size=16", "--device=cpu", cwd=tmp_path)
    (title, rows), = results_of(done, "train").items()
    assert "1 x 1 x 16 tokens" in title
    assert rows[0]["name"] == "train_gpt2.py"
    assert rows[-1]["name"] == "peer, eager"
    assert rows[-1]["ratio"] == 1
    for row in rows:
        assert 0 < row["low"] <= row["median"] <= row["high"]
        assert row["mfu"] > 0


def test_on_a_gpu_contenders_do_not_share_its_memory(tmp_path):
    """Guards against four programs of 29 to 60 GiB that are all alive on one card of 80."""
    (tmp_path / "train_gpt2.py").write_text(PEER)
    args = SimpleNamespace(device="cpu", dtype="float32", preset="demo", batch_size=1, rounds=2,
                           block_size=16, micro_steps=2, peer=[str(tmp_path)])
    contenders = training.training_contenders(args, cuda=True)
    name = tmp_path.name
    assert list(contenders) == ["train_gpt2.py", "same model, plain torch.compile",
                                f"{name}, torch.compile", f"{name}, eager"]
    uncompiled = {"train_gpt2.py": (training.training_ours, args, False),
                  "peer, eager": contenders[f"{name}, eager"]}
    ours, peer = training.measure_alone(uncompiled)
    assert ours["ms"] == pytest.approx(1000 * 16 / ours["median"])
    assert ours["ratio"] == pytest.approx(ours["median"] / peer["median"])
    row = dict(name="peer, eager", ms=178.04, median=368193.0, mfu=0.318, peak_bytes=59.6 * 2**30)
    table = training.training_table([row])
    assert table.splitlines()[-1] == "| peer, eager | 178.0 | 368,193 | 31.8% | 59.6 |"


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
    (["gpu"], "name it with --out"),
])
def test_a_mistake_gets_one_line(tmp_path, argv, message):
    """Guards against a traceback for what the user can fix, or figures that are written nowhere."""
    done = run("bench.py", *argv, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr, done.stderr


# -----------------------------------------------------------------------------
# samples


@pytest.mark.parametrize("text, verdict", [
    ("def f(x):\n    return x\n", "compiles"),
    ("", "compiles"),
    ("def f(x):\n", "unfinished"),
    ("x = [1,\n", "unfinished"),
    ('def f():\n    """Half a doc', "unfinished"),
    ("def f(x:\n    return x\n", "wrong"),
    ("def f(x):\nreturn x\n", "wrong"),
    ("x = 1\n  y = 2\n", "wrong"),
    ("x = 'half\ny = 1\n", "wrong"),
    ("\0", "wrong"),
])
def test_what_counts_as_python(text, verdict):
    """Guards against a judge that is too kind, or that calls an open bracket at the end an
    error."""
    assert judge_python(text, is_cut=False) == verdict


def test_the_last_line_of_a_sample_that_was_cut():
    """Guards against a sample that is judged by its last line, in the middle of which it ends."""
    assert judge_python("x = 1\ny = = 2", is_cut=True) == "compiles"
    assert judge_python("x = 1\ny = = 2", is_cut=False) == "wrong"
    assert judge_python("x = = 1\ny = 2", is_cut=True) == "wrong"


def test_shares_of_a_real_model(checkpoint, tmp_path):
    """Guards against shares that do not add up, or are of other samples than were asked for."""
    done = run("bench.py", "samples", f"--checkpoint_path={checkpoint}", "--num_samples=3",
               "--device=cpu", cwd=tmp_path)
    results = results_of(done, "samples")
    assert [r["temperature"] for r in results] == [0.0, 0.4, 0.6, 0.8, 1.0]
    assert [r["samples"] for r in results] == [1, 3, 3, 3, 3]
    for r in results:
        assert r["compiles"] + r["unfinished"] + r["wrong"] == pytest.approx(1)
