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
import os
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
SCRIPTS = ["fineweb", "hellaswag", "train_gpt2", "inference", "serve", "plan", "bench"]

# programs of other people, whose arguments are not checked
OTHER_PROGRAMS = {
    "pip", "git", "curl", "cd", "export", "sleep", "until", "do", "done", "ssh", "ssh-keygen",
    "rsync", "tmux", "nvidia-smi", "docker", "mkdir", ".", "id", "echo", "ollama", "printf",
    "sbatch", "$UV", "sed", "grep", "lm_eval",
}
# flags of gunicorn, Docker and Slurm that the text mentions
OTHER_FLAGS = {"--preload", "--gpus", "--user", "--stop-timeout", "--build-arg", "--requeue",
               "--bind", "--ntasks-per-node", "--init", "--read-only"}
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
    """`torchrun FLAGS script.py ARGS` as `python script.py ARGS`. An unknown flag fails."""
    from torch.distributed.run import get_args_parser
    if words[0] != "torchrun":
        return words
    known = get_args_parser().parse_args(words[1:])
    return ["python", known.training_script, *known.training_script_args]


def script_of(words):
    """The name of our script that a command runs, or "" if it runs something else."""
    if "python" not in words[:1] and "torchrun" not in words[:1]:
        return ""
    scripts = [word for word in unwrap_torchrun(words)[1:2] if word.endswith(".py")]
    return scripts[0].removeprefix("/app/").removesuffix(".py") if scripts else ""


class Parsed(Exception):
    """Raised instead of returning from the parser, so that main() stops there."""


def parse_with_main(monkeypatch, script, args):
    """Call a script's main() up to parse_args; returns the parser."""
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
    """Guards against a documented command that stops working: a renamed flag, a mistyped value."""
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
    """Guards against commands that are no longer found, so that the test above checks none."""
    shown = {script_of(words) for words in COMMANDS.values()} - {""}
    assert shown == set(SCRIPTS)


@pytest.mark.parametrize("name", ["README.md", "docs/cloud.md", "docs/data.md", "docs/gpu.md",
                                  "docs/hosts.md", "docs/serving.md", "docs/speed.md"])
