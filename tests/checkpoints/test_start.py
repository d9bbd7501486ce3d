"""What a run starts from: the right checkpoint, with the settings that it knows, on every rank.

    python -m pytest tests/checkpoints/test_start.py
"""

import json
import re
import subprocess
import sys

import pytest
import torch
from byte_model import make_tokenizer
from conftest import ROOT, environment
from interop_helpers import SIZES, assert_same_nest, training_state

from gptlib.checkpoints.saver import save_checkpoint
from gptlib.checkpoints.start import load_start
from gptlib.common import UserError
from gptlib.data.tokenizer import tokenizer_to_dict
from gptlib.distributed import split_tensors
from gptlib.distributed import World
from train_gpt2 import GPT, GPTConfig

KNOWN = [*SIZES, "preset", "max_steps"]


def resume(folder, known=KNOWN):
    return load_start(dict(auto_resume=True, log_dir=str(folder)), World(), known)


# -----------------------------------------------------------------------------
# the checkpoint


def test_auto_resume_skips_damaged_checkpoints(tmp_path, capsys):
    """Guards against losing more than the steps since the checkpoint before, if one byte of the
    newest one's optimizer state is wrong."""
    for step in (3, 4):
        save_checkpoint(tmp_path, training_state(step), keep=5)
    newest = tmp_path / "model_00004.pt"
    content = bytearray(newest.read_bytes())
    moments = training_state(4)["optimizer"][0]["state"][0]["exp_avg"]
    content[content.index(moments.numpy().tobytes())] ^= 1
    newest.write_bytes(content)
    assert resume(tmp_path).step == 3
    assert f"skipping {newest}" in capsys.readouterr().err


def test_auto_resume_skips_what_has_no_training_state(tmp_path, capsys):
    """Guards against resuming another program's checkpoint under our name: it has weights alone."""
    save_checkpoint(tmp_path, training_state(3), keep=5)
    state = training_state(4)
    del state["position"]
    torch.save(state, tmp_path / "model_00004.pt")
    assert resume(tmp_path).step == 3
    assert "no training state to resume (position is missing)" in capsys.readouterr().err


@pytest.mark.parametrize("name, value, reason", [
    ("position", -1, "position is -1"), ("step", 2**70, f"step is {2**70}"),
    ("val_loss", "2.5", "val_loss is no float"), ("val_step", [], "val_step is no int"),
    ("best_loss", {}, "best_loss is no float"), ("rng", None, "rng is no list")])
def test_a_strangers_training_state_is_refused(tmp_path, name, value, reason):
    """Guards against a traceback at the first evaluation or step after a resume."""
    path = tmp_path / "model_00004.pt"
    torch.save(training_state(4) | {name: value}, path)
    with pytest.raises(UserError, match=re.escape(f"no training state to resume ({reason})")):
        load_start(dict(resume=True, checkpoint_path=str(path)), World(), KNOWN)


def test_nothing_to_resume_starts_from_scratch(tmp_path):
    """Guards against an --auto_resume that fails at the first start of a run."""
    start = resume(tmp_path)
    assert start.checkpoint is None
    assert not start.resumed
    assert start.settings == {}


# -----------------------------------------------------------------------------
# its settings


def settings_after(tmp_path, **saved):
    state = training_state()
    state["train_config"] |= saved
    save_checkpoint(tmp_path, state, keep=1)
    return resume(tmp_path).settings


def test_settings_of_how_a_run_was_started_do_not_count(tmp_path):
    """Guards against a resumed run that applies its preset again, over its own settings."""
    expected = {**SIZES, "max_steps": 60}
    assert settings_after(tmp_path, resume=True, checkpoint_path="a.pt") == expected


def test_an_unknown_setting_is_named_and_left_out(tmp_path, capsys):
    """Guards against a TypeError at the resume of what a newer or older version has saved."""
    assert "speed" not in settings_after(tmp_path, speed="fast")
    assert "speed = 'fast', a setting that this version does not know" in capsys.readouterr().err


def test_a_removed_setting_at_its_default_is_dropped(tmp_path, capsys):
    """Guards against a warning at every resume of an old run, about flags that nobody gave."""
    old = dict(tuning="", plan=False, gpus=1, gpu="", dollars_per_hour=0.0)
    assert not settings_after(tmp_path, **old).keys() & old
    assert capsys.readouterr().err == ""


def test_a_removed_setting_that_was_given_is_named(tmp_path, capsys):
    """Guards against a run that goes on without an option it was started with, in silence."""
    settings_after(tmp_path, tuning="keep_gradients")
    assert "trained with tuning = 'keep_gradients'" in capsys.readouterr().err


def test_an_unknown_setting_of_the_model_is_refused(tmp_path):
    """Guards against a changed model whose weights stock code runs as if they were its own."""
    state = training_state()
    state["config"]["rotary"] = True
    save_checkpoint(tmp_path, state, keep=1)
    start = resume(tmp_path)
    with pytest.raises(UserError, match="has a setting 'rotary', which this program's does not"):
        GPT.from_checkpoint(start.checkpoint)


# -----------------------------------------------------------------------------
# several processes. One pair of them runs all cases: RANK loads each in turn

RANK = """
import os, sys, torch, json
import torch.distributed as dist
from gptlib.checkpoints import start
from gptlib.distributed import World

rank, root = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
sent = []
def broadcast_nest(*args, **options):
    sent.append(1)
    return original(*args, **options)
original, start.broadcast_nest = start.broadcast_nest, broadcast_nest
results = {}
for name, (flags, folders) in json.load(open(f"{root}/cases.json")).items():
    os.chdir(folders[rank])
    sent.clear()
    loaded = start.load_start(flags, World(rank, rank, 2), known=["max_steps"])
    results[name] = {"start": vars(loaded), "was_sent": bool(sent)}
torch.save(results, f"{root}/out{rank}.pt")
dist.destroy_process_group()
"""

