"""docs/change_the_model.md: its three edits fit today's train_gpt2.py and do what the page says.

    python -m pytest tests/test_change_the_model.py
"""

import dataclasses
import importlib.util
import re
import sys

import pytest
import torch
from conftest import ROOT
from gptlib.common import UserError
from train_gpt2 import GPT, GPTConfig

PAGE = ROOT / "docs" / "change_the_model.md"
FIELDS = {"relu2": dict(activation="relu2"), "rmsnorm": dict(norm="rms"),
          "rotary": dict(rotary=True)}
SIZES = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)


def edits():
    """{name: [(old text, new text) of each hunk]} of the page's diffs."""
    diffs = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    found = {}
    for name, diff in zip(FIELDS, diffs, strict=True):
        hunks = [hunk.splitlines() for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]]
        found[name] = [(text_of(lines, " -"), text_of(lines, " +")) for lines in hunks]
    return found


def text_of(lines, marks):
    """The lines of a hunk that have one of these marks, or are empty, without it."""
    return "".join(line[1:] + "\n" for line in lines if not line or line[0] in marks)


@pytest.fixture(params=FIELDS)
def changed(request, tmp_path, monkeypatch):
    """(train_gpt2 as a module with one of the edits, the edit's fields of GPTConfig)."""
    source = (ROOT / "train_gpt2.py").read_text()
    for old, new in edits()[request.param]:
        assert source.count(old) == 1, f"expected exactly once in train_gpt2.py:\n{old}"
        source = source.replace(old, new)
    path = tmp_path / "changed_gpt2.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("changed_gpt2", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changed_gpt2", module)
    spec.loader.exec_module(module)
    return module, FIELDS[request.param]


def make_model(module, **fields):
    torch.manual_seed(0)
    return module.GPT(module.GPTConfig(**SIZES, **fields)).eval()


def checkpoint_of(model):
    return dict(model=model.state_dict(), config=dataclasses.asdict(model.config))


def some_tokens(length=SIZES["block_size"]):
    return torch.randint(SIZES["vocab_size"], (2, length), generator=torch.manual_seed(1))


def test_a_stock_checkpoint_stays_what_it_was(changed):
    """Guards against an edit that changes models which were trained before it."""
    module, _ = changed
    stock = GPT(GPTConfig(**SIZES)).eval()
    model = module.GPT.from_checkpoint(checkpoint_of(stock)).eval()
    idx = some_tokens()
    torch.testing.assert_close(model(idx)[0], stock(idx)[0], rtol=0, atol=0)


def test_the_field_changes_the_model(changed):
    """Guards against a field that nothing reads."""
    module, fields = changed
    model, stock = make_model(module, **fields), make_model(module)
    own = {name: tensor for name, tensor in stock.state_dict().items()
           if name in model.state_dict()}
    model.load_state_dict(own)  # the same weights, as far as both have them
    idx = some_tokens()
    assert not torch.allclose(model(idx)[0], stock(idx)[0], atol=1e-4)


def test_a_new_run_has_the_field(changed):
    """Guards against an edit that create_model does not switch on."""
    module, fields = changed
    source = (ROOT / "docs" / "change_the_model.md").read_text()
    (name, value), = fields.items()
    assert f"cfg.dropout, {name}={value!r}))".replace("'", '"') in source


def test_a_checkpoint_keeps_the_field(changed):
    """Guards against a changed model that is sampled or resumed as a stock one."""
    module, fields = changed
    model = make_model(module, **fields)
    loaded = module.GPT.from_checkpoint(checkpoint_of(model)).eval()
    idx = some_tokens()
    torch.testing.assert_close(loaded(idx)[0], model(idx)[0], rtol=0, atol=0)


def test_stock_code_refuses_it(changed):
    """Guards against stock code that computes something else with a changed model's weights."""
    module, fields = changed
    with pytest.raises(UserError, match=next(iter(fields))):
        GPT.from_checkpoint(checkpoint_of(make_model(module, **fields)))


def test_a_shorter_context_is_cut(changed):
    """Guards against a start with a shorter block size that needs a tensor the edit removes."""
    module, fields = changed
    model = make_model(module, **fields)
    short = module.GPT.from_checkpoint(checkpoint_of(model), block_size=8).eval()
    idx = some_tokens(8)
    torch.testing.assert_close(short(idx)[0], model(idx)[0])


def test_the_cache_follows(changed):
    """Guards against positions that are lost behind a cache: greedy text then differs."""
    module, fields = changed
    model = make_model(module, **fields)
    idx = some_tokens(3)
    cached = module.generate(model, idx, 10, SIZES["vocab_size"], temperature=0.0)
    for _ in range(10):
        following = model(idx)[0][:, -1].argmax(-1, keepdim=True)
        idx = torch.cat((idx, following), dim=1)
    assert cached.tolist() == idx.tolist()


def test_flops_count_what_is_multiplied(changed):
    """Guards against FLOPs that count a table of positions, or lose weights that are multiplied."""
    module, fields = changed
    model = make_model(module, **fields)
    multiplied = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    attention = 12 * SIZES["n_layer"] * SIZES["n_embd"] * SIZES["block_size"]
    assert model.flops_per_token() == 6 * multiplied + attention
