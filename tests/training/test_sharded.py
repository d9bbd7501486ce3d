"""A sharded model trains, stops, goes on and is saved as one process does all of this.

    python -m pytest tests/training/test_sharded.py
"""

import contextlib
import functools
import json
import os
import shutil

import pytest
import torch
from conftest import TINY, english, run, write_dataset, write_hellaswag

from gptlib.checkpoints.formats import load_checkpoint
from gptlib.checkpoints.start import choose_checkpoint
from gptlib.common import UserError
from gptlib.data.tokenizer import export_tokenizer, load_tokenizer
from inference import load_for_sampling
from interop_helpers import hugging_face
from sharded_runs import run_all

CHECKS = ["muon_replicated", "muon_sharded", "muon_in_parts", "initial_weights", "compiled_blocks",
          "blocks_give_their_weights_back", "one_batch_size", "training_goes_on", "full_disk",
          "separate_disks", "copies_wait_as_the_world_does", "memory_of_a_start",
          "memory_of_hugging_face"]

# Ten rows of 32 tokens in micro-batches of three: ranks get different numbers of them, and of
# HellaSwag's examples. Checkpoints are written at steps 2, 4 and 6.
BASE = {**TINY, "n_layer": 3, "total_batch_size": 320, "batch_size": 3, "max_steps": 6,
        "checkpoint_interval": 2, "keep_checkpoints": 0, "hellaswag_examples": 20}
MUON = {"optimizer": "muon"}
HUGGING_FACE = ["hf_one_file", "hf_several", "hf_pickle", "hf_half"]


def write_hugging_face(root, tokenizer):
    """A GPT-2 of transformers' in the directories of HUGGING_FACE."""
    hf = hugging_face(257, n_layer=3, block_size=32)
    hf.transformer.save_pretrained(root / "hf_one_file")  # names without "transformer.", as gpt2's
    hf.save_pretrained(root / "hf_several", max_shard_size="20KB")
    hf.config.save_pretrained(root / "hf_pickle")
    torch.save(hf.state_dict(), root / "hf_pickle" / "pytorch_model.bin")
    hf.to(torch.bfloat16).save_pretrained(root / "hf_half")
    for name in HUGGING_FACE:
        export_tokenizer(tokenizer, root / name, 32)


@pytest.fixture(scope="module")
def root(tmp_path_factory, one_thread):
    """A folder with the logs of all runs, each named in the dicts below; those of one process run
    in this one."""
    root = tmp_path_factory.mktemp("sharded")
    base = {**BASE, "hellaswag_data": str(root / "hella.jsonl"), "data_root": str(root / "data")}
    write_dataset(root / "data", [english(3001, 1), english(2000, 2)], [english(1500, 3)])
    write_hellaswag(root / "hella.jsonl")
    write_hugging_face(root, load_tokenizer(root / "data"))

    def train(nproc, **runs):
        named = [{**base, "log_dir": name, **run} for name, run in runs.items()]
        (root / "runs.json").write_text(json.dumps(named))
        if nproc == 1:
            with contextlib.chdir(root):
                return run_all("runs.json")
        done = run("tests/sharded_runs.py", "runs.json", cwd=root, nproc=nproc)
        assert done.returncode == 0, done.stderr[-3000:]

    def resume(path):
        return dict(resume=True, checkpoint_path=path)

    train(1, one_adamw={}, one_muon=MUON)
    train(2,
          two_adamw=dict(shard=True, recompute=True),
          two_muon=dict(shard=True, largest_file=0, keep_checkpoints=2, **MUON),
          two_ddp=dict(recompute=True, **MUON),
          one_to_two=dict(shard=True, **MUON, **resume("one_muon/model_00002.pt")),
          half=dict(shard=True, dtype="bfloat16"),
          scaled=dict(shard=True, dtype="float16", **MUON),
          searched=dict(shard=True, max_steps=1, batch_size=0),
          one_row=dict(shard=True, max_steps=1, val_tokens=base["block_size"]),
          started=dict(shard=True, max_steps=1, init_from="two_muon/model_00004.pt"),
          **{f"from_{name}": dict(shard=True, max_steps=1, max_lr=0.0, init_from=name)
             for name in HUGGING_FACE})
    train(4,
          four_adamw=dict(shard=True, shard_ranks=2, recompute=True, recompute_every=2),
          four_muon=dict(shard=True, reduce_each=True, **MUON),
          two_to_four=dict(shard=True, **MUON, **resume("two_muon/model_00004.pt")),
          two_to_ddp=dict(shard=False, recompute=False, **resume("two_adamw/model_00002.pt")))
    train(1,
          half_one=dict(dtype="bfloat16"),
          scaled_one=dict(dtype="float16", **MUON),
          one_step=dict(max_steps=1),
          one_row_alone=dict(max_steps=1, val_tokens=base["block_size"]),
          two_to_one=dict(shard=False, recompute=False, **resume("two_adamw/model_00002.pt")),
          directory_to_one=dict(shard=False, **MUON, **resume("two_muon/model_00004.pt")))
    return root


