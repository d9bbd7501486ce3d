"""What is no checkpoint of a GPT is refused in one line, by every command, and nothing in it runs.

    python -m pytest tests/checkpoints/test_hostile.py

One table of hostile checkpoints of every format goes through every door: load_checkpoint,
inference.py, serve.py, hellaswag.py and train_gpt2.py --init_from.
"""

import contextlib
import dataclasses
import os

import pytest
import torch
from byte_model import make_tokenizer
from interop_helpers import hugging_face, main_of, write_checkpoint_directory

import hellaswag
import inference
import serve
import train_gpt2
from gptlib.checkpoints.formats import load_checkpoint
from gptlib.common import UserError
from gptlib.data.tokenizer import export_tokenizer, tokenizer_to_dict
from train_gpt2 import GPT, GPTConfig

SIZES = dict(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=16)
OWNED = "owned"  # the folder that a hostile pickle makes in the working directory


class MakeFolder:
    """A pickle that makes a directory when it is loaded the way pickles are."""

    def __reduce__(self):
        return os.mkdir, (OWNED,)


# -----------------------------------------------------------------------------
# hostile checkpoints: functions that write one into a folder and return its path


def contents_of(kind):
    """What a whole checkpoint of a kind of file holds."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    contents = {"model": model.state_dict(), "tokenizer": tokenizer_to_dict(make_tokenizer())}
    if kind == "nanoGPT":
        return {**contents, "model_args": {**SIZES, "bias": True, "dropout": 0.0}}
    return {**contents, "config": dataclasses.asdict(model.config)}


def file(change, kind="ours"):
    """A file whose contents `change` has changed, in place or by returning others."""
    def write(folder):
        contents = contents_of(kind)
        changed = change(contents)
        torch.save(contents if changed is None else changed[0], folder / "hostile.pt")
        return folder / "hostile.pt"
    return write


def directory(change):
    """A checkpoint directory of a sharded run that change(path) has changed."""
    def write(folder):
        path = write_checkpoint_directory(folder / "hostile.pt", contents_of("ours"))
        change(path)
        return path
    return write


def hugging_face_directory(change):
    """A Hugging Face directory that change(path) has changed."""
    def write(folder):
        path = folder / "hostile"
        hugging_face(257).save_pretrained(path)
        export_tokenizer(make_tokenizer(), path, 32)
        change(path)
        return path
    return write


def pickle_weights(path):
    (path / "model.safetensors").unlink()
    torch.save(MakeFolder(), path / "pytorch_model.bin")


def another_model(path):
    import transformers
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16,
                                      num_hidden_layers=1, num_attention_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(path)


def clear(path):
    for file in path.iterdir():
        file.unlink()


def set_item(*keys):
    """A change: contents[key][key]... = the last of `keys`."""
    *keys, last, value = keys

    def change(contents):
        for key in keys:
            contents = contents[key]
        contents[last] = value
    return change


def drop(*keys):
    *keys, last = keys

    def change(contents):
        for key in keys:
            contents = contents[key]
        del contents[last]
    return change


RUNS = "it asks for posix.mkdir to be run, which is refused"
NO_MODEL = "is no checkpoint of a GPT: it has no model"
NO_CONFIG = "is no checkpoint of a GPT: it has no config"
FIT = "the checkpoint's weights do not fit its config: "
LN_1 = "transformer.h.0.ln_1.bias"

HOSTILE = {  # name: (function that writes it, what the line says)
    # code that would run
    "code in config": (file(set_item("config", MakeFolder())), RUNS),
    "code in model_args": (file(set_item("model_args", MakeFolder()), "nanoGPT"), RUNS),
    "code in model": (file(set_item("model", "transformer", MakeFolder())), RUNS),
    "code in tokenizer": (file(set_item("tokenizer", MakeFolder())), RUNS),
    "code in a Hugging Face directory": (
        hugging_face_directory(pickle_weights), "could be loaded"),
    # another object
    "a number": (file(lambda _: [3]), NO_MODEL),
    "nothing": (file(lambda _: [None]), NO_MODEL),
    "a list": (file(lambda _: [[1]]), NO_MODEL),
    "a tensor": (file(lambda _: [torch.zeros(2)]), NO_MODEL),
    # something is missing
    "no model": (file(drop("model")), NO_MODEL),
    "a tensor for a model": (file(set_item("model", torch.zeros(2))), NO_MODEL),
    "no config": (file(drop("config")), NO_CONFIG),
    "no model_args": (file(drop("model_args"), "nanoGPT"), NO_CONFIG),
    "a number for model_args": (file(set_item("model_args", 3), "nanoGPT"), NO_CONFIG),
    "no n_head": (file(drop("config", "n_head")), "it has no n_head"),
    "no n_head in model_args": (file(drop("model_args", "n_head"), "nanoGPT"), "it has no n_head"),
    "a weight is missing": (file(drop("model", LN_1)), f'Missing key.*"{LN_1}"'),
    "an empty Hugging Face directory": (hugging_face_directory(clear), "could be loaded"),
    # something does not fit
    "another weight": (file(set_item("model", "head.weight", torch.zeros(1))),
                       'Unexpected key.*"head.weight"'),
    "another size": (file(set_item("config", "n_embd", 32)),
                     f"{FIT}size mismatch for transformer.wte.weight"),
    "an unknown setting of the model": (file(set_item("config", "rope", True)), "setting 'rope'"),
    "a later version": (file(set_item("version", 2)), "version 2, and this program reads"),
    "another model of Hugging Face": (
        hugging_face_directory(another_model), "is no GPT-2: its weights lack"),
}


# -----------------------------------------------------------------------------
# doors: functions of a checkpoint's path that raise what the command tells its user


def load_whole(path, monkeypatch, data_root):
    GPT.from_checkpoint(load_checkpoint(path))


def load_mapped(path, monkeypatch, data_root):
    GPT.from_checkpoint(load_checkpoint(path, mmap=True))


def sample(path, monkeypatch, data_root):
    main_of(monkeypatch, inference, "--checkpoint_path", path, "--device", "cpu")


def start_server(path, monkeypatch, data_root):
    settings = serve.read_settings(["--model_checkpoint", str(path), "--device", "cpu"])
    service = serve.create_app(settings).extensions["service"]
    service.start()
    assert service.shutdown.wait(60), "the server serves"
    raise service.error


def score(path, monkeypatch, data_root):
    main_of(monkeypatch, hellaswag, "--checkpoint_path", path, "--device", "cpu")


def train(path, monkeypatch, data_root):
    main_of(monkeypatch, train_gpt2, "--init_from", path, "--data_root", data_root,
            "--device", "cpu")


DOORS = [load_whole, load_mapped, sample, start_server, score, train]


@pytest.mark.parametrize("name", HOSTILE)
def test_every_command_refuses_it_in_a_line(name, tmp_path, monkeypatch, data_root):
    """Guards against code of a stranger that runs, a traceback, and wrong weights in silence."""
    write, message = HOSTILE[name]
    (tmp_path / "from").mkdir()
    path = write(tmp_path / "from")
    monkeypatch.chdir(tmp_path)
    for door in DOORS:
        with pytest.raises(UserError, match=message) as error:
            door(path, monkeypatch, data_root)
        assert "\n" not in str(error.value), door.__name__
        assert len(str(error.value)) < 500, door.__name__
        assert not (tmp_path / OWNED).exists(), door.__name__


@pytest.mark.parametrize("write", [
    lambda folder: file(lambda c: None)(folder), file(lambda c: None, "nanoGPT"),
    directory(lambda path: None), hugging_face_directory(lambda path: None)],
    ids=["ours", "nanoGPT", "directory", "Hugging Face"])
def test_the_doors_take_it_without_the_change(write, tmp_path, monkeypatch, data_root):
    """Guards against a table whose checkpoints are refused for another reason than it gives."""
    path = write(tmp_path)
    GPT.from_checkpoint(load_checkpoint(path))
    inference.load_for_sampling(path, "cpu")
    hellaswag.load_model(path)


def test_the_pickles_would_run(tmp_path, monkeypatch):
    """Guards against hostile pickles in the table that are harmless to every reader."""
    monkeypatch.chdir(tmp_path)
    path = HOSTILE["code in config"][0](tmp_path)
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert (tmp_path / OWNED).exists()
