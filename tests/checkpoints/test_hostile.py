"""What is no checkpoint of a GPT is refused in one line, by every command, and nothing in it runs.

    python -m pytest tests/checkpoints/test_hostile.py

One table of hostile checkpoints of every format goes through every door: load_checkpoint,
inference.py, serve.py, hellaswag.py and train_gpt2.py --init_from.
"""

import contextlib
import dataclasses
import json
import os
import pickle

import pytest
import torch
from byte_model import make_tokenizer
from interop_helpers import hugging_face, main_of, write_checkpoint_directory
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

import hellaswag
import inference
import serve
import train_gpt2
from gptlib.checkpoints.directory import checksum
from gptlib.checkpoints.formats import load_checkpoint
from gptlib.common import UserError
from gptlib.data.tokenizer import export_tokenizer, load_tokenizer, tokenizer_to_dict
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
    """A checkpoint directory of a sharded run that change(path) has changed, with right checksums.
    """
    def write(folder):
        path = write_checkpoint_directory(folder / "hostile.pt", contents_of("ours"))
        change(path)
        checksums = path / "checksums.json"
        if checksums.exists():
            names = {file.name for file in path.iterdir()} - {checksums.name}
            listed = json.loads(checksums.read_bytes())
            if listed:
                listed |= {name: checksum(path / name) for name in names}
            checksums.write_text(json.dumps(listed))
        return path
    return write


def metadata(change):
    """A checkpoint directory whose .metadata, torch's Metadata, change(it, path) has changed."""
    def change_file(path):
        found = pickle.loads((path / ".metadata").read_bytes())
        change(found, path)
        (path / ".metadata").write_bytes(pickle.dumps(found))
    return directory(change_file)


def metadata_bytes(content):
    return directory(lambda path: (path / ".metadata").write_bytes(content))


def state_file(change):
    """A checkpoint directory whose state.pt `change` has changed, as `file` does."""
    def change_file(path):
        state = torch.load(path / "state.pt", weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed[0], path / "state.pt")
    return directory(change_file)


def listed(name, entry):
    """A checkpoint directory whose checksums.json has this entry too."""
    def change(path):
        checksums = path / "checksums.json"
        checksums.write_text(json.dumps(json.loads(checksums.read_bytes()) | {name: entry}))
    return directory(change)


def call_it_bytes(found, path):
    """Have torch's planner unpickle a file of ours for a weight, without weights_only."""
    found.state_dict_metadata[WEIGHT] = BytesStorageMetadata()
    torch.save(MakeFolder(), path / "__9_9.distcp")
    size = (path / "__9_9.distcp").stat().st_size
    found.storage_data = {index: place for index, place in found.storage_data.items()
                          if index.fqn != WEIGHT}
    found.storage_data[MetadataIndex(WEIGHT)] = _StorageInfo("__9_9.distcp", 0, size)


def point_outside(found, path):
    """Have the weights read from a file beside the directory."""
    (path.parent / "outside").write_bytes((path / "__0_0.distcp").read_bytes())
    for place in found.storage_data.values():
        place.relative_path = "../outside"


def leave_rows_out(found, path):
    chunk = found.state_dict_metadata[WEIGHT].chunks[0]
    chunk.sizes = torch.Size([chunk.sizes[0] - 1, *chunk.sizes[1:]])


def set_attribute():
    """A pickle that sets Metadata.owned for the whole process, with the opcode BUILD."""
    return (b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n"
            b"(N}X\x05\x00\x00\x00ownedK\x01stb.")


def edit_json(name, **values):
    """A change of a file of JSON in a Hugging Face directory."""
    def change(path):
        found = json.loads((path / name).read_bytes()) if (path / name).exists() else {}
        (path / name).write_text(json.dumps(found | values))
    return change


def edit_weights(**tensors):
    """A change of a Hugging Face directory's weights; the names have _ for a point."""
    def change(path):
        state = load_file(path / "model.safetensors") | {
            name.replace("_DOT_", "."): tensor for name, tensor in tensors.items()}
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return change


def point_index_outside(path):
    (path / "model.safetensors").rename(path.parent / "outside.safetensors")
    weights = {name: "../outside.safetensors" for name in hugging_face(257).state_dict()}
    weights.pop("lm_head.weight")
    index = {"metadata": {}, "weight_map": weights}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def other_tokenizer(name):
    """A Hugging Face directory with GPT-2's number of rows and another kind of tokenizer."""
    def write(folder):
        path = folder / "hostile"
        hugging_face(50257, n_embd=8).save_pretrained(path)
        (path / name).write_text('{"tokenizer_class": "LlamaTokenizer"}')
        return path
    return write


def no_tokenizer(path):
    (path / "tokenizer.json").unlink()


def repeat_one_number(contents):
    """6 kB that stand for many times as much: every weight repeats one number."""
    model = contents["model"]
    for name, tensor in model.items():
        model[name] = torch.zeros(1).expand(tensor.shape)


