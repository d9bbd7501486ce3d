"""The demo's text: the functions in the standard library of the Python that runs.

Each function and method is a document, written as `ast.unparse` writes it. So a document is
complete, as a rule shorter than the demo's context, and in one style, and what a small model has
to learn is Python and not where files of a thousand lines break off. Comments and docstrings are
left out: in half a sentence of English a quote that is never closed is one wrong word away.
"""

import ast
import os
import sysconfig
from pathlib import Path

# Folders of the standard library with tests, tables of code pages, and what some systems leave out.
NOT_EVERYWHERE = {
    "test", "tests", "site-packages", "dist-packages", "lib-dynload", "__pycache__", "encodings",
    "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip", "msilib"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def stdlib_files():
    """The .py files of the standard library that every installation has, sorted."""
    found = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        # os.walk goes on into what is left in this list
        folders[:] = [name for name in folders
                      if name not in NOT_EVERYWHERE and not name.startswith("config-")]
        for name in names:
            of_this_machine = name.startswith(("_sysconfigdata", "sitecustomize"))
            if name.endswith(".py") and not of_this_machine:
                found.append(os.path.join(folder, name))
    return sorted(found)


def read_functions(paths):
    """Yield the functions of Python files, each once: the source of one function a document."""
    seen = set()
    for path in paths:
        for function in find_functions(ast.parse(Path(path).read_bytes())):
            text = ast.unparse(without_docstrings(function)) + "\n"
            if text not in seen:
                seen.add(text)
                yield text


def find_functions(node):
    """The functions of a module and the methods of its classes; not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            yield child
        else:
            yield from find_functions(child)


def without_docstrings(tree):
    """The tree, changed in place; a body that was a docstring alone becomes `pass`."""
    for node in ast.walk(tree):
        has_body = isinstance(node, (*FUNCTIONS, ast.ClassDef))
        if has_body and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
