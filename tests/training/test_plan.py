"""What plan.py says: which flags to type, traffic, time, dollars, and the table in docs/large.md.

    python -m pytest tests/training/test_plan.py

tests/training/test_memory.py compares the memory that it prints with real steps.
"""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.distributed.run import get_args_parser

import plan as script
from gptlib.checkpoints.start import Start
from gptlib.data.tokenizer import dump_ranks
from gptlib.common import UserError
from gptlib.training.gpu_facts import (GPUS, MEASURED_MFU, find_gpu, peak_flops,
                                       published_mfu)
from gptlib.training.memory import model_sizes
from gptlib.training.parallel import Layout
from gptlib.training.presets import PRESETS
from plan import (PlanConfig, Run, choose, command, communication_seconds, largest_batch_size,
                  layout_of, measure_tokens_per_second, plan, preset_table, time_lines, traffic,
                  variants)
from train_gpt2 import GPT, GPTConfig, TrainConfig, create_model, parse_flags

GPT2_VOCABULARY = SimpleNamespace(n_vocab=50257)
H100 = find_gpu("H100").usable_bytes


def settings(**flags):
    small = dict(n_layer=4, n_head=4, n_embd=64, block_size=32, total_batch_size=4 * 32,
                 batch_size=4, compile=False)
    return TrainConfig(**{**small, **flags})


def create(cfg):
    return create_model(cfg, Start(), GPT2_VOCABULARY)


def sizes_of(cfg):
    with torch.device("meta"):
        return model_sizes(create(cfg))


def run_of(preset, ranks, budget=H100, **flags):
    """The Run of a preset on so many GPUs."""
    cfg = TrainConfig(**{**PRESETS[preset], **flags})
    return Run(sizes_of(cfg), layout_of(cfg), cfg.optimizer, cfg.total_batch_size, cfg.batch_size,
               ranks, budget)


# -----------------------------------------------------------------------------
# what fits, and what to type


def test_the_largest_power_of_two_that_fits():
    """Guards against a micro-batch that runs out of memory, or wastes half of the GPU."""
    run = run_of("gpt2-xl", 8)
    largest = largest_batch_size(run, run.layout)
    assert largest == 8
    assert run.fits(run.layout, largest)
    assert not run.fits(run.layout, 2 * largest)
    too_small = dataclasses.replace(run, budget=run.sizes.total)
    assert largest_batch_size(too_small, run.layout) == 0


@pytest.mark.parametrize("preset, ranks, flags, chosen, batch_size", [
    ("gpt2", 8, {}, "plain", 64),
    ("gpt2", 1, {}, "plain", 64),  # what the recipe has, though 128 fit
    ("gpt2", 64, {}, "plain", 8),  # a step has no more
    ("gpt2", 8, dict(recompute=True), "--recompute", 64),
    ("gpt2", 1, dict(shard=True), "plain", 64),  # one GPU has nothing to shard over
    ("gpt3-6.7b", 8, {}, "--shard", 2),
])
def test_the_cheapest_variant_that_fits_is_chosen(preset, ranks, flags, chosen, batch_size):
    """Guards against a plan that recomputes where nothing needs it, or drops a flag that was asked
    for."""
    choice = choose(run_of(preset, ranks, **flags))
    assert (choice.flags, choice.batch_size) == (chosen, batch_size)


def test_a_model_that_fits_nowhere():
    """Guards against a command for a run that is killed at its first step."""
    assert choose(run_of("gpt3-6.7b", 1)) is None


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_the_command_is_accepted(ranks):
    """Guards against flags to type that are refused, or that lose what the user asked for."""
    argv = ["--preset", "gpt2", "--max_lr", "1e-4", "--batch_size", "5", "--no-compile",
            "--log_dir", "batch_size"]
    choice = choose(run_of("gpt2", ranks))
    words = command(argv, choice, ranks).split()
    if ranks > 1:
        known = get_args_parser().parse_args(words[1:])
        hosts = int(known.nnodes.split(":")[-1])
        assert hosts * int(known.nproc_per_node) == ranks
        words = ["python", known.training_script, *known.training_script_args]
    assert words[:2] == ["python", "train_gpt2.py"]
    expected = dict(PRESETS["gpt2"], preset="gpt2", max_lr=1e-4, compile=False,
                    batch_size=choice.batch_size, log_dir="batch_size")
    assert parse_flags(words[2:]) == expected


def test_one_gpu_has_nothing_to_shard():
    """Guards against a single GPU that is told to use --shard, which needs several."""
    assert list(variants(Layout(), 1)) == ["plain", "--recompute"]


