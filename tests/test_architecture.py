"""The shape of the repository: who imports whom, what importing costs, and how long things may get.

    python -m pytest tests/test_architecture.py
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = "gptlib"
BENCHES = "benches"
HEAVY_PACKAGES = {
    "datasets", "flask", "gguf", "gunicorn", "limits", "matplotlib", "prometheus_client",
    "pyarrow", "pydantic", "tensorboard", "transformers", "waitress", "wandb",
}
MAX_COLUMNS = 100
MAX_FUNCTION_LINES = 60
MAX_FUNCTION_LINES_BY_NAME = {"train": 95}
MAX_MODULE_LINES = 500
MAX_MODULE_LINES_BY_NAME = {"train_gpt2": 620}
MAX_NAMES_OF_THE_LIBRARY = 30  # that train_gpt2.py imports
# What each folder may import besides itself. The modules outside the folders are the ground.
MAY_IMPORT = {
    "ground": [],
    "data": ["ground"],
    "checkpoints": ["ground", "data"],
    "training": ["ground", "data", "checkpoints"],
    "inference": ["ground", "data", "checkpoints"],
    "serving": ["ground", "data", "checkpoints", "inference"],
}
MAX_TEST_NAME = 60


def find_modules(root):
    """{module name: path} of the scripts at the top, of the package and of the benches."""
    paths = [*root.glob("*.py"), *(root / PACKAGE).rglob("*.py"), *(root / BENCHES).glob("*.py")]
    modules = {}
    for path in sorted(paths):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        modules[".".join(parts)] = path
    return modules


MODULES = find_modules(ROOT)
SCRIPTS = {name for name in MODULES if name.split(".")[0] not in (PACKAGE, BENCHES)}
TEST_FILES = sorted((ROOT / "tests").rglob("test_*.py"))


# -----------------------------------------------------------------------------
# reading imports


def imports_of_node(node, module):
    """The dotted names that one node of a syntax tree imports; no names where it imports nothing.

    `from a import b` gives a.b, for b may be a module; a caller that knows the modules takes the
    longest part that is one. A call of import_module or import_optional with a literal counts too,
    and a string such as "gptlib.data.hub", which may become the argument of `python -m`.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value] if re.fullmatch(r"gptlib(\.\w+)+", node.value) else []
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = module.split(".")[:-node.level] if node.level else []
        source = ".".join([*above, *filter(None, [node.module])])
        return [f"{source}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if function in ("import_module", "import_optional", "__import__"):
            return [str(node.args[0].value)]
    return []


def all_imports(source, module):
    """The dotted names that a module imports anywhere, inside functions as well."""
    names = []
    for node in ast.walk(ast.parse(source)):
        names += imports_of_node(node, module)
    return names


def import_time_imports(source, module):
    """The dotted names that are imported when the module is: not those inside of functions."""
    names = []
    pending = [ast.parse(source)]
    while pending:
        node = pending.pop()
        names += imports_of_node(node, module)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending += ast.iter_child_nodes(node)
    return names


def known_module(name, known):
    """The longest leading part of a dotted name that is a known module, or None."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        candidate = ".".join(parts[:length])
        if candidate in known:
            return candidate
    return None


def import_graph(sources):
    """{module: set of the modules among them that it imports}, from {module: its source}."""
    graph = {}
    for module, source in sources.items():
        found = {known_module(name, sources) for name in all_imports(source, module)}
        graph[module] = found - {None}
    return graph


def find_circle(graph):
    """The modules of one circle of imports, the first again at the end, or None."""
    finished = set()

    def visit(module, path):
        if module in path:
            return [*path[path.index(module):], module]
        if module in finished:
            return None
        for imported in sorted(graph[module]):
            circle = visit(imported, [*path, module])
            if circle:
                return circle
        finished.add(module)
        return None

    for module in sorted(graph):
        circle = visit(module, [])
        if circle:
            return circle
    return None


def folder_of(module):
    """The folder of a module of the package, "ground" outside of them; None for other modules."""
    parts = module.split(".")
    if parts[0] != PACKAGE or len(parts) == 1:
        return None
    return parts[1] if parts[1] in MAY_IMPORT else "ground"


def imports_against_the_order(graph):
    """(module, module that it imports) pairs that MAY_IMPORT does not allow."""
    pairs = []
    for module, imported in graph.items():
        own = folder_of(module)
        for other in sorted(imported):
            folder = folder_of(other)
            if own and folder and folder != own and folder not in MAY_IMPORT[own]:
                pairs.append((module, other))
    return pairs


def names_of_the_library(source):
    """The names that a script imports from the package and from other scripts."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module.split(".")[0] in (PACKAGE, "fineweb")):
            names += [alias.name for alias in node.names]
    return names


def functions_that_take_the_config(source):
    """The names of functions with a parameter that is called cfg."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            if "cfg" in [argument.arg for argument in node.args.args]:
                found.append(getattr(node, "name", "lambda"))
    return found


def heavy_imports(source, module):
    """The heavy packages that importing the module would load."""
    packages = {name.split(".")[0] for name in import_time_imports(source, module)}
    return sorted(packages & HEAVY_PACKAGES)


def package_importing_scripts(graph, scripts):
    """(module of the package, script that it imports) pairs: each is a mistake.

    The benches measure the scripts and import them; of bench.py they know nothing.
    """
    pairs = []
    for module, imported in graph.items():
        forbidden = {"bench"} if module.startswith(BENCHES) else scripts
        if module not in scripts:
            pairs += [(module, script) for script in sorted(imported & forbidden)]
    return pairs


# -----------------------------------------------------------------------------
# measuring the text


def long_functions(source):
    """(name, lines, limit) of each function above its limit; decorators are not counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            limit = MAX_FUNCTION_LINES_BY_NAME.get(node.name, MAX_FUNCTION_LINES)
            if lines > limit:
                found.append((node.name, lines, limit))
    return found


def long_lines(source):
    """The numbers of the lines that are wider than MAX_COLUMNS."""
    lines = enumerate(source.splitlines(), 1)
    return [number for number, line in lines if len(line) > MAX_COLUMNS]


def functions_of_tests(source):
    """The syntax trees of the tests in a test file."""
    return [node for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def chained_asserts(source):
    """The numbers of the lines that assert two claims with `and`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.BoolOp):
            if isinstance(node.test.op, ast.And):
                found.append(node.lineno)
    return found


# -----------------------------------------------------------------------------
# the checkers can fail


def test_a_circle_is_found():
    """Guards against a circle test that passes whatever the modules import."""
    sources = {
        "train": "from lib import model",
        "lib": "",
        "lib.model": "import lib.data",
        "lib.data": "def load():\n    from train import GPT\n    return GPT",
    }
    graph = import_graph(sources)
    assert graph["lib.data"] == {"train"}
    assert find_circle(graph) == ["lib.data", "train", "lib.model", "lib.data"]


def test_a_tree_of_imports_is_no_circle():
    """Guards against calling a module that two others import a circle."""
    sources = {
        "train": "from lib import data, model",
        "lib": "",
        "lib.model": "from lib.data import read",
        "lib.data": "import json, os.path",
    }
    assert import_graph(sources)["train"] == {"lib.data", "lib.model"}
    assert find_circle(import_graph(sources)) is None


@pytest.mark.parametrize("source", [
    "from . import b",
    "from .b import f",
    "import lib.b as other",
    "from lib import b",
    "def f():\n    import lib.b",
    "import importlib\nimportlib.import_module('lib.b')",
])
def test_every_way_to_import_is_seen(source):
    """Guards against an import that the walk overlooks because of how it is written."""
    graph = import_graph({"lib": "", "lib.a": source, "lib.b": ""})
    assert "lib.b" in graph["lib.a"]


def test_a_script_imported_by_the_package_is_found():
    """Guards against a check of the package that sees module-level imports only."""
    sources = {"train": "import lib.a", "lib.a": "def f():\n    import train"}
    assert package_importing_scripts(import_graph(sources), {"train"}) == [("lib.a", "train")]


def test_an_import_against_the_order_is_found():
    """Guards against an order of the folders that every import satisfies."""
    sources = {
        "gptlib": "", "gptlib.common": "", "gptlib.data": "", "gptlib.serving": "",
        "gptlib.data.hub": "from gptlib import common\nfrom gptlib.serving import api",
        "gptlib.serving.api": "START = [python, '-m', 'gptlib.data.hub']",
    }
    graph = import_graph(sources)
    assert imports_against_the_order(graph) == [("gptlib.data.hub", "gptlib.serving.api")]
    circle = find_circle(graph)
    assert circle == ["gptlib.data.hub", "gptlib.serving.api", "gptlib.data.hub"], "by a string"


@pytest.mark.parametrize("source, heavy", [
    ("import flask", ["flask"]),
    ("from transformers.models import gpt2", ["transformers"]),
    ("try:\n    import wandb\nexcept ImportError:\n    wandb = None", ["wandb"]),
    ("class A:\n    import matplotlib.pyplot as plt", ["matplotlib"]),
    ("def f():\n    import flask", []),
    ("import json", []),
])
def test_heavy_imports_at_module_level_are_found(source, heavy):
    """Guards against a heavy import hidden in a class or a try, and a false alarm for functions."""
    assert heavy_imports(source, "module") == heavy


def test_long_text_is_found():
    """Guards against limits that no text can break."""
    body = "    x = 1\n" * 60
    assert long_functions(f"def f():\n{body}") == [("f", 61, 60)]
    assert long_functions(f"def train():\n{body}") == []
    assert long_lines("short\n" + "x" * 101 + "\n" + "x" * 100) == [2]
    assert chained_asserts("assert a or b\nassert a and b\nassert all([a, b])") == [2]


# -----------------------------------------------------------------------------
# imports


@pytest.fixture(scope="module")
def graph():
    return import_graph({name: path.read_text() for name, path in MODULES.items()})


def test_the_modules_are_found(graph):
    """Guards against checks that pass because they looked into an empty folder."""
    assert {"train_gpt2", "hellaswag", "serve", "bench"} <= SCRIPTS
    assert {"gptlib.common", "gptlib.inference.engine"} <= set(MODULES) - SCRIPTS
    assert "gptlib.training.scoring" in graph["hellaswag"]
    assert "benches.training" in graph["bench"]


def test_the_package_imports_no_script(graph):
    """Guards against a library that loads train_gpt2 twice when that runs as __main__."""
    assert package_importing_scripts(graph, SCRIPTS) == []


def test_no_imports_in_a_circle(graph):
    """Guards against modules that load in one order only, circles inside functions included."""
    circle = find_circle(graph)
    assert circle is None, " -> ".join(circle)


def test_imports_between_folders_run_one_way(graph):
    """Guards against a room that knows of those that are built on it."""
    assert imports_against_the_order(graph) == []


def test_the_script_imports_few_names():
    """Guards against a loop whose reader has to know half of the library first."""
    names = names_of_the_library(MODULES["train_gpt2"].read_text())
    assert len(names) <= MAX_NAMES_OF_THE_LIBRARY, f"{len(names)}: {names}"


@pytest.mark.parametrize("module", [name for name in MODULES if folder_of(name)])
def test_the_configuration_is_read_at_the_edge(module):
    """Guards against functions of which nobody can tell which of sixty settings they read."""
    assert functions_that_take_the_config(MODULES[module].read_text()) == []


@pytest.mark.parametrize("module", MODULES)
def test_no_heavy_import_at_module_level(module):
    """Guards against `--help` that takes seconds, and a script that needs what it does not use."""
    assert heavy_imports(MODULES[module].read_text(), module) == []


IMPORT_ALL = """
import importlib, json, sys, threading, torch

def forbid(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.fork"):
        raise RuntimeError(f"{event} while importing")

before = threading.active_count()
sys.addaudithook(forbid)
modules, heavy = json.loads(sys.argv[1])
loaded = {}
for module in modules:
    importlib.import_module(module)
    known = {name for names in loaded.values() for name in names}
    new = sorted(set(heavy) & set(sys.modules) - known)
    if new:
        loaded[module] = new
print(json.dumps({"loaded": loaded, "threads": threading.active_count() - before}))
"""


def test_importing_is_silent_light_and_starts_nothing():
    """Guards against an import that prints, goes to the network, starts a thread or loads flask.

    What a package of our own requirements imports by itself counts too, so this really imports.
    """
    request = json.dumps([list(MODULES), sorted(HEAVY_PACKAGES)])
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, request], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 1, f"printed at import: {lines[:-1]}"
    assert json.loads(lines[0]) == {"loaded": {}, "threads": 0}


# -----------------------------------------------------------------------------
# STYLE.md's limits


@pytest.mark.parametrize("module", MODULES)
def test_no_line_is_too_wide(module):
    """Guards against lines that have to be scrolled to be read."""
    assert long_lines(MODULES[module].read_text()) == []


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_too_long(module):
    """Guards against functions that do two things; train() may be an outline of the whole run."""
    assert long_functions(MODULES[module].read_text()) == []


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_too_long(module):
    """Guards against a file that holds two subjects."""
    limit = MAX_MODULE_LINES_BY_NAME.get(module, MAX_MODULE_LINES)
    lines = len(MODULES[module].read_text().splitlines())
    assert limit is None or lines <= limit, f"{lines} lines, expected at most {limit}"


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: Path(path).stem)
def test_tests_open_with_the_command_that_runs_them(path):
    """Guards against a test file that a reader cannot run from its first lines."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python -m pytest {path.relative_to(ROOT)}" in docstring


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: Path(path).stem)
def test_names_of_tests_are_short(path):
    """Guards against names that the summary of a failed run cuts off."""
    names = [node.name for node in functions_of_tests(path.read_text())]
    assert [name for name in names if len(name) >= MAX_TEST_NAME] == []


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: Path(path).stem)
def test_a_test_says_what_it_guards_against(path):
    """Guards against a failing test whose reader cannot tell whether test or code is wrong."""
    tests = functions_of_tests(path.read_text())
    assert [node.name for node in tests if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: Path(path).stem)
def test_an_assert_makes_one_claim(path):
    """Guards against an assert that fails without saying which of its claims was wrong."""
    assert chained_asserts(path.read_text()) == []
