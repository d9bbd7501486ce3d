"""README.md, docs/*.md and the Dockerfile: their commands, flags, files, links and tables are true.

    python -m pytest tests/test_documents.py

A command block is marked ```sh in the documents. No command is run: each one is given to the parser
of its own program, which refuses an unknown flag or a wrong value.
"""

import ast
import dataclasses
import http.server
import importlib
import json
import re
import shlex
import subprocess
import sys
import threading

import pytest
from conftest import ROOT
from gptlib.common import ArgumentParser, UserError
from gptlib.config import shown_default

README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ["fineweb", "hellaswag", "train_gpt2", "inference", "serve", "bench"]

# programs of other people, whose arguments are not checked
OTHER_PROGRAMS = {"ollama", "printf", "sbatch",
    "pip", "git", "curl", "cd", "export", "sleep", "until", "do", "done", "ssh", "ssh-keygen", "rsync",
    "tmux", "nvidia-smi", "docker", "mkdir", ".", "id", "echo",
}
# flags of gunicorn, Docker and Slurm that the text mentions
OTHER_FLAGS = {"--preload", "--gpus", "--user", "--stop-timeout", "--build-arg", "--requeue", "--ntasks-per-node"}
OTHER_VARIABLES = ("TORCH_", "NCCL_", "GLOO_", "TIKTOKEN_")

CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_COMMAND = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:python|torchrun|gunicorn) [^`\n]+)`")
ASSIGNMENT = re.compile(r"[A-Z_]+=")


def name_of(document):
    return str(document.relative_to(ROOT))


def prose(document):
    """The text of a document without its code blocks."""
    return CODE_BLOCK.sub("", document.read_text())


def code_blocks(document, language):
    blocks = CODE_BLOCK.findall(document.read_text())
    return [text for marked_as, text in blocks if marked_as == language]


# -----------------------------------------------------------------------------
# commands: every line of the documents and of the scripts' docstrings that a reader would type


def command_lines():
    """Yield (where it is written, command line)."""
    for document in DOCUMENTS:
        for block in code_blocks(document, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                yield name_of(document), line
        for line in INLINE_COMMAND.findall(prose(document)):
            if "..." not in line:
                yield name_of(document), line
    for script in SCRIPTS:
        source = (ROOT / f"{script}.py").read_text()
        docstring = ast.get_docstring(ast.parse(source)).replace("\\\n", " ")
        for line in docstring.splitlines():
            if line.startswith("$ "):
                yield f"{script}.py", line.removeprefix("$ ")


def split_commands(line):
    """The simple commands of a shell line, as lists of words: `A && B > file` gives A and B."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.commenters = "#"
    lexer.whitespace_split = True
    commands, words = [], []
    tokens = iter(lexer)
    for token in tokens:
        if set(token) <= set("<>"):
            next(tokens)  # the file that is read or written
        elif set(token) <= set("();|&"):
            commands.append(words)
            words = []
        else:
            words.append(token)
    commands.append(words)
    return [words for words in commands if words]


def split_prefixes(words):
    """Separate variables, loop keywords and `docker run` from the command that follows them."""
    parts = []
    while words and (words[0] in ("until", "do") or ASSIGNMENT.match(words[0])):
        parts.append(words[:1])
        words = words[1:]
    if words[:2] == ["docker", "run"]:
        programs = [i for i, word in enumerate(words) if word in ("python", "torchrun")]
        end = programs[0] if programs else len(words)
        parts.append(words[:end])
        words = words[end:]
    if words:
        parts.append(words)
    return parts


def all_commands():
    """Every simple command once: {its text with the place where it is written: its words}."""
    found = {}
    for where, line in command_lines():
        for command in split_commands(line):
            for words in split_prefixes(command):
                found[f"{where}: {' '.join(words)}"] = words
    return found


COMMANDS = all_commands()


def unwrap_torchrun(words):
    """`torchrun FLAGS script.py ARGS` as `python script.py ARGS`. An unknown flag of torchrun fails."""
    from torch.distributed.run import get_args_parser
    if words[0] != "torchrun":
        return words
    known = get_args_parser().parse_args(words[1:])
    return ["python", known.training_script, *known.training_script_args]


def script_of(words):
    """The name of our script that a command runs, or "" when it runs something else."""
    if "python" not in words[:1] and "torchrun" not in words[:1]:
        return ""
    scripts = [word for word in unwrap_torchrun(words)[1:2] if word.endswith(".py")]
    return scripts[0].removeprefix("/app/").removesuffix(".py") if scripts else ""


class Parsed(Exception):
    """Raised instead of returning from the parser, so that main() stops there."""


def parse_with_main(monkeypatch, script, args):
    """Call a script's main() up to its parser; returns the parser."""
    parse_args, parsers = ArgumentParser.parse_args, []

    def parse_and_stop(parser, args=None, namespace=None):
        parse_args(parser, args, namespace)
        parsers.append(parser)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [script, *args])
        with pytest.raises(Parsed):
            importlib.import_module(script).main()
    return parsers[0]


def check_script_command(monkeypatch, words):
    script = script_of(words)
    assert script in SCRIPTS
    args = [arg for arg in unwrap_torchrun(words)[2:] if arg != "--help"]
    if script == "bench" and not args:
        args = ["decode"]  # bench.py needs to be told what to measure
    parse_with_main(monkeypatch, script, args)
    if script == "train_gpt2":
        from train_gpt2 import TrainConfig, parse_flags
        TrainConfig(**parse_flags(args))  # checks the values, and that they fit together


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS.keys())
def test_command_is_accepted(monkeypatch, words):
    """A flag, script, setting or value is renamed or mistyped, and a documented command stops working."""
    program, args = words[0], words[1:]
    if program == "gunicorn":
        from gunicorn.config import Config
        assert Config().parser().parse_args(args).args == ["serve:app"]
    elif program == "python" and args[0] == "-m":
        assert args[1] in ("pytest", "venv")
    elif program in ("python", "torchrun"):
        try:
            check_script_command(monkeypatch, words)
        except UserError as error:
            pytest.fail(str(error))
    elif ASSIGNMENT.match(program):
        from serve import Settings
        settings = {field.name.upper() for field in dataclasses.fields(Settings)}
        variable = program.split("=")[0]
        assert variable in settings or variable.startswith(OTHER_VARIABLES)
    else:
        assert program in OTHER_PROGRAMS