def share_one_block(contents):
    """A hundred layers whose weights are those of the first."""
    model = contents["model"]
    contents["config"]["n_layer"] = 100
    for i in range(1, 100):
        for name in list(model):
            if name.startswith("transformer.h.0."):
                model[name.replace(".h.0.", f".h.{i}.")] = model[name]


def untie(contents):
    contents["model"]["lm_head.weight"] = contents["model"]["lm_head.weight"] + 1


def add_layer(contents):
    model = contents["model"]
    for name in [name for name in model if name.startswith("transformer.h.1.")]:
        model[name.replace(".h.1.", ".h.2.")] = model[name].clone()


def not_a_number(contents):
    contents["model"][LN_1][0] = float("nan")


def untied_contents():
    contents = contents_of("ours")
    untie(contents)
    return contents


def nested(depth):
    """A list in a list in a list ..."""
    found = []
    for _ in range(depth):
        found = [found]
    return found


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
    torch.save([torch.zeros(10**5), MakeFolder()], path / "pytorch_model.bin")


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
HEADS = "transformer.wte.weight and lm_head.weight differ: this model has one matrix for both"
WEIGHT = "model.transformer.wpe.weight"

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
        hugging_face_directory(another_model), "is no GPT-2: its config.json says 'llama'"),
    "LoRA weights": (
        file(set_item("model", "transformer.h.0.attn.c_attn.lora_A.weight", torch.zeros(1))),
        "Unexpected key.*lora_A"),
    "LoRA weights of Hugging Face": (
        hugging_face_directory(edit_weights(
            transformer_DOT_h_DOT_0_DOT_attn_DOT_lora_A_DOT_weight=torch.zeros(1))),
        "its config does not use its weights .*lora_A"),
    "an adapter of Hugging Face": (
        hugging_face_directory(edit_json("adapter_config.json", peft_type="LORA")),
        r"holds an adapter \(LoRA\), which is not applied"),
    "two of three layers": (file(add_layer), 'Unexpected key.*"transformer.h.2'),
    "two of three layers of Hugging Face": (
        hugging_face_directory(edit_json("config.json", n_layer=1)),
        "its config does not use its weights transformer.h.1"),
    "two heads": (file(untie), HEADS),
    "two heads of nanoGPT": (file(untie, "nanoGPT"), HEADS),
    "two heads of Hugging Face": (
        hugging_face_directory(edit_weights(lm_head_DOT_weight=torch.zeros(257, 32))), HEADS),
    "untied heads of Hugging Face": (
        hugging_face_directory(edit_json("config.json", tie_word_embeddings=False)),
        "its tie_word_embeddings is False"),
    "two heads in a directory": (
        directory(lambda path: write_checkpoint_directory(path, untied_contents())), HEADS),
    "a weight that is not a number": (file(not_a_number), f"{LN_1} has values that are not finite"),
    # sizes that contradict each other
    "three heads of sixteen numbers": (
        file(set_item("config", "n_head", 3)), "its n_embd, 16, does not divide by its n_head, 3"),
    "no vocabulary": (
        file(set_item("model_args", "vocab_size", None), "nanoGPT"), "its vocab_size is None"),
    "a text for a number": (
        file(set_item("model_args", "n_layer", "2"), "nanoGPT"), "its n_layer is '2'"),
    "a text for dropout": (file(set_item("config", "dropout", "0")), "its dropout is '0'"),
    "another gelu": (file(set_item("config", "gelu", "sigmoid")), "its gelu is 'sigmoid'"),
    "a million layers": (
        file(set_item("config", "n_layer", 10**6)), "its n_layer is 1000000, and it has"),
    "a vocabulary of 10^13": (
        file(set_item("config", "vocab_size", 10**13)), "there is no memory for a model"),
    "a context of a million": (
        file(set_item("config", "block_size", 10**6)), "its block_size is 1000000, expected"),
    "a million layers of Hugging Face": (
        hugging_face_directory(edit_json("config.json", n_layer=10**6)),
        "its config.json describes"),
    # a few bytes that stand for many
    "one number for all weights": (file(repeat_one_number), "its weights would take"),
    "one layer for a hundred": (file(share_one_block), "its weights would take"),
    "integers for weights": (
        file(set_item("model", LN_1, torch.zeros(16, dtype=torch.int64))), "is of torch.int64"),
    "a sparse weight": (
        file(set_item("model", LN_1, torch.zeros(16).to_sparse())),
        "sparse_coo: expected|SparseTensor"),
    "a text for a weight": (file(set_item("model", LN_1, "0")), f"its {LN_1} is no tensor"),
    # tokenizers
    "a path for a tokenizer": (
        file(set_item("tokenizer", "/etc")), "its tokenizer is no tokenizer"),
    "a number for ranks": (
        file(set_item("tokenizer", {"name": "bpe", "ranks": 3})), "its tokenizer is no tokenizer"),
    "ranks that are none": (
        file(set_item("tokenizer", {"name": "bpe", "ranks": b"?"})),
        "damaged tokenizer ranks|is not the checkpoint's"),
    "a list for train_config": (file(set_item("train_config", [])), "its train_config is no dict"),
    "a number for sample_prompt": (
        file(set_item("train_config", {"sample_prompt": 3})), "its sample_prompt is no text"),
    "a text for step": (file(set_item("step", "3")), "its step is no whole number"),
    **{f"a tokenizer in {name}": (
        other_tokenizer(name), "the tokenizer of .*hostile can't be used here: it is")
       for name in ("spiece.model", "tokenizer.model", "vocab.txt", "tokenizer_config.json")},
    "no tokenizer, other rows": (
        hugging_face_directory(no_tokenizer), "has no tokenizer, and 257 rows"),
    "a deep tokenizer.json": (
        hugging_face_directory(
            lambda path: (path / "tokenizer.json").write_text("[" * 10**5 + "]" * 10**5)),
        "can't be read"),
    # names that lead out of the folder
    "an index that leads elsewhere": (
        hugging_face_directory(point_index_outside), "names '../outside.safetensors'"),
    # directories
    "code in state.pt": (state_file(set_item("config", MakeFolder())), RUNS),
    "code in .metadata": (metadata_bytes(pickle.dumps(MakeFolder())), RUNS),
    "a weight called bytes": (metadata(call_it_bytes), "holds a BytesStorageMetadata"),
    "an attribute that is set": (metadata_bytes(set_attribute()), "cannot be loaded"),
    "a number for .metadata": (metadata_bytes(pickle.dumps(3)), "holds a int, expected Metadata"),
    "a deep .metadata": (metadata_bytes(pickle.dumps(nested(100))), "holds a list, expected"),
    "a path in .metadata": (metadata(point_outside), "names a file that is not of the checkpoint"),
    "rows that no file has": (metadata(leave_rows_out), "does not hold all rows"),
    "a weight that .metadata lacks": (
        metadata(lambda found, path: found.state_dict_metadata.pop(WEIGHT)), "Missing key"),
    "a path in checksums.json": (listed("../a", {"size": 0, "crc32": 0}), "names '../a'"),
    "a text for a size": (listed("__7_0.distcp", {"size": "0"}), "has no size for"),
    "a list for checksums.json": (
        directory(lambda path: (path / "checksums.json").write_text("[]")),
        "is no list of its files"),
    "no checksums.json": (
        directory(lambda path: (path / "checksums.json").unlink()), "No such file"),
    "a list for state.pt": (state_file(lambda state: [[1]]), "its state.pt holds no dict"),
    "a terabyte in a directory": (
        state_file(set_item("model", WEIGHT.removeprefix("model."),
                            torch.empty(10**9, 10**3, device="meta"))),
        "its tensors take 4,0.* bytes, its files"),
    "a later version of a directory": (state_file(set_item("version", 2)), "version 2"),
}