RESUME = dict(auto_resume=True, log_dir="log")
WEIGHTS = dict(init_from="log/model_00003.pt")
HF = dict(init_from="hf")


def hugging_face_model(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SIZES, "vocab_size": 257}))


def write_hugging_face(path, seed=0):
    hugging_face_model(seed).save_pretrained(path, make_tokenizer())


def prepare_hosts(root):
    """Working directories of hosts: with a checkpoint and a model, with nothing, with others."""
    names = ("full", "empty", "other", "damaged")
    folders = {name: root / name for name in names}
    for name in names:
        (folders[name] / "log").mkdir(parents=True)
    save_checkpoint(folders["full"] / "log", training_state(), keep=5)
    path = folders["full"] / "log" / "model_00003.pt"
    torch.save({**training_state(4), "step": 3}, folders["other"] / "log" / path.name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    (folders["damaged"] / "log" / path.name).write_bytes(content)

    write_hugging_face(folders["full"] / "hf")
    write_hugging_face(folders["other"] / "hf", seed=1)
    repository = root / "home" / "hub" / "models--gpt2"  # the Hub's cache, which both hosts see
    write_hugging_face(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return {name: str(folder) for name, folder in folders.items()}


CASES = {  # name: (flags, host of rank 1; that of rank 0 is "full", whether tensors are sent)
    "resume, the same file": (RESUME, "full", False),
    "resume, no file": (RESUME, "empty", True),
    "resume, another file": (RESUME, "other", True),
    "resume, a damaged file": (RESUME, "damaged", True),
    "weights, the same file": (WEIGHTS, "full", False),
    "weights, no file": (WEIGHTS, "empty", True),
    "Hugging Face, the same": (HF, "full", False),
    "Hugging Face, none": (HF, "empty", True),
    "Hugging Face, another": (HF, "other", True),
    "gpt2 of the Hub": (dict(init_from="gpt2"), "empty", False),
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """For each rank the results of all cases."""
    root = tmp_path_factory.mktemp("ranks")
    hosts = prepare_hosts(root)
    cases = {name: (flags, (hosts["full"], hosts[other]))
             for name, (flags, other, _) in CASES.items()}
    cases["nothing to resume"] = RESUME, (hosts["empty"], hosts["empty"])
    (root / "cases.json").write_text(json.dumps(cases))
    env = {**environment(), "PYTHONPATH": str(ROOT), "HF_HOME": str(root / "home"),
           "HF_HUB_OFFLINE": "1"}
    processes = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(root)], env=env,
                                  stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        errors = [process.communicate(timeout=1500)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()  # does nothing to one that has ended
    assert [process.returncode for process in processes] == [0, 0], errors
    return [torch.load(root / f"out{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_sent_only_if_they_must_be(two_ranks, case):
    """Guards against sending what a rank could map (1.5 GB took 27 s), and against a rank that
    maps what is not rank 0's: an old or damaged copy on its own disk."""
    was_sent = [results[case]["was_sent"] for results in two_ranks]
    assert was_sent == [CASES[case][2]] * 2


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("resume")])
def test_every_rank_resumes_rank_0s_checkpoint(two_ranks, case):
    """Guards against ranks that go on from different states."""
    expected = training_state()
    for results in two_ranks:
        start = results[case]["start"]
        assert start["resumed"]
        assert start["settings"] == {"max_steps": 60}
        for name in ("model", "config", "tokenizer"):
            assert_same_nest(start["checkpoint"][name], expected[name])
        for name in ("step", "position", "val_loss", "val_step", "optimizer", "scaler", "rng"):
            assert_same_nest(start[name], expected[name], name)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("resume")])
def test_every_rank_starts_from_rank_0s_weights(two_ranks, case):
    """Guards against ranks that start from different weights, or with the training state that
    lies beside them in the file."""
    expected, tokenizer = training_state()["model"], {"name": "gpt2"}
    if not case.startswith("weights"):
        expected = dict(hugging_face_model().state_dict())
        tokenizer = tokenizer_to_dict(make_tokenizer())
    for results in two_ranks:
        start = results[case]["start"]
        assert not start["resumed"]
        assert start["settings"] == dict(n_layer=1, n_head=1, n_embd=8, block_size=8)
        assert start["optimizer"] == []
        assert list(start["checkpoint"]) == ["model", "config", "tokenizer"]
        assert_same_nest(start["checkpoint"]["model"], expected)
        assert start["checkpoint"]["tokenizer"] == tokenizer


def test_nothing_to_resume_on_two_ranks(two_ranks):
    """Guards against a rank that waits for a checkpoint where there is none yet."""
    for results in two_ranks:
        assert results["nothing to resume"]["start"]["checkpoint"] is None
        assert not results["nothing to resume"]["was_sent"]


def test_a_shared_tensor_is_sent_once():
    """Guards against sending embedding and head, one tensor, twice: it is the largest of all."""
    weight = torch.ones(2, 3)
    skeleton, tensors = split_tensors({"wte": weight, "head": weight, "t": weight.t(),
                                       "empty": torch.zeros(0)})
    assert skeleton["wte"] is skeleton["head"]
    assert len(tensors) == 3
    assert tensors[skeleton["t"].index].shape == (3, 2)