def test_commands_show_every_script():
    """The commands are no longer found in the documents, and the test above checks none of them."""
    shown = {script_of(words) for words in COMMANDS.values()} - {""}
    assert shown == set(SCRIPTS)


@pytest.mark.parametrize("name", ["README.md", "docs/cloud.md", "docs/data.md", "docs/hosts.md",
                                  "docs/serving.md", "docs/speed.md"])
def test_commands_are_found_in(name):
    """A document writes its commands in a form that is not recognised, so they go unchecked."""
    assert [command for command in COMMANDS if command.startswith(f"{name}: ")] != []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_flags_in_the_text_exist(monkeypatch, document):
    """The text mentions a flag, such as `--seed`, that no program has any more."""
    from torch.distributed.run import get_args_parser
    known = set(get_args_parser()._option_string_actions) | OTHER_FLAGS
    for script in SCRIPTS:
        parser = parse_with_main(monkeypatch, script, ["decode"] if script == "bench" else [])
        known |= set(parser._option_string_actions)
    mentioned = set(re.findall(r"`(--[\w-]+)[^`\n]*`", prose(document)))
    assert mentioned - known == set()


# -----------------------------------------------------------------------------
# links and files


def anchors(document):
    """The anchors that GitHub makes from a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def local_links(document):
    """(path, anchor) of each link that does not lead to the web; either may be empty."""
    links = re.findall(r"\]\(([^)\s]+)\)", prose(document))
    local = [link for link in links if "://" not in link]
    return [(path, anchor) for path, _, anchor in (link.partition("#") for link in local)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_linked_files_exist(document):
    """A file is moved or renamed, and a link to it leads nowhere."""
    paths = {path for path, _ in local_links(document) if path}
    missing = [path for path in paths if not (document.parent / path).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_linked_headings_exist(document):
    """A heading is renamed or moved to another document, and a link to it leads to the wrong place."""
    missing = []
    for path, anchor in local_links(document):
        target = document.parent / path if path else document
        if anchor and anchor not in anchors(target):
            missing.append(f"{path}#{anchor}")
    assert missing == []


def test_readme_links_to_every_document():
    """A document is added to docs/ that no reader will find."""
    linked = {path for path, _ in local_links(README)}
    assert {name_of(document) for document in DOCUMENTS[1:]} - linked == set()


def tree_paths():
    """The paths in the README's file tree; what is indented belongs to the folder above it."""
    tree = next(block for block in code_blocks(README, "") if block.startswith("train_gpt2.py "))
    paths, folder = [], ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
            paths.append(name)
        else:
            paths.append(folder + name)
    return paths


def package_files():
    """Every file of the package that git keeps, relative to the repository."""
    files = [path for path in (ROOT / "gptlib").rglob("*") if path.is_file()]
    return {name_of(path) for path in files if "__pycache__" not in path.parts}


def test_tree_names_only_what_exists():
    """A file is renamed or removed, and the tree in the README still shows it."""
    missing = [path for path in tree_paths() if not (ROOT / path).exists()]
    assert missing == []


def test_tree_lists_every_script():
    """A script is added at the top without a line in the README's tree."""
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert scripts - set(tree_paths()) == set()


def test_rooms_list_every_file_of_the_package():
    """A module is added to gptlib/, renamed or removed, and docs/rooms.md is forgotten."""
    text = (ROOT / "docs" / "rooms.md").read_text()
    listed = re.findall(r"^\| `([\w./]+)` \|", text, re.M)
    rooms = {name.removeprefix("gptlib/").split("/")[0] for name in package_files()}
    there = {name if name.endswith(".py") else f"{name}/" for name in rooms}
    assert sorted(listed) == sorted(there - {"__init__.py"})