# -----------------------------------------------------------------------------
# doors: functions of a checkpoint's path that raise what the command tells its user


def load_whole(path, monkeypatch, data_root, mmap=False):
    checkpoint = load_checkpoint(path, mmap)
    GPT.from_checkpoint(checkpoint)
    load_tokenizer(checkpoint["tokenizer"])


def load_mapped(path, monkeypatch, data_root):
    load_whole(path, monkeypatch, data_root, mmap=True)


def sample(path, monkeypatch, data_root):
    main_of(monkeypatch, inference, "--checkpoint_path", path, "--device", "cpu")


def start_server(path, monkeypatch, data_root):
    settings = serve.read_settings(["--model_checkpoint", str(path), "--device", "cpu"])
    service = serve.create_app(settings).extensions["service"]
    service.start()
    service.thread.join(60)
    assert service.error, "the server serves"
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
        assert not hasattr(Metadata, OWNED), door.__name__


@pytest.mark.parametrize("write", [
    file(lambda c: None), file(lambda c: None, "nanoGPT"), directory(lambda path: None),
    hugging_face_directory(lambda path: None), file(drop("model", "lm_head.weight")),
    file(drop("model", "transformer.wte.weight"))],
    ids=["ours", "nanoGPT", "directory", "Hugging Face", "no head", "no embedding"])
def test_the_doors_take_it_without_the_change(write, tmp_path):
    """Guards against a table whose checkpoints are refused for another reason than it gives, and
    a file that names the one matrix of embedding and head once which is refused."""
    path = write(tmp_path)
    GPT.from_checkpoint(load_checkpoint(path))
    inference.load_for_sampling(path, "cpu")
    hellaswag.load_model(path)


def test_a_seed_that_no_generator_takes(monkeypatch):
    """Guards against a traceback for a seed of more than 64 bits."""
    with pytest.raises(UserError, match="seed is 18446744073709551616: expected 0 to"):
        main_of(monkeypatch, inference, "--seed", 2**64)
    with pytest.raises(UserError, match="--seed is 18446744073709551616: expected 0 to"):
        train_gpt2.TrainConfig(seed=2**64)


def test_the_pickles_would_run(tmp_path, monkeypatch):
    """Guards against hostile pickles in the table that are harmless to every reader."""
    monkeypatch.chdir(tmp_path)
    path = HOSTILE["code in config"][0](tmp_path)
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert (tmp_path / OWNED).exists()
