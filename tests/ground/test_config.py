"""Settings: ranges, flags, environment variables, presets and the table in the documents.

    python -m pytest tests/ground/test_config.py
"""

import dataclasses
import math
from dataclasses import dataclass

import pytest
from conftest import ROOT, flags, run

import train_gpt2
from gptlib.common import UserError
from gptlib.config import (check_settings, describe_range, in_range, read_environment, setting,
                           shown_default)
from gptlib.training.presets import PRESETS
from train_gpt2 import TrainConfig, parse_flags

# -----------------------------------------------------------------------------
# ranges and environment variables


@dataclass
class Limits:
    """A field for each kind of range."""
    up_to_0: float = setting(-1.0, "a number that is not positive", -5.0, 0.0)
    from_0: int = setting(1, "a number that is not negative", 0)
    above_0: float = setting(0.5, "a share", above=0.0, high=1.0)
    only_above: float = setting(0.5, "a positive number", above=0.0)
    optional: int = setting(None, "a number or nothing", 1, 3, optional=True)
    free: float = setting(0.0, "any number")
    switch: bool = setting(False, "on or off")


FIELDS = {field.name: field for field in dataclasses.fields(Limits)}


@pytest.mark.parametrize("name,allowed,refused", [
    ("up_to_0", [-5.0, 0.0], [-5.1, 0.1, math.inf, math.nan]),
    ("from_0", [0, 10**9], [-1, math.nan]),
    ("above_0", [1e-9, 1.0], [0.0, 1.1, -1.0, math.nan]),
    ("only_above", [1e-9, 1e9], [0.0, math.nan]),
    ("optional", [1, 3], [0, 4]),
    ("free", [-1e9, 1e9], []),
])
def test_in_range_counts_a_limit_of_0_and_refuses_nan(name, allowed, refused):
    """Guards against a limit of 0 that is taken for none, and NaN that passes since no comparison
    with it is true."""
    for value in allowed:
        assert in_range(FIELDS[name], value), value
    for value in refused:
        assert not in_range(FIELDS[name], value), value


@pytest.mark.parametrize("name,expected", [
    ("up_to_0", "-5.0 to 0.0"), ("from_0", "at least 0"), ("above_0", "above 0.0 and up to 1.0"),
    ("only_above", "above 0.0"), ("optional", "1 to 3")])
def test_ranges_are_described_with_limits_of_0(name, expected):
    """Guards against an error that tells half of the range if the other limit is 0."""
    assert describe_range(FIELDS[name]) == expected


@pytest.mark.parametrize("values,message", [
    (dict(up_to_0=0.5), "--up_to_0 is 0.5: expected -5.0 to 0.0"),
    (dict(from_0=None), "--from_0 is None: expected int"),
    (dict(optional=4), "--optional is 4: expected 1 to 3"),
    (dict(optional=True), "--optional is True: expected int"),
    (dict(free="1"), "--free is '1': expected float"),
])
def test_check_settings_names_the_first_wrong_one(values, message):
    """Guards against a value out of range, or a None that is not optional, which is used in
    silence."""
    with pytest.raises(UserError) as error:
        check_settings(Limits(**values))
    assert str(error.value) == message


def test_a_whole_number_becomes_a_float_where_one_is_expected():
    """Guards against --max_lr 1 that is refused, or an int in the checkpoint in place of a float.
    """
    limits = Limits(free=3)
    check_settings(limits)
    assert type(limits.free) is float


def test_environment_variables_are_converted():
    """Guards against a variable that stays a text ("0" would be true), or an empty one that counts
    as a value."""
    env = dict(FROM_0="7", ABOVE_0="0.25", SWITCH="no", FREE="", OTHER="1")
    assert read_environment(Limits, env) == dict(from_0=7, above_0=0.25, switch=False)


@pytest.mark.parametrize("env,message", [
    (dict(FROM_0="seven"), "FROM_0 is 'seven': expected a whole number"),
    (dict(FREE="much"), "FREE is 'much': expected a number"),
    (dict(SWITCH="perhaps"), "SWITCH is 'perhaps': expected true or false")])