@pytest.mark.parametrize("gpus, flags, message", [
    (20, {}, "--gpus is 20, which 3 hosts of at most 8 do not share evenly"),
    (8, dict(shard=True, shard_ranks=3), "--shard_ranks is 3, which does not divide --gpus 8"),
    (8, dict(shard=True, shard_ranks=16), "--shard_ranks is 16, which does not divide"),
])
def test_gpus_that_cannot_be_shared_out_are_refused(gpus, flags, message):
    """Guards against a traceback, or a command that torchrun or the run itself refuses."""
    with pytest.raises(UserError, match=message):
        plan(settings(**flags), PlanConfig(gpus, "H100"), create, [])


# -----------------------------------------------------------------------------
# time and cost


def test_traffic_of_ddp_and_of_shards():
    """Guards against bytes that are counted for the wrong number of ranks, micro-batches or
    passes."""
    run = run_of("gpt3-2.7b", 8)
    gradients = 4 * run.sizes.total
    assert traffic(dataclasses.replace(run, ranks=1), Layout(), 4) == (0, 0)
    assert traffic(run, Layout(), 4)[0] == pytest.approx(2 * 7 / 8 * gradients)
    micro_steps = 2**20 // (4 * 2048 * 8)
    blocks, root = 4 * (run.sizes.total - run.sizes.root), 4 * run.sizes.root
    expected = 7 / 8 * (micro_steps * (2 * blocks + root) + gradients)
    assert traffic(run, Layout(shard=True), 4)[0] == pytest.approx(expected)
    expected += 7 / 8 * (micro_steps - 1) * gradients
    each = Layout(shard=True, reduce_each=True)
    assert traffic(run, each, 4)[0] == pytest.approx(expected)
    of_hosts = Layout(shard=True, shard_ranks=8)
    _, between = traffic(dataclasses.replace(run, ranks=64), of_hosts, 4)
    assert between == pytest.approx(2 * 7 / 8 * gradients / 8)


def test_each_rank_sends_its_share_of_muons_updates():
    """Guards against updates that are planned as if every rank sent all.

    Sharded over 8, a rank has an eighth of the rows: seven eighths of them go to other owners in 16
    bits, and as much comes back as an owner."""
    run = run_of("gpt3-6.7b", 8)
    adamw, _ = traffic(run, Layout(shard=True), 2)
    muon, _ = traffic(dataclasses.replace(run, optimizer="muon"), Layout(shard=True), 2)
    assert muon - adamw == pytest.approx(2 * 2 * run.sizes.hidden / 8 * 7 / 8)


def test_copies_in_one_host_talk_over_its_links():
    """Guards against two copies of four GPUs that are planned as if a network lay between them."""
    run, layout = run_of("gpt2-xl", 8), Layout(shard=True, shard_ranks=4)
    inside, between = traffic(run, layout, 4)
    assert between > 0
    seconds = communication_seconds(run, layout, 4, GPUS["A100"])
    assert seconds == pytest.approx((inside + between) / 220e9)


@pytest.mark.parametrize("ranks, bandwidth", [(8, 220e9), (64, 8 * 23.5e9)])
def test_hosts_are_joined_by_the_slower_link(ranks, bandwidth):
    """Guards against eight hosts that are planned as if NVLink reached from one to the other."""
    run = run_of("gpt2-xl", ranks)
    expected = 2 * (ranks - 1) / ranks * 4 * run.sizes.total / bandwidth
    assert communication_seconds(run, Layout(), 4, GPUS["A100"]) == pytest.approx(expected)


@pytest.mark.parametrize("gpu, preset, tokens_per_second", [
    # tokens a second and GPU that llm-foundry's tables print, and ours as measured (docs/gpu.md)
    ("A100", "gpt3-small", 142830), ("A100", "gpt3-xl", 20513), ("A100", "gpt3-6.7b", 4641),
    ("H100", "gpt3-xl", 45455), ("H100", "gpt3-13b", 4792), ("H100", "gpt2", 485_960),
])
def test_published_speeds_come_out(gpu, preset, tokens_per_second):
    """Guards against an MFU of one definition that is multiplied by FLOPs of another."""
    cfg = TrainConfig(**PRESETS[preset])
    with torch.device("meta"):
        model = create(cfg)
    mfu, _ = published_mfu(GPUS[gpu], model_sizes(model).total, recompute=False)
    speed = GPUS[gpu].peak * mfu / model.flops_per_token()
    assert speed == pytest.approx(tokens_per_second, rel=0.04)


@pytest.mark.parametrize("name, tflops", [
    ("A100", 156), ("H100", 494.5), ("RTX 3090", 35.6), ("L4", 60), ("V100", 15.7), ("T4", 8.1)])
