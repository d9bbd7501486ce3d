"""What --plan says beside what really happens: memory, traffic, time, flags, and docs/large.md.

    python -m pytest tests/training/test_plan.py

Memory is compared with the tensors of a real step and with the peak of fresh processes on a CPU.
No time is measured.
"""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from gptlib.common import UserError
from gptlib.training.gpu_facts import GPUS, MEASURED_MFU, find_gpu, published_mfu
from gptlib.training.memory import checkpoint_bytes, estimate_memory, model_sizes
from gptlib.training.plan import (GIB, choose, command, communication_seconds, largest_batch_size,
                         measure_tokens_per_second, plan, preset_table, time_lines, traffic,
                         variants)
from gptlib.training.presets import PRESETS
from train_gpt2 import (GPT, GPTConfig, TrainConfig, configure_optimizers, create_model,
                        parse_flags)

GPT2_VOCABULARY = SimpleNamespace(n_vocab=50257)


def settings(**flags):
    small = dict(n_layer=4, n_head=4, n_embd=64, block_size=32, total_batch_size=4 * 32,
                 batch_size=4, compile=False)
    return TrainConfig(**{**small, **flags})


def create(cfg):
    return create_model(cfg, None, GPT2_VOCABULARY)


def sizes_of(cfg):
    with torch.device("meta"):
        return model_sizes(create(cfg))


def preset_sizes(name):
    cfg = TrainConfig(**PRESETS[name])
    return cfg, sizes_of(cfg)


# -----------------------------------------------------------------------------
# memory


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_is_what_the_tensors_take(optimizer):
    """A part of the model or of the optimizer's state is left out, or counted twice (the tie)."""
    cfg = settings(optimizer=optimizer)
    model = create(cfg)
    optimizers = configure_optimizers(model, cfg, torch.device("cpu"))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for one in optimizers:
        one.step()
    state = 0
    for one in optimizers:
        tensors = [t for values in one.state.values() for t in values.values()]
        state += sum(t.nbytes for t in tensors if torch.is_tensor(t) and t.dim())
    weights = sum(p.nbytes for p in model.parameters())
    sizes = model_sizes(model)
    parts = estimate_memory(sizes, cfg, 4, bits=32).parts
    assert parts["weights"] == weights
    assert parts["gradients"] == weights
    assert parts["optimizer"] == state
    assert checkpoint_bytes(sizes, optimizer) == weights + state