# -----------------------------------------------------------------------------
# what the README promises about itself


def test_readme_is_short():
    """The README grows until nobody reads it; details belong to docs/."""
    lines = README.read_text().count("\n")
    assert lines <= 260, "move what is for one reader in ten to docs/"


def test_status_box_is_near_the_top():
    """The box that says what was never run is removed, or pushed down where it is overlooked."""
    lines = README.read_text().splitlines()
    boxes = [number for number, line in enumerate(lines, 1) if line.startswith("> **Status.**")]
    assert len(boxes) == 1
    assert boxes[0] <= 20


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_only_the_status_box_says_what_never_ran(document):
    """A second place says what was never run; the two then drift apart."""
    outside = re.sub(r"^>.*$", "", prose(document), flags=re.MULTILINE)
    claims = r"\b(?:never|not) (?:been )?(?:run|tried|tested|built)\b|\bno (?:GPU|machine with GPUs) was\b"
    assert re.findall(claims, outside, re.IGNORECASE) == []


# -----------------------------------------------------------------------------
# tables that are made from settings


def table_rows(document, name_pattern):
    return re.findall(rf"^\| `{name_pattern}` \|.*\|$", document.read_text(), re.MULTILINE)


def check_table(document, name_pattern, config_class, label):
    """Compare a table with the settings it describes; the failure prints the rows to paste."""
    expected = []
    for field in dataclasses.fields(config_class):
        name, default, help = label(field.name), shown_default(field), field.metadata["help"]
        expected.append(f"| `{name}` | {default} | {help} |")
    if table_rows(document, name_pattern) != expected:
        rows = "\n".join(expected)
        pytest.fail(f"the table in {name_of(document)} should be:\n{rows}", pytrace=False)


def test_flag_table_is_up_to_date():
    """A training flag is added, renamed or explained in another way, and docs/flags.md is forgotten."""
    from train_gpt2 import TrainConfig
    check_table(ROOT / "docs" / "flags.md", r"--\w+", TrainConfig, lambda name: f"--{name}")


def test_settings_table_is_up_to_date():
    """A server setting is added, renamed or explained in another way, and docs/serving.md is forgotten."""
    from serve import Settings
    check_table(ROOT / "docs" / "serving.md", "[A-Z_]+", Settings, str.upper)


# -----------------------------------------------------------------------------
# the container image


def dockerfile():
    """The Dockerfile's text with continued lines joined."""
    return (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def copied_patterns():
    """The sources of the Dockerfile's COPY lines."""
    sources = re.findall(r"^COPY (.+) \S+$", dockerfile(), re.MULTILINE)
    return " ".join(sources).split()


def ignore_lines():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_dockerignore_lets_in_what_is_copied():
    """The build cannot find a file, or sends data and checkpoints to Docker along with the code."""
    first, *rest = ignore_lines()
    assert first == "*"
    let_in = [line.removeprefix("!") for line in rest if line.startswith("!")]
    assert sorted(let_in) == sorted(copied_patterns())


def test_dockerignore_excludes_only_caches_afterwards():
    """A later line of .dockerignore hides a folder of the package from the image."""
    excluded = [line for line in ignore_lines()[1:] if not line.startswith("!")]
    assert excluded == ["**/__pycache__"]


@pytest.mark.parametrize("pattern", copied_patterns())
def test_copied_files_exist(pattern):
    """A copied file is moved, and the build of the image fails."""
    assert list(ROOT.glob(pattern)) != []


def test_image_has_all_code():
    """A module or a file of the page is missing from the image, which fails when it starts."""
    copied = set()
    for pattern in copied_patterns():
        for path in ROOT.glob(pattern):
            files = path.rglob("*") if path.is_dir() else [path]
            copied.update(name_of(file) for file in files)
    needed = package_files() | {f"{script}.py" for script in SCRIPTS}
    assert needed - copied == set()


def test_image_keeps_the_folders_of_the_package():
    """The package is copied to another place, where `import gptlib` and the page are not found."""
    assert re.search(r"^WORKDIR /app$.*^COPY gptlib gptlib$", dockerfile(), re.MULTILINE | re.DOTALL)


def test_image_has_a_folder_for_hellaswag():
    """A user other than root cannot write the HellaSwag download, so evaluation fails in a container."""
    from gptlib.training.scoring import CACHE
    folder = CACHE.parent.relative_to(ROOT)
    assert f"/app/{folder}" in re.search(r"mkdir -m 1777 (.+)", dockerfile())[1].split()


@pytest.mark.parametrize("status, code", [(200, 0), (503, 1)])
def test_health_check_reports_the_status(status, code):
    """The health check has a mistake, and every container counts as unhealthy, or as healthy."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    command = re.search(r"^HEALTHCHECK .*? CMD (\[.*\])$", dockerfile(), re.MULTILINE)[1]
    _, *args = json.loads(command)
    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"PORT": str(server.server_port), "PATH": ""}
        done = subprocess.run([sys.executable, *args], env=environment, capture_output=True)
        server.shutdown()
    assert done.returncode == code