def test_float32_is_slower_than_16_bits(name, tflops):
    """Guards against a --dtype float32 that is planned at the speed of bfloat16: the datasheets'
    TF32 and FP32 figures."""
    assert GPUS[name].float32_peak / 1e12 == pytest.approx(tflops, rel=0.03)
    shown = f"of {GPUS[name].float32_peak / 1e12:,.0f} TFLOP/s"
    text = "\n".join(plan(settings(dtype="float32"), PlanConfig(1, name), create, []))
    assert shown in text


def test_every_figure_has_a_source():
    """Guards against a figure that is added without saying where it comes from."""
    assert [row for row in MEASURED_MFU if len(row.source) < 20] == []
    assert [gpu.name for gpu in GPUS.values() if len(gpu.source) < 20] == []
    for gpu in GPUS.values():
        mfu, source = published_mfu(gpu, 124e6, recompute=False)
        assert 0.1 < mfu < 0.7
        published_here = any(row.gpu == gpu.model for row in MEASURED_MFU)
        assert source.startswith("nothing published") != published_here


def test_recomputing_costs_a_quarter_of_the_speed():
    """Guards against a --recompute that is planned at the speed of a run that keeps all."""
    plain, _ = published_mfu(GPUS["A100"], 1.3e9, recompute=False)
    recomputed, _ = published_mfu(GPUS["A100"], 1.3e9, recompute=True)
    assert recomputed == pytest.approx(plain * 6 / 8)


def test_dollars_are_hours_times_the_price():
    """Guards against a price of the machine that is multiplied by the number of GPUs, and against
    hours that are minutes."""
    cfg = settings(max_steps=3600, eval_interval=3600, val_tokens=1)
    own = PlanConfig(gpus=8, dollars_per_hour=24.0)
    text = "\n".join(time_lines(cfg, cfg.total_batch_size / 2.0, own))
    assert "time: 2 h 00 min" in text
    assert "cost: 48.0" in text


# -----------------------------------------------------------------------------
# as a user types it


def run_plan(folder, *flags):
    return subprocess.run([sys.executable, ROOT / "plan.py", *flags], cwd=folder,
                          capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def eight_h100(tmp_path_factory):
    """(what plan.py prints for eight H100s, the folder in which it ran)."""
    folder = tmp_path_factory.mktemp("plan")
    done = run_plan(folder, "--gpus", "8", "--gpu", "h100", "--dollars_per_hour=24")
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_the_plan_needs_neither_data_nor_gpu(eight_h100):
    """Guards against a plan that asks for shards, makes the demo's, or leaves a log directory."""
    text, folder = eight_h100
    assert text.startswith("124,475,904 parameters on 8 x H100")
    assert "torchrun --standalone --nproc_per_node=8 train_gpt2.py --batch_size 64\n" in text
    assert "disk: 20.0 GB of shards" in text
    assert list(folder.iterdir()) == []


def test_the_plan_fits_a_screen(eight_h100):
    """Guards against a command to type, hours and dollars that have scrolled away."""
    lines = eight_h100[0].splitlines()
    assert len(lines) <= 24
    assert [line for line in lines if len(line) > 80 and not line.startswith("type: ")] == []
    named = [line.split(":")[0] for line in lines if line[:4] in ("type", "time", "cost", "disk")]
    assert named == ["type", "time", "cost", "disk"]
    assert lines[2].startswith("type")


def test_ways_that_do_not_fit_are_marked():
    """Guards against a table in which 230 GiB look like a way to run on 80."""
    cfg = TrainConfig(**PRESETS["gpt3-13b"])
    lines = plan(cfg, PlanConfig(8, "H100"), create, [])
    fits = next(line for line in lines if line.startswith("fits "))
    assert fits.split()[1:] == ["NO", "NO", "NO", "NO", "yes"]


def test_an_unknown_gpu_is_one_line(tmp_path):
    """Guards against a mistyped GPU that is a traceback, or is taken for another one."""
    done = run_plan(tmp_path, "--gpu", "H1000")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --gpu is 'H1000': choose one of B200, H200, H100")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("typed, name, memory", [
    ("h100", "H100", 80), ("NVIDIA H100 80GB HBM3", "H100", 80), ("H100-SXM5-80GB", "H100", 80),
    ("h100_pcie", "H100 PCIe", 80), ("A100", "A100", 80), ("a100-40gb", "A100 40GB", 40),
    ("NVIDIA A100-SXM4-40GB", "A100 40GB", 40), ("4090", "RTX 4090", 24),
    ("rtx4090", "RTX 4090", 24), ("NVIDIA GeForce RTX 4090", "RTX 4090", 24),
    ("Tesla V100-SXM2-16GB", "V100", 16), ("a10g", "A10G", 24), ("Tesla T4", "T4", 16),
])
def test_a_gpu_in_any_spelling(typed, name, memory):
    """Guards against a name that the maker's own tools print and the plan refuses."""
    gpu = find_gpu(typed)
    assert (gpu.name, gpu.memory) == (name, memory)


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A10G", 70),
    ("NVIDIA A10", 125), ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362),
    ("NVIDIA GeForce RTX 4090", 165), ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125),
    ("NVIDIA GH200 480GB", 989),
    ("NVIDIA RTX A1000", None), ("NVIDIA T400", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA A1000", None),
])
def test_the_mfu_is_of_this_gpu(monkeypatch, name, tflops):
    """Guards against an MFU over another GPU's peak: an RTX A1000 is no A100, an L40 no L4."""
    monkeypatch.setattr("gptlib.training.gpu_facts.device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda"))
    assert peak == (tflops and tflops * 1e12)


