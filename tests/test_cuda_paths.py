"""What a GPU needs and a CPU can show: shapes kept from cuDNN, sampling from determinism, memory.

    python -m pytest tests/test_cuda_paths.py
"""

import json
import subprocess
import sys

import pytest
import torch
from byte_model import N_VOCAB, drain, make_model, make_tokenizer, prompts
from conftest import ROOT, TINY, environment

import train_gpt2
from gptlib import runtime
from gptlib.training.evaluation import Evaluator
from gptlib.checkpoints.saver import save_checkpoint
from gptlib.inference import engine as engine_module
from gptlib.inference.engine import Engine
from gptlib.runtime import without_cudnn_attention
from train_gpt2 import GPT, GPTConfig, TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")
CUDA = torch.device("cuda", 1)


@pytest.fixture
def passes(monkeypatch):
    """For each forward pass of a model: how many tokens a row had, whether cuDNN's attention was
    enabled, and whether algorithms had to be deterministic."""
    seen = []
    hidden = GPT.hidden

    def record(model, idx, *args, **kwargs):
        seen.append((idx.size(1), torch.backends.cuda.cudnn_sdp_enabled(),
                     torch.are_deterministic_algorithms_enabled()))
        return hidden(model, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "hidden", record)
    return seen


def test_prompts_of_any_length_do_without_cudnn(passes, monkeypatch):
    """Guards against an execution plan of cuDNN for each new length of a prompt, in service.

    The switches of torch exist without a GPU, so that this runs on a CPU.
    """
    monkeypatch.setattr(engine_module, "without_cudnn_attention",
                        lambda device: without_cudnn_attention(CUDA))
    engine = Engine(make_model(), slots=1, n_vocab=N_VOCAB)
    for prompt in prompts(5, 9):
        engine.submit(prompt, max_length=3, temperature=0)
    drain(engine)
    prefilled = {length: cudnn for length, cudnn, _ in passes if length > 1}
    assert prefilled == {5: False, 9: False}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_samples_of_a_run_do_without_cudnn(passes, monkeypatch):
    """Guards against a plan of cuDNN for each length of a growing cache, at every evaluation."""
    monkeypatch.setattr(runtime, "without_cudnn_attention",
                        lambda device: without_cudnn_attention(CUDA))
    sample_once()
    assert len(passes) > 3
    assert not any(cudnn for _, cudnn, _ in passes)


def test_samples_of_a_deterministic_run_are_drawn(passes):
    """Guards against --deterministic runs on CUDA that end at their first samples: the cumulative
    sum that they are drawn by has no deterministic kernel there."""
    before = (torch.are_deterministic_algorithms_enabled(),
              torch.is_deterministic_algorithms_warn_only_enabled())
    torch.use_deterministic_algorithms(True)
    try:
        sample_once()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    assert len(passes) > 3
    assert not any(deterministic for *_, deterministic in passes)


def sample_once():
    cfg = TrainConfig(**{**TINY, "num_samples": 2, "sample_length": 12, "block_size": 24})
    autocast = torch.autocast("cpu", enabled=False)
    evaluator = Evaluator(make_model(), torch.device("cpu"), autocast)
    texts = train_gpt2.sample(evaluator, cfg, make_tokenizer(), torch.float32)
    assert len(texts) == 2


# -----------------------------------------------------------------------------
# host memory of a resume by two processes

PEAK_OF_RANK = """
import json, os, sys
import torch
import torch.distributed as dist
from gptlib.checkpoints.start import load_start
from gptlib.distributed import World

def held():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

rank, store, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.chdir(folder)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
dist.barrier()
before = held()
start = load_start(dict(auto_resume=True), World(rank, rank, 2), known=())
with open("/proc/self/status") as f:  # ru_maxrss would begin with what the parent process had
    peak = int(f.read().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps([peak - before, start.checkpoint["model"]["lm_head.weight"][-1, -1].item()]))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("sees_file", [True, False], ids=["mapped", "sent"])
def test_a_resume_holds_the_checkpoint_once(tmp_path, sees_file):
    """Guards against the three to four copies of a checkpoint on every rank that pickling takes:
    75 GB a rank for GPT-2 XL."""
    size = 160 << 20
    folders = tmp_path / "a", tmp_path / ("a" if sees_file else "b")
    for folder in folders:
        (folder / "log").mkdir(parents=True, exist_ok=True)
    n = size // 2 // 4
    config = GPTConfig(block_size=8, vocab_size=n // 8, n_layer=1, n_head=1, n_embd=8)
    model = GPT(config)
    model.lm_head.weight.data.copy_(torch.arange(n, dtype=torch.float32).view(-1, 8))
    state = dict(model=model.state_dict(), config=vars(config),
                 optimizer=[dict(state={0: torch.ones(n)}, param_groups=[])], scaler={},
                 rng=[dict(cpu=torch.get_rng_state())] * 2, train_config={},
                 tokenizer=dict(name="gpt2"), step=3, position=9, val_loss=None, val_step=None)
    save_checkpoint(folders[0] / "log", state, keep=0)
    processes = []
    for rank, folder in enumerate(folders):
        argv = [sys.executable, "-c", PEAK_OF_RANK, str(rank), str(tmp_path / "store"), str(folder)]
        processes.append(subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment(), "PYTHONPATH": str(ROOT)}))
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for out, _ in outputs:
        grown, last = json.loads(out.splitlines()[-1])
        assert last == float(torch.tensor(n - 1, dtype=torch.float32))
        assert grown < 1.8 * size, f"{grown / size:.1f} times the checkpoint"