def test_a_wrong_environment_variable_is_named(env, message):
    """Guards against a typing error in a service's environment that ends in a traceback without its
    name."""
    with pytest.raises(UserError) as error:
        read_environment(Limits, env)
    assert str(error.value) == message


# -----------------------------------------------------------------------------
# the command line of training


def test_the_defaults_are_the_gpt2_recipe():
    """Guards against `python train_gpt2.py` without flags that trains something else than GPT-2
    (124M)."""
    cfg = TrainConfig()
    recipe = dict(total_batch_size=524288, block_size=1024, max_steps=19073, warmup_steps=715,
                  max_lr=6e-4, min_lr=pytest.approx(6e-5), weight_decay=0.1, grad_clip=1.0,
                  optimizer="adamw", compile=True, eval_interval=250, val_tokens=10485760)
    for name, expected in recipe.items():
        assert getattr(cfg, name) == expected, name


def test_boolean_flags_take_three_forms():
    """Guards against a form that is refused, or --compile=False that is true since any text is."""
    assert parse_flags(["--compile"]) == {"compile": True}
    assert parse_flags(["--no-compile"]) == {"compile": False}
    assert parse_flags(["--compile=False"]) == {"compile": False}
    assert parse_flags(["--compile=True"]) == {"compile": True}


def test_explicit_flags_override_the_preset():
    """Guards against a flag beside --preset that is ignored, or a preset that is not applied at
    all."""
    demo = parse_flags(["--max_steps", "7", "--preset", "demo"])
    assert demo["max_steps"] == 7
    assert demo["n_layer"] == PRESETS["demo"]["n_layer"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    """Guards against a preset that fails its own checks, or a gpt2 that differs from no flags at
    all."""
    cfg = TrainConfig(**parse_flags(["--preset", name]))
    if name == "gpt2":
        assert dataclasses.replace(cfg, preset="") == TrainConfig()


@pytest.mark.parametrize("argv,message", [
    (["--max_step", "5"], "--max_step"),
    (["--preset", "gtp2"], "choose one of demo"),
    (["--n_layer", "two"], "--n_layer"),
    (["--n_layer", "0"], "--n_layer is 0: expected at least 1"),
    (["--block_size", "65537", "--data_root", "nowhere"],
     "--block_size is 65537: expected 1 to 65536"),
    (["--n_head", "5"], "--n_embd 768 does not divide by --n_head 5"),
    (["--max_lr", "nan"], "--max_lr is nan"),
    (["--min_lr", "1"], "--min_lr 1.0 is above --max_lr"),
    (["--dtype", "int8"], "choose one of auto, float32"),
    (["--compile=perhaps"], "neither True nor False"),
    (["--resume"], "--checkpoint_path go together"),
    (["--resume", "--auto_resume", "--checkpoint_path", "x"],
     "--resume and --auto_resume contradict"),
    (["--resume", "--checkpoint_path", "log/model_00007.pt"],
     "no checkpoint 'log/model_00007.pt'; checkpoints beside"),
    (["--device", "tpu9"], "--device is 'tpu9'"),
    (["--init_from", "nowhere/at/all"], "nowhere/at/all"),
    (["--data_root", "nowhere"], "python fineweb.py --data_root nowhere"),
])
def test_a_wrong_flag_gets_one_clear_line(tmp_path, argv, message, data_root, monkeypatch):
    """Guards against a mistake that ends in a traceback, or in a message without the flag's name.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train_gpt2.py", *flags(data_root=data_root), *argv])
    with pytest.raises(UserError) as error:
        train_gpt2.main()
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_a_wrong_flag_ends_the_process_without_a_traceback(tmp_path):
    """Guards against a right error that is printed with a traceback, or with exit code 0."""
    done = run("train_gpt2.py", "--max_step", "5", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert "did you mean --max_steps?" in done.stderr


def test_the_documents_list_every_flag_with_its_default():
    """Guards against documents without a flag that was added or explained anew."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(path.read_text() for path in paths)
    rows = []
    for field in dataclasses.fields(TrainConfig):
        rows.append(f"| `--{field.name}` | {shown_default(field)} | {field.metadata['help']} |")
    table = "\n".join(rows)
    for row in rows:
        assert row in text, f"the documents lack the row\n{row}\nof the table\n{table}"
