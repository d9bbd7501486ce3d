"""The demo's text: each function of the standard library, once, complete and without English.

    python -m pytest tests/data/test_stdlib.py
"""

import ast
import os
from pathlib import Path

import pytest

from gptlib.common import UserError
from gptlib.data.parts import Part
from gptlib.data.sources import open_source
from gptlib.data.stdlib import read_functions, stdlib_files

SOURCE = '''"""A module."""
import os

def first( a,b = 2 ):
    """Says "what" it does."""
    # a comment
    def inner():
        """Inside."""
        return a
    return inner() + \
        b

class Thing:
    """A thing."""

    @property
    def size(self):
        "No more than this."

    class Part:
        async def wait(self):
            return None

if os.name == "nt":
    def first(a, b=2):
        def inner():
            return a
        return inner() + b
else:
    def other(): return "x"
'''

FUNCTIONS = [
    "def first(a, b=2):\n\n    def inner():\n        return a\n    return inner() + b\n",
    "@property\ndef size(self):\n    pass\n",
    "async def wait(self):\n    return None\n",
    "def other():\n    return 'x'\n"]


def test_functions_of_a_file(tmp_path):
    """A method or a function behind an `if` is missed, one is there twice, or a comment is left."""
    path = tmp_path / "a.py"
    path.write_text(SOURCE)
    assert list(read_functions([path, path])) == FUNCTIONS


def test_files():
    """The demo's text lacks what every installation has, or takes what only some have."""
    paths = stdlib_files()
    assert paths == sorted(paths)
    assert 7e6 < sum(map(os.path.getsize, paths)) < 14e6
    names = {os.path.relpath(path, os.path.dirname(os.__file__)) for path in paths}
    assert {"json/decoder.py", "argparse.py"} <= names
    folders = {part for name in names for part in Path(name).parts}
    assert not folders & {"test", "tests", "site-packages", "idlelib"}


@pytest.fixture(scope="module")
def documents():
    return list(open_source("stdlib", None, None, None, "text").read())


def test_each_document_is_one_function_that_compiles(documents):
    """A document is cut off, or holds text that is not Python."""
    for text in documents:
        (node,) = ast.parse(text).body
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def test_there_is_enough_to_learn_from(documents):
    """A rule for files or functions has lost most of the library."""
    assert 3e6 < sum(map(len, documents)) < 6e6
    assert len(documents) == len(set(documents))


def test_reading_goes_on_after_documents_that_were_read(documents):
    """A preparation that was killed goes on at another document."""
    source = open_source("stdlib", None, None, None, "text")
    assert list(source.read(skip=11_000)) == documents[11_000:]


def test_parts_are_refused():
    """Each of several machines prepares the whole library."""
    source = open_source("stdlib", None, None, None, "text")
    with pytest.raises(UserError, match="--part"):
        list(source.batches(part=Part(1, 2)))