def test_commands_are_found_in(name):
    """Guards against commands in a form that is not recognised, so that they go unchecked."""
    assert [command for command in COMMANDS if command.startswith(f"{name}: ")] != []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_flags_in_the_text_exist(monkeypatch, document):
    """Guards against a flag in the text, such as `--seed`, that no program has any more."""
    from torch.distributed.run import get_args_parser
    from plan import PlanConfig
    known = set(get_args_parser()._option_string_actions) | OTHER_FLAGS
    known |= {f"--{field.name}" for field in dataclasses.fields(PlanConfig)}
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
    """Guards against a link that leads nowhere after its file was moved or renamed."""
    paths = {path for path, _ in local_links(document) if path}
    missing = [path for path in paths if not (document.parent / path).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_linked_headings_exist(document):
    """Guards against a link to a heading that was renamed or moved to another document."""
    missing = []
    for path, anchor in local_links(document):
        target = document.parent / path if path else document
        if anchor and anchor not in anchors(target):
            missing.append(f"{path}#{anchor}")
    assert missing == []


def test_readme_links_to_every_document():
    """Guards against a document in docs/ that no reader will find."""
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
    """Guards against a tree in the README that shows a file which was renamed or removed."""
    missing = [path for path in tree_paths() if not (ROOT / path).exists()]
    assert missing == []


def test_tree_lists_every_script():
    """Guards against a script at the top without a line in the README's tree."""
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert scripts - set(tree_paths()) == set()


def test_rooms_names_every_room():
    """Guards against a folder or a ground file of gptlib/ that docs/rooms.md does not tell of."""
    text = (ROOT / "docs" / "rooms.md").read_text()
    named = set(re.findall(r"`(\w+/|\w+\.py)`", text))
    first_parts = {name.removeprefix("gptlib/").split("/")[0] for name in package_files()}
    rooms = {name if name.endswith(".py") else f"{name}/" for name in first_parts}
    assert rooms - named == {"__init__.py"}


# -----------------------------------------------------------------------------
# what the README promises about itself


def test_readme_is_short():
    """Guards against a README that grows until nobody reads it."""
    assert README.read_text().count("\n") <= 260, "move what is for one reader in ten to docs/"


NEVER_RUN = "## What was never run\n"


def test_what_was_never_run_stands_after_the_results():
    """Guards against a README that opens with what it lacks, or does not say it at all."""
    text = README.read_text()
    assert text.count(NEVER_RUN) == 1
    assert text.index("## Results\n") < text.index(NEVER_RUN)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_one_list_says_what_never_ran(document):
    """Guards against a second place that says what was never run: the two then drift apart."""
    outside = re.sub(rf"{NEVER_RUN}.*?(?=^## )", "", prose(document), flags=re.M | re.S)
    outside = re.sub(r"\[[^\]]*\]\(#what-was-never-run\)", "", outside)
    claims = (r"\b(?:never|not) (?:been )?(?:run|tried|tested|built)\b"
              r"|\bno (?:GPU|machine with GPUs) was\b")
    assert re.findall(claims, outside, re.IGNORECASE) == []


# -----------------------------------------------------------------------------
# examples that a reader types one after the other, in one folder

EXAMPLES = [README, *(ROOT / "docs" / name for name in ("data.md", "fineweb.md", "learning.md"))]


def flag_value(words, flag):
    """The value of `flag` in a command, or "" if it is not given."""
    return words[words.index(flag) + 1] if flag in words else ""


def example_commands(document, script):
    """The words of each command of our script in a document's ```sh blocks."""
    lines = [line for block in code_blocks(document, "sh")
             for line in block.replace("\\\n", " ").splitlines()]
    simple = [command for line in lines for command in split_commands(line)]
    commands = [words for command in simple for words in split_prefixes(command)]
    return [unwrap_torchrun(words) for words in commands if script_of(words) == script]


@pytest.mark.parametrize("document", EXAMPLES, ids=name_of)
def test_an_example_trains_into_its_own_folder(document):
    """Guards against an example that continues, or samples from, whatever ran last."""
    demo = ["python", "train_gpt2.py", "--preset", "demo"]
    folders = [flag_value(words, "--log_dir") for words in example_commands(document, "train_gpt2")
               if words != demo]
    assert "" not in folders


@pytest.mark.parametrize("document", EXAMPLES, ids=name_of)
def test_an_example_samples_from_what_it_trained(document):
    """Guards against a checkpoint in an example that no command before it has made."""
    made = {flag_value(words, "--log_dir") for words in example_commands(document, "train_gpt2")}
    paths = [flag_value(words, "--checkpoint_path")
             for words in example_commands(document, "inference")]
    used = {path.split("/")[0] for path in paths if path}
    assert used - made - {"log"} == set()


@pytest.mark.parametrize("document", EXAMPLES, ids=name_of)
def test_a_dataset_is_not_written_among_the_texts(document):
    """Guards against an example after which who removes the dataset removes the texts as well."""
    for words in example_commands(document, "fineweb"):
        texts, dataset = flag_value(words, "--files"), flag_value(words, "--data_root")
        assert not texts or texts.split("/")[0] != dataset


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
    """Guards against docs/flags.md without a flag that was added, renamed or explained anew."""
    from train_gpt2 import TrainConfig
    check_table(ROOT / "docs" / "flags.md", r"--\w+", TrainConfig, lambda name: f"--{name}")


def test_settings_table_is_up_to_date():
    """Guards against docs/serving.md without a setting that was added, renamed or explained."""
    from serve import Settings
    check_table(ROOT / "docs" / "serving.md", "[A-Z_]+", Settings, str.upper)


# -----------------------------------------------------------------------------
# the container image


def dockerfile():
    """The Dockerfile's text with continued lines joined."""
    return (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def copied_patterns():
    """The sources of the Dockerfile's COPY lines."""
    sources = re.findall(r"^COPY (?!--)(.+) \S+$", dockerfile(), re.MULTILINE)
    return " ".join(sources).split()


def ignore_lines():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_dockerignore_lets_in_what_is_copied():
    """Guards against a build that lacks a file, or sends data and checkpoints to Docker too."""
    first, *rest = ignore_lines()
    assert first == "*"
    let_in = [line.removeprefix("!") for line in rest if line.startswith("!")]
    assert sorted(let_in) == sorted(copied_patterns())


def test_dockerignore_excludes_only_caches_afterwards():
    """Guards against a line of .dockerignore that hides a folder of the package from the image."""
    excluded = [line for line in ignore_lines()[1:] if not line.startswith("!")]
    assert excluded == ["**/__pycache__"]


@pytest.mark.parametrize("pattern", copied_patterns())
def test_copied_files_exist(pattern):
    """Guards against a build that fails because a copied file was moved."""
    assert list(ROOT.glob(pattern)) != []


def test_image_has_all_code():
    """Guards against an image without a module or a file of the page, which fails at its start."""
    copied = set()
    for pattern in copied_patterns():
        for path in ROOT.glob(pattern):
            files = path.rglob("*") if path.is_dir() else [path]
            copied.update(name_of(file) for file in files)
    needed = package_files() | {f"{script}.py" for script in SCRIPTS}
    assert needed - copied == set()


def test_image_keeps_the_folders_of_the_package():
    """Guards against a package in another place, where it and the page are not found."""
    assert re.search(r"^COPY gptlib gptlib$.*^COPY --from=code / /app$", dockerfile(), re.M | re.S)


def test_image_keeps_downloads_in_the_volume():
    """Guards against a HellaSwag download that is lost with the container."""
    setting = re.search(r"HELLASWAG_CACHE_DIR=(/runs/\S+)", dockerfile())
    code = "from gptlib.training.scoring import CACHE; print(CACHE.parent)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "HELLASWAG_CACHE_DIR": setting[1]})
    assert done.stdout.strip() == setting[1]


@pytest.mark.parametrize("status, code", [(200, 0), (503, 1)])
def test_health_check_reports_the_status(status, code):
    """Guards against a health check by which every container is unhealthy, or healthy."""

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