def figures(log_dir, *names):
    """{(step, kind): value} of a log: a figure of the training steps, and losses and accuracies."""
    found = {}
    for line in (log_dir / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in names:
            if name in record and record.get("kind") in ("train", "val", "hella"):
                found[record["step"], record["kind"], name] = record[name]
    return found


def assert_same_course(root, run, reference, first_step=0, rel=2e-5, other_choices=0):
    """Loss, gradient norm, validation and HellaSwag of each step from first_step on.

    other_choices: of how many of HellaSwag's questions rounding may change the answer.
    """
    names = ("loss", "norm", "acc", "acc_norm")
    ours, theirs = figures(root / run, *names), figures(root / reference, *names)
    theirs = {key: value for key, value in theirs.items() if key[0] > first_step or key in ours}
    assert min(step for step, _, _ in ours) == first_step
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        absolute = other_choices / BASE["hellaswag_examples"] if key[1] == "hella" else 0
        assert value == pytest.approx(theirs[key], rel=rel, abs=absolute + 1e-5), key


# -----------------------------------------------------------------------------
# the same course


@pytest.mark.parametrize("run", ["two_adamw", "four_adamw"])
def test_sharded_adamw_equals_one_process(root, run):
    """Guards against gradients that are added up twice or too little, a clip by a rank's own norm,
    ranks that read other tokens, or recomputed activations that differ."""
    assert_same_course(root, run, "one_adamw", rel=3e-6)


def test_a_rank_without_validation_rows_takes_part(root):
    """Guards against two processes that wait for each other: one gathers weights, the other asks
    who does."""
    assert_same_course(root, "one_row", "one_row_alone", rel=3e-6)


def test_a_batch_size_is_found_for_a_sharded_run(root):
    """Guards against a --batch_size 0 that is refused, or of which each rank takes a size of its
    own and they hang."""
    assert_same_course(root, "searched", "one_step", rel=3e-6)


# Newton-Schulz computes in bfloat16: a last digit of the gradients shows in the sixth of the loss
@pytest.mark.parametrize("run", ["two_muon", "four_muon", "two_ddp"])
def test_muon_of_several_processes_equals_one(root, run):
    """Guards against an update of rows instead of whole matrices, which drifts by percents."""
    assert_same_course(root, run, "one_muon", rel=1e-4)


def test_sharded_bfloat16_follows_one_process(root):
    """Guards against sharded weights in bfloat16, which lose the small updates; autocast keeps
    float32."""
    assert_same_course(root, "half", "half_one", rel=2e-2, other_choices=2)
    state = torch.load(root / "half" / "model_00006.pt", weights_only=True)
    assert {tensor.dtype for tensor in state["model"].values()} == {torch.float32}


def test_sharded_float16_skips_the_same_steps(root):
    """Guards against a rank that finds no overflow in its own rows and goes on with another scale
    than the others."""
    assert_same_course(root, "scaled", "scaled_one", rel=2e-2, other_choices=2)
    states = [torch.load(root / name / "model_00006.pt", weights_only=True)
              for name in ("scaled", "scaled_one")]
    assert states[0]["scaler"] == states[1]["scaler"]


@pytest.mark.parametrize("run, reference, step", [
    ("one_to_two", "one_muon", 2), ("two_to_one", "one_adamw", 2), ("two_to_ddp", "one_adamw", 2),
    ("two_to_four", "one_muon", 4), ("directory_to_one", "one_muon", 4)])
def test_a_run_goes_on_in_another_layout(root, run, reference, step):
    """Guards against a moment, a position or a random state that is lost if the number of ranks,
    the layout or the kind of checkpoint changes."""
    assert_same_course(root, run, reference, first_step=step, rel=1e-4)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_sharded_run_starts_from_hugging_face(root, name):
    """Guards against rows of a matrix that should have been transposed, of another file, or half
    of a tie. The only step has a learning rate of 0: the weights saved are those of the start."""
    ours = torch.load(root / f"from_{name}" / "model_00001.pt", weights_only=True)["model"]
    theirs = load_checkpoint(root / name)["model"]
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor.float(), rtol=0, atol=0)


@pytest.mark.parametrize("check", CHECKS)
def test_in_several_processes(checks, check):
    """Guards against what the function of that name in sharded_checks.py says."""
    for rank, results in enumerate(checks):
        assert results.get(check, "was not reached") == "ok", f"rank {rank}: {results.get(check)}"


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """The results of each rank: {check: "ok" or a traceback}."""
    folder = tmp_path_factory.mktemp("checks")
    done = run("tests/sharded_checks.py", folder, *CHECKS, cwd=folder, nproc=3)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


# -----------------------------------------------------------------------------
# checkpoints