@pytest.mark.parametrize("typed", ["H", "RTX A1000", "L40", "T400", "H100 NVL", "A100 MIG 1g.10gb"])
def test_another_gpu_is_not_taken_for_a_known_one(typed):
    """Guards against a name that is matched by its beginning: an RTX A1000 is no A100."""
    with pytest.raises(UserError, match="choose one of"):
        find_gpu(typed)


def test_without_a_gpu_name_this_machine_is_measured():
    """Guards against figures of some GPU for a laptop."""
    cfg = settings(device="cpu", max_steps=2)
    vocabulary = SimpleNamespace(n_vocab=64)
    create_small = lambda cfg: create_model(cfg, Start(), vocabulary)  # noqa: E731
    text = "\n".join(plan(cfg, PlanConfig(), create_small, []))
    assert "measured uncompiled, 4 x 32 tokens" in text
    assert "type: python train_gpt2.py --batch_size 4" in text


def test_a_large_model_is_measured_in_parts():
    """Guards against a plan of gpt2-xl on a laptop that makes the whole model, for which the system
    kills it."""
    made = []

    def create_small(cfg):
        made.append((cfg.n_layer, torch.empty(0).device.type))
        return create_model(dataclasses.replace(cfg, n_embd=64), Start(), GPT2_VOCABULARY)

    cfg = settings(n_layer=50, n_embd=1024, device="cpu", max_steps=2, batch_size=1)
    rate, how = measure_tokens_per_second(create_small, cfg, sizes_of(cfg), torch.device("cpu"),
                                          torch.float32)
    assert made == [(2, "cpu"), (4, "cpu")]
    assert "2 and with 4 blocks" in how
    assert rate > 0


def test_recomputation_is_measured_too(monkeypatch):
    """Guards against a run with --recompute whose speed is measured without."""
    seen = []

    def time_nothing(model, *args):
        seen.append([block.forward.__name__ for block in model.transformer.h])
        return 1.0

    monkeypatch.setattr(script, "time_micro_batch", time_nothing)
    cfg = settings(recompute=True, device="cpu", total_batch_size=64 * 32)
    plan(cfg, PlanConfig(), create, [])
    assert set(seen[0]) == {"forward_and_forget"}


def test_the_plan_of_a_run_from_a_checkpoint(tmp_path):
    """Guards against a checkpoint with a tokenizer of its own that is planned with GPT-2's."""
    model = GPT(GPTConfig(32, 320, 2, 2, 32))
    bytes_alone = {bytes([i]): i for i in range(256)}
    contents = dict(model=model.state_dict(), config=vars(model.config),
                    tokenizer=dict(name="own", ranks=dump_ranks(bytes_alone)))
    torch.save(contents, tmp_path / "start.pt")
    done = run_plan(tmp_path, "--init_from", "start.pt", "--gpu", "H100", "--gpus", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{sum(p.numel() for p in model.parameters()):,} parameters")


# -----------------------------------------------------------------------------
# docs/large.md


def test_the_table_of_presets_is_up_to_date():
    """Guards against a docs/large.md by which a preset fits that the code now says does not."""
    configs = {name: TrainConfig(**preset) for name, preset in PRESETS.items() if name != "demo"}
    expected = preset_table(configs, create)
    text = (ROOT / "docs" / "large.md").read_text()
    if "\n".join(expected) not in text:
        rows = "\n".join(expected)
        pytest.fail(f"the table in docs/large.md should be:\n{rows}", pytrace=False)
