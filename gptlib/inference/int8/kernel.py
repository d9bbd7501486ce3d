"""The product with 8-bit weights of int8_linear.cpp, compiled when it is first needed."""

import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

from gptlib.common import first_line, log, private_folder, warn

SOURCE = Path(__file__).parent / "int8_linear.cpp"
INSTRUCTIONS = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni")
COMPILE_SECONDS = 300  # far longer than any compiler takes


def has_instructions():
    """Whether this processor has what the kernel is written for."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return all(capabilities.get(name) for name in INSTRUCTIONS)


def compiler_command():
    """The command, without the name of its output, that makes a library in the source's folder."""
    from torch.utils.cpp_extension import include_paths, library_paths
    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-mprefer-vector-width=512"]
    flags += ["-m" + name.replace("_", "") for name in INSTRUCTIONS]
    flags += [f"-I{path}" for path in include_paths()]
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-lc10"]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    return [*compiler, *flags, SOURCE.name, *libraries]


def compile_kernel(folder):
    """The path of the compiled library in this folder; it is compiled if it is not there yet.

    Its name has a hash of all that it depends on. Raises OSError or subprocess.SubprocessError.
    """
    command = compiler_command()
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(" ".join([torch.__version__, *command]).encode())
    path = Path(folder).resolve() / f"int8_linear_{key.hexdigest()[:16]}.so"
    if not path.exists():
        log("compiling the product with 8-bit weights, once (about 10 seconds) ...")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
            output = Path(unfinished) / path.name
            subprocess.run([*command, "-o", str(output)], cwd=SOURCE.parent, check=True,
                           capture_output=True, text=True, timeout=COMPILE_SECONDS)
            output.replace(path)  # whole or not at all, whoever else compiles it
    return path


@functools.cache
def load_int8_linear():
    """The operator torch.ops.gptlib.int8_linear, or None if this processor lacks the
    instructions or, with a warning, if no compiler works.
    """
    if not has_instructions():
        return None
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or private_folder("int8")
    try:
        torch.ops.load_library(compile_kernel(folder))
    except (OSError, subprocess.SubprocessError) as e:
        reason = first_line(getattr(e, "stderr", None) or e)
        warn("products with 8-bit weights are slower than they could be: a C++ file cannot be "
             f"compiled here ({reason})")
        return None
    torch.library.register_fake("gptlib::int8_linear", int8_linear_shape)
    return torch.ops.gptlib.int8_linear.default


def int8_linear_shape(x, panels, scale, zero_sum, bias, mask, outliers, outlier_weight, N):
    """An empty tensor of the operator's output shape, which torch.compile asks for."""
    return x.new_empty(*x.shape[:-1], N)
