"""The lock files name every package that the requirements ask for, at the same version.

    python -m pytest tests/ground/test_requirements.py
"""

import re

import pytest
from conftest import ROOT

PIN = re.compile(r"^([a-z0-9-]+)==([^\s;\\]+)", re.MULTILINE)


def pins(name):
    return dict(PIN.findall((ROOT / name).read_text()))


def test_the_lock_pins_what_the_requirements_ask_for():
    """Guards against a changed version that is tested, or installed, in one of two files only."""
    required = pins("requirements.txt") | pins("requirements-dev.txt")
    locked = pins("requirements.lock")
    assert {name: locked.get(name) for name in required} == required


def test_the_locks_agree():
    """Guards against torch for CUDA with packages that the other file would replace again."""
    locked = pins("requirements.lock")
    both = {name: version for name, version in pins("requirements-cuda.lock").items()
            if name in locked}
    assert "torch" in both
    assert both == {name: locked[name] for name in both}


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-cuda.lock"])
def test_every_pin_has_a_hash(name):
    """Guards against an entry by which `pip install --require-hashes` refuses the whole file."""
    entries = re.split(r"\n(?=[a-z])", (ROOT / name).read_text())
    without = [entry for entry in entries if PIN.match(entry) and "--hash=sha256:" not in entry]
    assert without == []