def test_the_file_of_a_sharded_run_is_an_ordinary_one(root):
    """Guards against a file that only sharded runs can read, or that holds the tied matrix
    twice."""
    ours = torch.load(root / "two_adamw" / "model_00006.pt", weights_only=True)
    theirs = torch.load(root / "one_adamw" / "model_00006.pt", weights_only=True)
    assert ours.keys() == theirs.keys()
    assert ours["position"] == theirs["position"]
    for name, tensor in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], tensor, rtol=0, atol=1e-3)
    for i, state in theirs["optimizer"][0]["state"].items():
        found = ours["optimizer"][0]["state"][i]
        for name, tensor in state.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-5)
    wte, head = (ours["model"][name] for name in ("transformer.wte.weight", "lm_head.weight"))
    assert wte.data_ptr() == head.data_ptr()


@pytest.fixture
def directory(root, tmp_path):
    """A copy of the folder with a directory checkpoint of steps 4 and 6; the path of the last."""
    shutil.copytree(root / "two_muon", tmp_path / "log", symlinks=True)
    return tmp_path / "log" / "model_00006.pt"


def test_a_directory_holds_what_a_file_would(root, directory):
    """Guards against a directory that is read with rows in another order, or without some of the
    state."""
    ours = load_checkpoint(directory)
    theirs = load_checkpoint(root / "one_muon" / "model_00006.pt")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], tensor, rtol=0, atol=1e-2)
    for number, optimizer in enumerate(theirs["optimizer"]):
        for i, state in optimizer["state"].items():
            for name, tensor in state.items():
                found = ours["optimizer"][number]["state"][i][name]
                torch.testing.assert_close(found, tensor, rtol=0, atol=1e-2)


def test_a_directory_holds_the_embedding_once(directory):
    """Guards against a tie that is lost, which takes disk and memory of the largest tensor
    twice."""
    model = load_checkpoint(directory)["model"]
    assert model["transformer.wte.weight"].data_ptr() == model["lm_head.weight"].data_ptr()


def test_only_the_newest_directories_stay(directory):
    """Guards against directories that pile up, or a latest_checkpoint.pt that names none of
    them."""
    names = sorted(path.name for path in directory.parent.glob("model_*"))
    assert names == ["model_00004.pt", "model_00006.pt"]
    assert os.readlink(directory.parent / "latest_checkpoint.pt") == "model_00006.pt"


def test_inference_reads_a_directory(directory):
    """Guards against commands that take a file and not what a larger run wrote."""
    loaded = load_for_sampling(directory.parent / "latest_checkpoint.pt", "cpu", "float32")
    assert loaded.step == 6
    expected = load_checkpoint(directory)["model"]["transformer.h.2.mlp.c_fc.weight"]
    assert torch.equal(loaded.model.transformer.h[2].mlp.c_fc.weight, expected)


@pytest.mark.parametrize("largest", ["1GB", "50KB"])
def test_a_directory_is_exported_for_transformers(directory, tmp_path, monkeypatch, largest):
    """Guards against an export that knows only files, or that loses those of the weights but the
    first."""
    from transformers import GPT2LMHeadModel
    save = functools.partialmethod(GPT2LMHeadModel.save_pretrained, max_shard_size=largest)
    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", save)
    loaded = load_for_sampling(directory, "cpu", "float32")
    loaded.model.save_pretrained(tmp_path / "export", loaded.tokenizer)
    assert len(list(tmp_path.glob("export/*.safetensors"))) == (1 if largest == "1GB" else 5)
    idx = torch.randint(257, (2, 32))
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "export")(idx).logits
    ours = loaded.model(idx)[0][..., :257]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "changed": flip_a_byte,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "state.pt"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_directory_is_skipped(directory, capsys, name, damage):
    """Guards against damaged bytes that become wrong weights in silence, or end a run that has
    another checkpoint."""
    DAMAGE[damage](directory / name)
    if directory.joinpath("state.pt").exists():
        with pytest.raises(UserError, match=name):
            load_checkpoint(directory)
    offer = choose_checkpoint(dict(auto_resume=True, log_dir=str(directory.parent)))
    assert offer.checkpoint["step"] == 4
    assert "skipping" in capsys.readouterr().err


def test_a_rank_killed_while_saving_spoils_nothing(tmp_path):
    """Guards against a checkpoint that has its name before all ranks have written it, or an earlier
    one that is removed before the next is whole."""
    done = run("tests/sharded_checks.py", tmp_path, "die_while_saving", cwd=tmp_path, nproc=2)
    assert done.returncode != 0
    folder = tmp_path / "die_while_saving"
    assert [path.name for path in folder.glob("model_*.pt")] == ["model_00001.pt"]
    assert load_checkpoint(folder / "latest_checkpoint.pt")["step"] == 1


def test_all_checkpoints_stay_with_keep_0(root):
    """Guards against a --keep_checkpoints 0, which keeps all, that removes every one."""
    names = sorted(path.name for path in (root / "one_adamw").glob("model_*"))
    assert names == ["model_00002.pt", "model_00004.pt", "model_00006.pt"]
