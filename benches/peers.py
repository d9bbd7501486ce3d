"""The models of other repositories, from a checkout of them."""

import ast
import sys
import types
from pathlib import Path

from gptlib.common import UserError


def read_definitions(file):
    """Run a peer's imports, classes and functions, but not its other lines: it may train at import.

    Returns them as a module.
    """
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    body = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, kinds) and getattr(node, "module", "") != "hellaswag":
            body.append(node)
    module = types.ModuleType("peer")
    module.master_process = False
    sys.modules["peer"] = module  # its dataclasses look themselves up there
    exec(compile(ast.Module(body, []), str(file), "exec"), module.__dict__)
    return module


def peer_classes(path):
    """The definitions of a peer's train_gpt2.py or model.py, as a module with GPT and GPTConfig.

    Raises UserError if neither file has them.
    """
    for file in (Path(path) / "train_gpt2.py", Path(path) / "model.py"):
        if file.is_file():
            module = read_definitions(file)
            if hasattr(module, "GPT") and hasattr(module, "GPTConfig"):
                return module
    raise UserError(f"--peer {path} is no checkout of build-nanogpt or nanoGPT: "
                    "no train_gpt2.py or model.py with GPT and GPTConfig in it")
