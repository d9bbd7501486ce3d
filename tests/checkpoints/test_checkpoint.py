"""Checkpoint files: what is damaged or missing is refused, and every rank gets the same checkpoint.

    python -m pytest tests/checkpoints/test_checkpoint.py
"""

import copy
import dataclasses
import re
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, environment

from gptlib.checkpoints import verified_file as checkpoint_file
from gptlib.distributed import split_tensors
from gptlib.checkpoints.formats import copy_to_host, load_checkpoint, load_initial_checkpoint, save_checkpoint
from gptlib.common import UserError
from gptlib.distributed import World
from train_gpt2 import GPT, GPTConfig

SIZES = dict(block_size=8, vocab_size=61, n_layer=1, n_head=1, n_embd=8)


def training_state(step=3):
    """A small checkpoint with all that a run saves."""
    torch.manual_seed(step)
    model = GPT(GPTConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randint(61, (2, 8)), torch.randint(61, (2, 8)))[1].backward()
    optimizer.step()
    return dict(
        version=1, model=model.state_dict(), config=dataclasses.asdict(model.config),
        optimizer=[optimizer.state_dict()], scaler={}, rng=[{"cpu": torch.get_rng_state()}],
        train_config={**SIZES, "preset": "demo", "max_steps": 60}, tokenizer={"name": "gpt2"},
        step=step, position=step * 16, val_loss=2.5, val_step=step)