def saved_bytes(cfg, sequences, bits):
    """Bytes that the graph of a real forward pass keeps, weights not counted."""
    model = create(cfg)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    idx = torch.zeros(sequences, cfg.block_size, dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bits == 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model(idx, idx, return_logits=False)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("bits", [16, 32])
def test_activations_of_a_block_are_counted(bits):
    """The model changed, and a block keeps other bytes than the estimate counts."""
    tokens = 8 * 256
    shape = dict(n_embd=256, block_size=256, total_batch_size=tokens, n_head=4)
    few, more = settings(n_layer=1, **shape), settings(n_layer=3, **shape)
    really = saved_bytes(more, 8, bits) - saved_bytes(few, 8, bits)
    parts = [estimate_memory(sizes_of(cfg), cfg, 8, bits=bits).parts for cfg in (few, more)]
    names = ("activations", "16-bit weights")
    expected = sum(parts[1][name] - parts[0][name] for name in names)
    assert abs(expected / really - 1) < 0.02, f"expected {expected:,}, found {really:,}"


# A real step in a process of its own. A step of a tiny model comes first, so that what Python and
# torch load is not counted as memory of the step.
PEAK = """
import json, sys
from pathlib import Path
import torch
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizers, take_step

def status(name):
    text = Path("/proc/self/status").read_text()
    return int(text.split(name + ":")[1].split()[0]) * 1024

def steps(config, cfg, micro_steps):
    model = GPT(config)
    optimizers = configure_optimizers(model, cfg, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    x, y = torch.randint(config.vocab_size, (2, cfg.batch_size, cfg.block_size))
    batches = [(x, y, x.numel())] * micro_steps
    for _ in range(2):
        autocast = torch.autocast("cpu", torch.bfloat16)
        take_step(model, batches, optimizers, scaler, autocast, 1e-4, cfg)

shape, micro_steps, vocab_size = json.loads(sys.argv[1])
cfg = TrainConfig(**shape)
steps(GPTConfig(cfg.block_size, 64, 1, 1, 8), cfg, 1)
before = status("VmRSS")
steps(GPTConfig(cfg.block_size, vocab_size, cfg.n_layer, cfg.n_head, cfg.n_embd), cfg, micro_steps)
print(json.dumps([before, status("VmHWM")]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("shape, micro_steps, vocab_size", [
    # weights, gradients and optimizer; activations; logits
    (dict(n_layer=8, n_embd=768, n_head=12, block_size=64, batch_size=1), 1, 32768),
    (dict(n_layer=8, n_embd=768, n_head=12, block_size=64, batch_size=1, optimizer="muon"), 2,
     2048),
    (dict(n_layer=8, n_embd=256, n_head=4, block_size=256, batch_size=24), 1, 1024),
    (dict(n_layer=2, n_embd=256, n_head=4, block_size=256, batch_size=6, optimizer="muon"), 2,
     50304),
], ids=["state", "state, Muon", "activations", "logits, Muon"])
def test_peak_of_a_fresh_process(shape, micro_steps, vocab_size):
    """The plan says that a run fits which then is killed, or sends people to a larger machine."""
    tokens = shape["batch_size"] * shape["block_size"] * micro_steps
    shape = dict(shape, total_batch_size=tokens, compile=False)
    request = json.dumps([shape, micro_steps, vocab_size])
    done = subprocess.run([sys.executable, "-c", PEAK, request], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, peak = json.loads(done.stdout)
    cfg = TrainConfig(**shape)
    with torch.device("meta"):
        model = GPT(GPTConfig(cfg.block_size, vocab_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
    expected = before + estimate_memory(model_sizes(model), cfg, cfg.batch_size).peak
    assert abs(expected / peak - 1) < 0.15, f"expected {expected / GIB:.3f}, found {peak / GIB:.3f}"


def test_sharding_divides_the_state():
    """--shard is planned as if every GPU held a whole model, or as if nothing were gathered."""
    cfg, sizes = preset_sizes("gpt3-6.7b")
    once = 8 * 2 * sizes.block_size  # one micro-batch of two sequences on each of eight
    cfg.total_batch_size = once
    plain = estimate_memory(sizes, cfg, 2, 8).parts
    cfg.shard = True
    sharded = estimate_memory(sizes, cfg, 2, 8).parts
    for name in ("weights", "gradients", "optimizer"):
        assert sharded[name] == plain[name] // 8
    assert sharded["buckets"] > 4 * (sizes.root + sizes.block)
    cfg.total_batch_size = 2 * once  # the gradients of two micro-batches add up whole
    assert estimate_memory(sizes, cfg, 2, 8).parts["gradients"] == plain["gradients"]
    cfg.reduce_each = True
    assert estimate_memory(sizes, cfg, 2, 8).parts["gradients"] == plain["gradients"] // 8
    cfg.shard_ranks = 4  # two copies of the model
    assert estimate_memory(sizes, cfg, 2, 8).parts["weights"] == plain["weights"] // 4


def test_recomputed_blocks_keep_their_input():
    """--recompute and --recompute_every are planned with the activations of all blocks."""
    cfg, sizes = preset_sizes("gpt2-xl")
    tokens = 8 * sizes.block_size

    def activations(**flags):
        planned = TrainConfig(**{**PRESETS["gpt2-xl"], **flags})
        return estimate_memory(sizes, planned, 8).parts["activations"]

    a_block, an_input = 36 * 1600 * tokens, 4 * 1600 * tokens
    assert activations() - activations(recompute=True) == 48 * (a_block - an_input)
    half = activations() - activations(recompute=True, recompute_every=2)
    assert half == 24 * (a_block - an_input)


# -----------------------------------------------------------------------------
# what fits, and what to type


def test_largest_batch_fits_and_one_more_does_not():
    """The plan names a micro-batch that runs out of memory, or wastes half of the GPU."""
    cfg, sizes = preset_sizes("gpt2-xl")
    budget = find_gpu("H100").usable_bytes
    largest = largest_batch_size(sizes, cfg, 8, budget)
    assert estimate_memory(sizes, cfg, largest, 8).peak <= budget
    assert estimate_memory(sizes, cfg, largest + 1, 8).peak > budget
    assert largest_batch_size(sizes, cfg, 8, sizes.total) == 0


def test_the_cheapest_variant_that_fits_is_chosen():
    """Recomputing is advised where nothing needs it, or a flag that was asked for is dropped."""
    budget = find_gpu("H100").usable_bytes
    cfg, sizes = preset_sizes("gpt2")
    assert choose(sizes, cfg, 8, budget).flags == "plain"
    cfg.recompute = True
    assert choose(sizes, cfg, 8, budget).flags == "--recompute"
    cfg, sizes = preset_sizes("gpt3-6.7b")
    assert choose(sizes, cfg, 1, budget) is None
    assert choose(sizes, cfg, 8, budget).flags == "--shard"


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_the_command_is_accepted(ranks):
    """The flags to type are refused, or lose what the user asked for."""
    from torch.distributed.run import get_args_parser
    cfg, sizes = preset_sizes("gpt2")
    argv = ["--plan", "--preset", "gpt2", "--gpus", str(ranks), "--gpu=H100", "--max_lr", "1e-4",
            "--dollars_per_hour", "3", "--batch_size", "5", "--no-compile"]
    words = command(argv, choose(sizes, cfg, ranks, 80 * GIB), ranks).split()
    if ranks > 1:
        known = get_args_parser().parse_args(words[1:])
        hosts = int(known.nnodes.split(":")[-1])
        assert hosts * int(known.nproc_per_node) == ranks
        words = ["python", known.training_script, *known.training_script_args]
    assert words[:2] == ["python", "train_gpt2.py"]
    flags = parse_flags(words[2:])
    expected = dict(PRESETS["gpt2"], preset="gpt2", max_lr=1e-4, compile=False,
                    batch_size=choose(sizes, cfg, ranks, 80 * GIB).batch_size)
    assert flags == expected


# -----------------------------------------------------------------------------
# time and cost


def test_traffic_of_ddp_and_of_shards():
    """Bytes are counted for the wrong number of ranks, micro-batches or passes."""
    cfg, sizes = preset_sizes("gpt3-2.7b")
    gradients = 4 * sizes.total
    assert traffic(sizes, cfg, 4, 1) == (0, 0)
    assert traffic(sizes, cfg, 4, 8)[0] == pytest.approx(2 * 7 / 8 * gradients)
    cfg.shard = True
    micro_steps = 2**20 // (4 * 2048 * 8)
    blocks, root = 4 * (sizes.total - sizes.root), 4 * sizes.root
    expected = 7 / 8 * (micro_steps * (2 * blocks + root) + gradients)
    assert traffic(sizes, cfg, 4, 8)[0] == pytest.approx(expected)
    cfg.reduce_each = True
    expected += 7 / 8 * (micro_steps - 1) * gradients
    assert traffic(sizes, cfg, 4, 8)[0] == pytest.approx(expected)
    cfg.reduce_each = False
    cfg.shard_ranks = 8
    inside, between = traffic(sizes, cfg, 4, 64)
    assert between == pytest.approx(2 * 7 / 8 * gradients / 8)


def test_each_rank_sends_its_share_of_muons_updates():
    """Sharded over 8, a rank has an eighth of the rows: seven eighths of them go to other owners in
    16 bits, and as much comes back as an owner. It is planned as if every rank sent all."""
    cfg, sizes = preset_sizes("gpt3-6.7b")
    cfg.shard = True
    adamw, _ = traffic(sizes, cfg, 2, 8)
    cfg.optimizer = "muon"
    muon, _ = traffic(sizes, cfg, 2, 8)
    assert muon - adamw == pytest.approx(2 * 2 * sizes.hidden / 8 * 7 / 8)


def test_copies_in_one_host_talk_over_its_links():
    """Two copies of four GPUs each are planned as if a network lay between them."""
    cfg, sizes = preset_sizes("gpt2-xl")
    cfg.shard, cfg.shard_ranks = True, 4
    a100 = GPUS["A100"]
    inside, between = traffic(sizes, cfg, 4, 8)
    assert between > 0
    seconds = communication_seconds(sizes, cfg, 4, 8, a100)
    assert seconds == pytest.approx((inside + between) / 220e9)


def test_hosts_are_joined_by_the_slower_link():
    """Eight hosts are planned as if NVLink reached from one to the other."""
    cfg, sizes = preset_sizes("gpt2-xl")
    a100 = GPUS["A100"]
    for ranks, bandwidth in [(8, 220e9), (64, 8 * 23.5e9)]:
        expected = 2 * (ranks - 1) / ranks * 4 * sizes.total / bandwidth
        assert communication_seconds(sizes, cfg, 4, ranks, a100) == pytest.approx(expected)


@pytest.mark.parametrize("gpu, preset, tokens_per_second", [
    # tokens a second and GPU that llm-foundry's tables print, and llm.c's 10B tokens in 45 minutes
    ("A100", "gpt3-small", 142830), ("A100", "gpt3-xl", 20513), ("A100", "gpt3-6.7b", 4641),
    ("H100", "gpt3-xl", 45455), ("H100", "gpt3-13b", 4792), ("H100", "gpt2", 10e9 / 2700 / 8),
])
def test_published_speeds_come_out(gpu, preset, tokens_per_second):
    """An MFU of one definition is multiplied by FLOPs of another."""
    cfg, sizes = preset_sizes(preset)
    with torch.device("meta"):
        flops = create(cfg).flops_per_token()
    mfu, _ = published_mfu(GPUS[gpu], sizes.total, recompute=False)
    speed = GPUS[gpu].peak * mfu / flops
    assert speed == pytest.approx(tokens_per_second, rel=0.04)


def test_float32_is_slower_than_16_bits():
    """--dtype float32 is planned at the speed of bfloat16. The datasheets' TF32 and FP32 figures,
    in TFLOP/s."""
    datasheets = {"A100": 156, "H100": 494.5, "RTX 3090": 35.6, "L4": 60, "V100": 15.7, "T4": 8.1}
    for name, expected in datasheets.items():
        assert GPUS[name].float32_peak / 1e12 == pytest.approx(expected, rel=0.03), name
    cfg = settings(gpu="A100", gpus=8, dtype="float32", n_layer=12, n_embd=768)
    assert "of 156 TFLOP/s" in "\n".join(plan(cfg, create, []))


def test_every_figure_has_a_source():
    """A figure is added without saying where it comes from."""
    assert [row for row in MEASURED_MFU if len(row.source) < 20] == []
    assert [gpu.name for gpu in GPUS.values() if len(gpu.source) < 20] == []
    for gpu in GPUS.values():
        mfu, source = published_mfu(gpu, 124e6, recompute=False)
        assert 0.1 < mfu < 0.7
        published_here = any(row.gpu == gpu.name.removesuffix(" 40GB") for row in MEASURED_MFU)
        assert source.startswith("nothing published") != published_here


def test_recomputing_costs_a_quarter_of_the_speed():
    """--recompute is planned at the speed of a run that does not recompute."""
    plain, _ = published_mfu(GPUS["A100"], 1.3e9, recompute=False)
    recomputed, _ = published_mfu(GPUS["A100"], 1.3e9, recompute=True)
    assert recomputed == pytest.approx(plain * 6 / 8)


def test_dollars_are_hours_times_the_price():
    """The price of the machine is multiplied by the number of GPUs, or hours are minutes."""
    cfg = settings(max_steps=3600, eval_interval=3600, val_tokens=1, dollars_per_hour=24.0)
    text = "\n".join(time_lines(cfg, 2.0, cfg.total_batch_size / 2.0, 8))
    assert "time: 2 h 00 min" in text
    assert "cost: 48.0" in text


# -----------------------------------------------------------------------------
# as a user types it


def run_plan(folder, *flags):
    return subprocess.run([sys.executable, ROOT / "train_gpt2.py", "--plan", *flags], cwd=folder,
                          capture_output=True, text=True, timeout=300)


def test_the_plan_needs_neither_data_nor_gpu(tmp_path):
    """--plan asks for shards, makes the demo's, or leaves a log directory behind."""
    done = run_plan(tmp_path, "--gpus", "8", "--gpu", "h100", "--dollars_per_hour", "24")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("124,475,904 parameters on 8 x H100")
    assert "torchrun --standalone --nproc_per_node=8 train_gpt2.py --batch_size 64" in done.stdout
    assert "disk: 20.0 GB of shards" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_gpu_is_one_line(tmp_path):
    """A mistyped GPU gives a traceback, or is taken for another one."""
    done = run_plan(tmp_path, "--gpu", "H1000")
    assert done.returncode != 0
    assert "--gpu is 'H1000': choose one of B200, H200, H100" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_gpu_name_this_machine_is_measured():
    """The plan prints figures of some GPU for a laptop."""
    cfg = settings(plan=True, device="cpu", max_steps=2)
    vocabulary = SimpleNamespace(n_vocab=64)
    text = "\n".join(plan(cfg, lambda cfg: create_model(cfg, None, vocabulary), ["--plan"]))
    assert "measured uncompiled, 4 x 32 tokens" in text
    assert "type:\n  python train_gpt2.py --batch_size 4" in text


def test_a_large_model_is_measured_in_parts():
    """--plan of gpt2-xl on a laptop makes the whole model, and the system kills it."""
    made = []

    def create_small(cfg):
        made.append((cfg.n_layer, torch.empty(0).device.type))
        return create_model(dataclasses.replace(cfg, n_embd=64), None, GPT2_VOCABULARY)

    cfg = settings(n_layer=50, n_embd=1024, plan=True, device="cpu", max_steps=2, batch_size=1)
    rate, how = measure_tokens_per_second(create_small, cfg, sizes_of(cfg), torch.device("cpu"),
                                          torch.float32)
    assert made == [(2, "cpu"), (4, "cpu")]
    assert "2 and with 4 blocks" in how
    assert rate > 0


# -----------------------------------------------------------------------------
# docs/large.md


def test_the_table_of_presets_is_up_to_date():
    """docs/large.md says that a preset fits where the code now says otherwise."""
    configs = {name: TrainConfig(**preset) for name, preset in PRESETS.items() if name != "demo"}
    expected = preset_table(configs, create)
    text = (ROOT / "docs" / "large.md").read_text()
    if "\n".join(expected) not in text:
        rows = "\n".join(expected)
        pytest.fail(f"the table in docs/large.md should be:\n{rows}", pytrace=False)


def test_one_gpu_has_nothing_to_shard():
    """A single GPU is told to use --shard, which needs several."""
    assert list(variants(settings(), 1)) == ["plain", "--recompute"]


def test_shard_on_one_gpu_is_planned():
    """--shard with the default of one GPU was told to take more of them."""
    cfg, sizes = preset_sizes("gpt2")
    cfg.shard = True
    assert choose(sizes, cfg, 1, find_gpu("H100").usable_bytes).flags == "plain"


@pytest.mark.parametrize("flags, message", [
    (dict(gpus=20), "--gpus is 20, which 3 hosts of at most 8 do not share evenly"),
    (dict(gpus=8, shard=True, shard_ranks=3), "--shard_ranks is 3, which does not divide --gpus 8"),
    (dict(gpus=8, shard=True, shard_ranks=16), "--shard_ranks is 16, which does not divide"),
])
def test_gpus_that_cannot_be_shared_out_are_refused(flags, message):
    """A traceback, or a command that torchrun or the run itself refuses."""
    with pytest.raises(UserError, match=message):
        plan(settings(gpu="H100", **flags), create, [])


def test_values_of_flags_are_not_taken_for_flags():
    """A log directory named after a flag lost its name in the command to type."""
    cfg, sizes = preset_sizes("gpt2")
    choice = choose(sizes, cfg, 1, 80 * GIB)
    words = command(["--plan", "--log_dir", "plan", "--gpu", "H100"], choice, 1).split()
    assert words[:4] == ["python", "train_gpt2.py", "--log_dir", "plan"]


def test_the_plan_of_a_run_from_a_checkpoint(tmp_path):
    """A checkpoint with a tokenizer of its own, and no data: it was compared with GPT-2's."""
    model = GPT(GPTConfig(32, 320, 2, 2, 32))
    contents = dict(model=model.state_dict(), config=vars(model.config),
                    tokenizer=dict(name="own", ranks=[]))
    torch.save(contents, tmp_path / "start.pt")
    done = run_plan(tmp_path, "--init_from", "start.pt", "--gpu", "H100", "--gpus", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{sum(p.numel() for p in model.parameters()):,} parameters")


def test_recomputation_is_measured_too(monkeypatch):
    """The speed of a run with --recompute was measured without."""
    seen = []

    def time_nothing(model, *args):
        seen.append([block.forward.__name__ for block in model.transformer.h])
        return 1.0

    monkeypatch.setattr("gptlib.training.plan.time_micro_batch", time_nothing)
    cfg = settings(recompute=True, plan=True, device="cpu")
    plan(cfg, lambda cfg: create_model(cfg, None, SimpleNamespace(n_vocab=64)), ["--plan"])
    assert set(seen[0]) == {"forward_and_forget"}


def test_unknown_names_raise():
    """A GPU's name is matched by its beginning, so that H100 PCIe counts as an H100."""
    assert find_gpu("h100_pcie").name == "H100 PCIe"
    with pytest.raises(UserError, match="choose one of"):
        find_gpu("H")
