"""The README's commands, and those of the scripts' docstrings: each script, flag, value and file in them is there.

    python -m pytest tests/test_readme.py

A command block of the README is marked ```sh. Nothing is run: the command line is given to the script's own parser. The
flag tables have their tests beside the dataclasses they come from (test_train_gpt2.py, test_serve.py).
"""

import ast
import dataclasses
import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT
from gptlib.common import ArgumentParser
from gptlib.common import UserError


README = (ROOT / "README.md").read_text()
SCRIPTS = ["fineweb", "hellaswag", "train_gpt2", "inference", "serve", "bench"]
OTHERS = {"pip", "git", "curl", "cd", "export", "sleep", "done", "ssh", "ssh-keygen", "rsync", "tmux", "nvidia-smi",
          "docker", "mkdir", ".", "id", "echo"}  # programs that aren't ours to check
ASSIGNMENT = re.compile(r"[A-Z_]+=")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands():
    """(where, words of one simple command) of every command line, without assignments, `until`, `do` and container."""
    lines = [("README.md", line) for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:until )?(?:[A-Z_]+=\S+ )*(?:python|torchrun|gunicorn) [^`\n]+)`", README)
    lines += [("README.md", line) for line in inline if "..." not in line]
    for script in SCRIPTS:
        doc = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text())).replace("\\\n", " ")
        lines += [(f"{script}.py", line[2:]) for line in doc.splitlines() if line.startswith("$ ")]
    for where, line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.commenters = "#"
        lexer.whitespace_split = True
        words, found = [], iter([*lexer, ";"])
        for word in found:
            if set(word) <= set("<>"):
                next(found)  # the file
            elif set(word) <= set("();|&"):
                while words and (words[0] in ("until", "do") or ASSIGNMENT.match(words[0])):
                    yield where, words[:1]
                    words = words[1:]
                if words[:2] == ["docker", "run"]:  # what the container is to run
                    inside = next((i for i, word in enumerate(words) if word in ("python", "torchrun")), len(words))
                    yield where, words[:inside]
                    words = words[inside:]
                if words:
                    yield where, words
                words = []
            else:
                words.append(word)


class Parsed(Exception):
    pass


def read_by_its_parser(monkeypatch, script, args):
    """The parser of a script's main(), and what it makes of args; nothing after that is run."""
    real, found = ArgumentParser.parse_args, []

    def parse_args(parser, args=None, namespace=None):
        found.extend((parser, real(parser, args, namespace)))
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [script, *args])
        with pytest.raises(Parsed):
            importlib.import_module(script).main()
    return found


def test_every_command_names_what_is_there(monkeypatch):
    from gunicorn.config import Config
    from torch.distributed.run import get_args_parser

    from serve import Settings
    from train_gpt2 import TrainConfig, parse_flags
    settings = {f.name.upper() for f in dataclasses.fields(Settings)}
    seen = set()
    for where, words in commands():
        line = f"{where}: {' '.join(words)}"
        program, args = words[0], words[1:]
        if program == "torchrun":
            parser = get_args_parser()
            parser.exit_on_error = False
            known = parser.parse_args(args)  # what it doesn't know ends the test
            program, args = "python", [known.training_script, *known.training_script_args]
        if program == "gunicorn":
            known = Config().parser().parse_args(args)
            assert known.args == ["serve:app"], line
        elif program == "python" and args[0] == "-m":
            assert args[1] in ("pytest", "venv"), line
        elif program == "python":
            script = args[0].removeprefix("/app/").removesuffix(".py")  # /app: in the container
            assert script in SCRIPTS and args[0].endswith(".py"), line
            args = [arg for arg in args[1:] if arg != "--help"] or (["decode"] if script == "bench" else [])
            try:
                read_by_its_parser(monkeypatch, script, args)
                if script == "train_gpt2":
                    TrainConfig(**parse_flags(args))
            except UserError as e:
                raise AssertionError(f"{line}\n{e}") from e
            seen.add(script)
        elif ASSIGNMENT.match(program):
            name = program.split("=")[0]
            assert name in settings or name.startswith(("TORCH_", "NCCL_", "GLOO_", "TIKTOKEN_")), line
        else:
            assert program in OTHERS | {"until", "do"}, line
    assert seen == set(SCRIPTS)


def test_every_flag_in_the_text_is_one_of_ours(monkeypatch):
    from torch.distributed.run import get_args_parser
    found = set()
    for script in SCRIPTS:
        parser, _ = read_by_its_parser(monkeypatch, script, ["decode"] if script == "bench" else [])
        found.update(parser._option_string_actions)
    found.update(get_args_parser()._option_string_actions)
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`(--[^`\n]+)`", text):
        name = re.match(r"--[\w-]+", code)[0]
        others = ("--preload", "--gpus", "--user", "--stop-timeout", "--build-arg")  # gunicorn's and docker's
        assert name in found or name in others, f"{code} is a flag of nothing"


def test_every_file_in_the_text_is_there():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert anchors >= set(re.findall(r"\]\(#([^)]+)\)", README))
    tree = next(block for block in blocks("") if block.startswith("fineweb.py "))
    for line in tree.splitlines():
        assert (ROOT / line.split("  ")[0]).exists(), line
    listed = {line.split()[0] for line in tree.splitlines()}
    assert {f"{script}.py" for script in SCRIPTS} <= listed


def test_the_images_ignore_file_lets_in_what_the_dockerfile_copies_and_nothing_else():
    copied = " ".join(re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)).split()
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignore[0] == "*" and sorted(ignore[1:]) == sorted(f"!{name}" for name in copied)
    for name in copied:
        assert list(ROOT.glob(name)), name