def assert_same_nest(ours, theirs, path="checkpoint"):
    """Equal structure, and tensors equal bit for bit."""
    if torch.is_tensor(theirs):
        assert ours.dtype == theirs.dtype, path
        assert torch.equal(ours, theirs), path
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), path
        for key in theirs:
            assert_same_nest(ours[key], theirs[key], f"{path}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), path
        for i, value in enumerate(theirs):
            assert_same_nest(ours[i], value, f"{path}[{i}]")
    else:
        assert ours == theirs, path


# -----------------------------------------------------------------------------
# damaged files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(its bytes, what is in it, {record name: (offset, size)}, the model's record names) of a
    small checkpoint."""
    path = tmp_path_factory.mktemp("saved") / "model_00003.pt"
    state = training_state()
    torch.save(state, path)
    content = path.read_bytes()
    records = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name_length, extra_length = struct.unpack_from("<HH", content, info.header_offset + 26)
            offset = info.header_offset + 30 + name_length + extra_length
            records[info.filename.partition("/")[2]] = (offset, info.file_size)
    # the model is saved first: as many records as it has tensors, less the head, which is the embedding
    n_tensors = len(state["model"]) - 1
    return content, state, records, [f"data/{i}" for i in range(n_tensors)]


def damage(content, start, size, kind, rng):
    """The bytes with `size` of them from `start` on damaged; None where that would change
    nothing."""
    content = bytearray(content)
    before = bytes(content)
    if kind == "flip":
        content[start + rng.integers(size)] ^= 1 << rng.integers(8)
    elif kind == "zero":
        content[start:start + size] = bytes(size)
    else:
        content[start:start + size] = rng.bytes(size)
    return bytes(content) if content != before else None


@pytest.mark.parametrize("kind", ["flip", "zero", "random"])
def test_every_damaged_record_is_refused(saved, tmp_path, kind):
    """torch.load does not look at the checksums: damaged weights, optimizer state or positions
    loaded in silence."""
    content, _, records, model_records = saved
    rng = np.random.default_rng(0)
    path = tmp_path / "model_00003.pt"
    n_refused = 0
    for name, (offset, size) in records.items():
        damaged = damage(content, offset, size, kind, rng) if size else None
        if damaged is None:
            continue
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is no checkpoint that can be read") as error:
            load_checkpoint(path)
        assert f"'{path}'" in str(error.value)
        assert f"record '{name}'" in str(error.value)
        n_refused += 1
        if name in model_records or not name.startswith("data/"):
            with pytest.raises(UserError, match=f"record '{name}'"):
                load_checkpoint(path, mmap=True)
    assert n_refused > len(model_records) * 2, "the optimizer's records are not among them"


@pytest.mark.parametrize("kind", ["flip", "random"])
def test_mapped_loading_needs_the_model_alone(saved, tmp_path, kind):
    """Inference must neither read nor refuse for the optimizer's state, which is twice the
    weights."""
    content, state, records, model_records = saved
    rng = np.random.default_rng(0)
    path = tmp_path / "model_00003.pt"
    others = [name for name in records if name.startswith("data/") and name not in model_records]
    assert others
    for name in others:
        path.write_bytes(damage(content, *records[name], kind, rng))
        assert_same_nest(load_checkpoint(path, mmap=True)["model"], state["model"])


@pytest.mark.parametrize("mmap", [False, True])
def test_a_damaged_container_is_refused_or_loads_equal(saved, tmp_path, mmap):
    """Sizes, names and places of the records: a wrong one can make another tensor of the same
    bytes."""
    content, state, records, _ = saved
    payload = np.zeros(len(content), dtype=bool)
    for offset, size in records.values():
        payload[offset:offset + size] = True
    rng = np.random.default_rng(1)
    container = np.flatnonzero(~payload)
    directory = container[container > max(offset + size for offset, size in records.values())]
    positions = [*rng.choice(directory, 400, replace=False), *rng.choice(container, 200, replace=False)]
    path = tmp_path / "model_00003.pt"
    n_refused = 0
    for position in positions:
        path.write_bytes(damage(content, position, 1, "flip", rng))
        try:
            checkpoint = load_checkpoint(path, mmap=mmap)
        except UserError:
            n_refused += 1
            continue
        assert_same_nest(checkpoint, state, f"checkpoint with byte {position} changed")
    assert n_refused > 200, "of the directory's fields most matter"


@pytest.mark.parametrize("mmap", [False, True])
def test_a_record_marked_as_a_folder_is_refused(saved, tmp_path, mmap):
    """One bit of the directory, and torch.load takes uninitialized memory for the tensor."""
    content, *_ = saved
    content = bytearray(content)
    entry = content.index(b"model_00003/data/2PK") - 46  # the name follows the entry's 46 bytes
    content[entry + 38] |= 0x10
    path = tmp_path / "model_00003.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="record 'data/2' is damaged: the archive says that it is a folder"):
        load_checkpoint(path, mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_truncated_files_are_refused(saved, tmp_path, mmap):
    """A disk that filled, or a copy that was cut short, has to give one line that names the
    file."""
    content, *_ = saved
    path = tmp_path / "model_00003.pt"
    for length in [*range(0, len(content), len(content) // 50), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="is no checkpoint that can be read") as error:
            load_checkpoint(path, mmap=mmap)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("mmap", [False, True])
def test_swapped_records_are_refused(saved, tmp_path, mmap):
    """Two entries of the directory exchange their names: every checksum is right, but of another
    tensor's bytes."""
    content, _, records, _ = saved
    first, second = b"/data/2PK", b"/data/3PK"  # of the same size; in the directory the next entry follows the name
    assert records["data/2"][1] == records["data/3"][1]
    assert content.count(first) == content.count(second) == 1
    swapped = content.replace(first, b"/data/xPK").replace(second, first).replace(b"/data/xPK", second)
    path = tmp_path / "model_00003.pt"
    path.write_bytes(swapped)
    with pytest.raises(UserError, match="its header is not where the archive's directory says"):
        load_checkpoint(path, mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_checksums_that_were_not_recorded_pass(tmp_path, mmap):
    """torch can be told to write no checksums: a 0 everywhere is not damage."""
    state = training_state()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint_file.directory_identity(tmp_path / "a.pt") is None
    assert_same_nest(load_checkpoint(tmp_path / "a.pt", mmap=mmap), state)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_in_the_format_of_old_torch_loads(tmp_path, mmap):
    """Files from before torch 1.6 are no zip archives and have no checksums."""
    state = training_state()
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_same_nest(load_checkpoint(tmp_path / "a.pt", mmap=mmap), state)


def test_without_offsets_every_record_is_verified(saved, tmp_path, monkeypatch):
    """Where torch does not tell which records the model uses, a damaged one must not slip
    through."""
    content, state, records, model_records = saved
    path = tmp_path / "model_00003.pt"
    path.write_bytes(damage(content, *records[model_records[-1]], "flip", np.random.default_rng(0)))
    load = checkpoint_file.load_without_executing

    def load_without_offsets(path, device, mmap):
        return copy.deepcopy(state) if device == "meta" else load(path, device, mmap)

    monkeypatch.setattr(checkpoint_file, "load_without_executing", load_without_offsets)
    with pytest.raises(UserError, match=f"record '{model_records[-1]}'"):
        load_checkpoint(path, mmap=True)


def test_auto_resume_skips_damaged_checkpoints(tmp_path, capsys):
    """One flipped byte in the newest checkpoint's optimizer state must cost the steps since the
    one before, no more."""
    for step in (3, 4):
        save_checkpoint(tmp_path, training_state(step), keep=5)
    newest = tmp_path / "model_00004.pt"
    content = bytearray(newest.read_bytes())
    moments = training_state(4)["optimizer"][0]["state"][0]["exp_avg"]
    content[content.index(moments.numpy().tobytes())] ^= 1
    newest.write_bytes(content)
    checkpoint = load_initial_checkpoint(dict(auto_resume=True, log_dir=str(tmp_path)), World())
    assert checkpoint["step"] == 3
    assert f"skipping {newest}" in capsys.readouterr().err
    assert "preset" not in checkpoint["train_config"]


def test_auto_resume_skips_what_has_no_training_state(tmp_path, capsys):
    """A checkpoint of another program under our name has weights alone: it can't be resumed."""
    save_checkpoint(tmp_path, training_state(3), keep=5)
    state = training_state(4)
    del state["position"]
    torch.save(state, tmp_path / "model_00004.pt")
    checkpoint = load_initial_checkpoint(dict(auto_resume=True, log_dir=str(tmp_path)), World())
    assert checkpoint["step"] == 3
    assert "no training state to resume (position is missing)" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# formats


def test_all_prefixes_of_ddp_and_compile(tmp_path):
    """A model saved from inside DDP or torch.compile has their prefixes, which are not ours."""
    model = GPT(GPTConfig(**SIZES))
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
        torch.save({"model": state, "config": dataclasses.asdict(model.config)}, tmp_path / "a.pt")
        assert load_checkpoint(tmp_path / "a.pt")["model"].keys() == model.state_dict().keys()


@pytest.mark.parametrize("change, message", [
    (lambda c: c.pop("model"), "is no checkpoint of a GPT: it has no model"),
    (lambda c: c.pop("model_args"), "is no checkpoint of a GPT: it has no config"),
    (lambda c: c.update(model_args=3), "is no checkpoint of a GPT: it has no config"),
    (lambda c: c["model_args"].pop("n_head"), "is no checkpoint of a GPT: it has no n_head"),
    (lambda c: c["model"].pop("transformer.h.0.ln_1.bias"),
     'Missing key(s) in state_dict: "transformer.h.0.ln_1.bias"'),
    (lambda c: c["model"].update({"head.weight": torch.zeros(1)}),
     'Unexpected key(s) in state_dict: "head.weight"'),
    (lambda c: c["model_args"].update(n_embd=16), "size mismatch for transformer.wte.weight"),
])
def test_what_is_missing_is_named(tmp_path, change, message):
    """A file of another model has to be refused in one short line, with what it lacks."""
    model_args = {**SIZES, "bias": True, "dropout": 0.0}
    contents = {"model": GPT(GPTConfig(**SIZES)).state_dict(), "model_args": model_args}
    GPT.from_checkpoint({"model": contents["model"], "config": SIZES})
    change(contents)
    torch.save(contents, tmp_path / "a.pt")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        GPT.from_checkpoint(load_checkpoint(tmp_path / "a.pt"))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("contents", [3, None, [1], torch.zeros(2), {"model": torch.zeros(2), "config": SIZES}])
@pytest.mark.parametrize("mmap", [False, True])
def test_an_object_of_another_kind_is_refused(tmp_path, contents, mmap):
    """torch.save writes anything: what is no dict of a model must not become a traceback."""
    torch.save(contents, tmp_path / "a.pt")
    with pytest.raises(UserError, match="is no checkpoint of a GPT: it has no model"):
        load_checkpoint(tmp_path / "a.pt", mmap=mmap)


# -----------------------------------------------------------------------------
# save


def test_the_copy_to_save_shares_what_the_state_shares():
    """The embedding is the head: a copy of each would double the largest tensor, in memory and in
    the file."""
    weight = torch.ones(3)
    copied = copy_to_host({"model": {"wte": weight, "head": weight}, "rng": (torch.zeros(1), 5)})
    weight.zero_()
    assert copied["model"]["wte"].sum() == 3
    assert copied["model"]["head"] is copied["model"]["wte"]
    assert copied["rng"] == (torch.zeros(1), 5)


def test_latest_checkpoint_without_symbolic_links(tmp_path, monkeypatch):
    """Windows and some network drives have no symbolic links: a copy takes the name then."""
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    for step in (3, 4):
        save_checkpoint(tmp_path, training_state(step), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest_checkpoint.pt", "model_00004.pt"]
    assert load_checkpoint(tmp_path / "latest_checkpoint.pt")["step"] == 4


# -----------------------------------------------------------------------------
# several processes

RANK = """
import os, sys, torch, json
import torch.distributed as dist
from gptlib.checkpoints import formats as checkpoint
from gptlib.distributed import World
rank, store, flags, out, folder = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4], sys.argv[5]
os.chdir(folder)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
sent = []
def broadcast_nest(*args, **options):
    sent.append(1)
    return original(*args, **options)
original, checkpoint.broadcast_nest = checkpoint.broadcast_nest, broadcast_nest
loaded = checkpoint.load_initial_checkpoint(flags, World(rank, rank, 2))
torch.save({"loaded": loaded, "was_sent": bool(sent)}, out)
dist.destroy_process_group()
"""


def load_on_two_ranks(tmp_path, flags, folders):
    """What load_initial_checkpoint returns on two processes, run in these folders; and whether
    tensors were sent."""
    import json
    processes, outs = [], []
    for rank, folder in enumerate(folders):
        outs.append(tmp_path / f"out{rank}.pt")
        argv = [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), json.dumps(flags), str(outs[-1])]
        env = {**environment(), "PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen([*argv, str(folder)], env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    results = [torch.load(out, weights_only=True) for out in outs]
    assert results[0]["was_sent"] == results[1]["was_sent"]
    return [result["loaded"] for result in results], results[0]["was_sent"]


@pytest.fixture
def two_folders(tmp_path):
    """Two hosts' working directories; the first has log/model_00003.pt."""
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
    (folders[0] / "log").mkdir()
    save_checkpoint(folders[0] / "log", training_state(), keep=5)
    return folders


RESUME = dict(auto_resume=True, log_dir="log")


def assert_resumed(loaded):
    expected = training_state()
    del expected["train_config"]["preset"]
    for checkpoint in loaded:
        assert_same_nest(checkpoint, expected)


def test_ranks_that_see_the_same_file_map_it(tmp_path, two_folders):
    """Pickling a checkpoint to every rank took 27 s and four copies of it for 1.5 GB."""
    loaded, was_sent = load_on_two_ranks(tmp_path, RESUME, [two_folders[0], two_folders[0]])
    assert not was_sent
    assert_resumed(loaded)


def test_a_rank_that_sees_no_file_receives_it(tmp_path, two_folders):
    """Another host may not see rank 0's disk; what it receives has to be equal bit for bit."""
    loaded, was_sent = load_on_two_ranks(tmp_path, RESUME, two_folders)
    assert was_sent
    assert_resumed(loaded)


@pytest.mark.parametrize("kind", ["other", "damaged"])
def test_a_rank_that_sees_another_file_receives_it(tmp_path, two_folders, kind):
    """Old or damaged copies of the same name on a host's own disk would let its replica start from
    other weights."""
    (two_folders[1] / "log").mkdir()
    path = two_folders[1] / "log" / "model_00003.pt"
    content = bytearray((two_folders[0] / "log" / "model_00003.pt").read_bytes())
    if kind == "other":
        torch.save({**training_state(4), "step": 3}, path)
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    loaded, was_sent = load_on_two_ranks(tmp_path, RESUME, two_folders)
    assert was_sent
    assert_resumed(loaded)


@pytest.mark.parametrize("sees_file", [True, False])
def test_weights_to_start_from_on_two_ranks(tmp_path, two_folders, sees_file):
    """--init_from takes model, config and tokenizer, without the training state of the file."""
    flags = dict(init_from="log/model_00003.pt")
    loaded, was_sent = load_on_two_ranks(tmp_path, flags, [two_folders[0], two_folders[0 if sees_file else 1]])
    assert was_sent != sees_file
    expected = {key: training_state()[key] for key in ("model", "config", "tokenizer")}
    expected["train_config"] = dict(n_layer=1, n_head=1, n_embd=8, block_size=8)
    for checkpoint in loaded:
        assert_same_nest(checkpoint, expected)


def write_hugging_face(path, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SIZES))
    model.save_pretrained(path)
    return model


def assert_started_from(model, loaded):
    for checkpoint in loaded:
        assert checkpoint["tokenizer"] == {"name": "gpt2"}
        assert_same_nest(checkpoint["model"], dict(model.state_dict()))


@pytest.mark.parametrize("other", ["the same", "nothing", "another"])
def test_hugging_face_weights_on_two_ranks(tmp_path, two_folders, other):
    """A rank that is sent what it could map, or that starts from another model, which its own host
    has under the same name."""
    model = write_hugging_face(two_folders[0] / "hf")
    if other == "another":
        write_hugging_face(two_folders[1] / "hf", seed=1)
    folders = [two_folders[0], two_folders[0 if other == "the same" else 1]]
    loaded, was_sent = load_on_two_ranks(tmp_path, dict(init_from="hf"), folders)
    assert was_sent == (other != "the same")
    assert_started_from(model, loaded)


def test_a_downloaded_gpt2_is_mapped_on_two_ranks(tmp_path, two_folders, monkeypatch):
    """A name that only rank 0 can turn into files: the others would receive all of gpt2-xl."""
    repository = tmp_path / "home" / "hub" / "models--gpt2"
    model = write_hugging_face(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded, was_sent = load_on_two_ranks(tmp_path, dict(init_from="gpt2"), two_folders)
    assert not was_sent
    assert_started_from(model, loaded)


def test_nothing_to_resume_on_two_ranks(tmp_path, two_folders):
    """The first start with --auto_resume finds nothing: every rank starts from scratch."""
    loaded, was_sent = load_on_two_ranks(tmp_path, RESUME, [two_folders[1], two_folders[1]])
    assert loaded == [None, None]
    assert not was_sent


def test_a_shared_tensor_is_sent_once():
    """Embedding and head are one tensor: sent twice, the largest of them would take twice the time
    and memory."""
    weight = torch.ones(2, 3)
    skeleton, tensors = split_tensors({"wte": weight, "head": weight, "t": weight.t(), "empty": torch.zeros(0)})
    assert skeleton["wte"] is skeleton["head"]
    assert len(tensors) == 3
    assert tensors[skeleton["t"].index].shape == (3, 2)
