"""Builds the compiled kernels; everything else about the project is in pyproject.toml.

They need a C++ compiler, and torch at build time, for its headers: an ordinary isolated build has no torch, so install
torch first and build with `pip install --no-build-isolation .` (or `-e .`). Without them the project installs all the
same, and computes what the kernels compute with PyTorch's own operations.
"""

import functools
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/mlframework/quantization/kernels/csrc")

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    # The arithmetic is float32 in the order written; rounding needs neither errno nor floating-point traps.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-g0",
    "-MMD",  # lists the headers of each source beside its object
    # GCC 12 takes its own AVX-512 intrinsics to task.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    # The oldest PyTorch whose stable ABI is enough: a library built against a newer one runs there, too.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


def is_current(target: Path) -> bool:
    """Whether an object is newer than this file and all that it was compiled from, which the compiler has listed."""
    rule = target.with_suffix(".d")
    if not (target.exists() and rule.exists()):
        return False
    _, *compiled_from = shlex.split(rule.read_text().replace("\\\n", " "))
    files = [Path(__file__), *map(Path, compiled_from)]
    return all(file.exists() and file.stat().st_mtime <= target.stat().st_mtime for file in files)


def compile_what_changed(compiler: Any, sources: Sequence[str], output_dir: str, **options: Any) -> list[str]:
    """Compiles each source in a thread of its own, as many at once as there are cores, unless its object is current."""
    compile = type(compiler).compile

    def compile_one(source: str) -> str:
        (target,) = compiler.object_filenames([source], output_dir=output_dir)
        if not is_current(Path(target)):
            compile(compiler, [source], output_dir=output_dir, **options)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


class BuildKernels(build_ext):
    """Builds what it can, and says what is missing where it cannot."""

    def build_extensions(self) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            self.skip("torch is not installed in the build environment")
            return
        root = Path(torch.origin).parent
        # setuptools compiles all files of an extension anew, one after the other, and for pip in a directory that it
        # then removes.
        self.build_temp = f"build/kernels-torch-{version('torch')}"
        self.compiler.compile = functools.partial(compile_what_changed, self.compiler)
        for extension in self.extensions:
            extension.include_dirs.append(str(root / "include"))
            extension.library_dirs.append(str(root / "lib"))
        try:
            super().build_extensions()
        except Exception as error:  # no compiler, an old one, headers of another PyTorch
            self.skip(f"they failed to build ({error})")

    def skip(self, reason: str) -> None:
        print(
            f"\nThe compiled kernels are left out: {reason}. Training and integer layers will run several times "
            "slower. To have them, install torch and a C++ compiler, then: pip install --no-build-isolation -e .\n",
            file=sys.stderr,
        )
        self.extensions = []


setup(
    ext_modules=[
        Extension(
            "mlframework.quantization.kernels._compiled",
            sources=sorted(str(path) for path in SOURCES.rglob("*.cpp")),
            depends=["setup.py", *sorted(str(path) for path in SOURCES.rglob("*.[hi]*"))],
            include_dirs=[str(SOURCES)],
            extra_compile_args=FLAGS,
            libraries=["torch_cpu", "torch", "c10"],
            language="c++",
            # The library speaks to PyTorch and not to Python: one build serves every Python.
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
