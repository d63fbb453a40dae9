"""The native extension only; everything else about the package is in pyproject.toml.

`scope_fast._native` is built from csrc/ where those sources and an importable torch are there (so: install with
--no-build-isolation), with the CUDA kernels where torch is a CUDA build and nvcc is found: for the GPU that is there,
for TORCH_CUDA_ARCH_LIST, or for sm_80 and from sm_90 on. It is optional: without a compiler the package installs and
works, on the other backends.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parent
SOURCES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*.cpp"))]
SOURCES += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
CUDA_SOURCES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]


def skipped(reason, what=""):
    print(f"scope_fast._native{what} is not built: {reason}", file=sys.stderr)
    return {}


def native_extension():
    """setup()'s arguments for the extension; none where it cannot be built."""
    if not SOURCES:
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return skipped(f"{error}; install torch first, then this package with --no-build-isolation")

    # ninja and the version checks of torch raise RuntimeError, a missing compiler OSError or CalledProcessError
    failures = (BaseError, CCompilerError, OSError, RuntimeError, subprocess.CalledProcessError)

    class OptionalBuild(cpp_extension.BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except failures as error:
                skipped(f"{type(error).__name__}: {error}", " with its CUDA kernels" if with_cuda else "")
                if not (with_cuda and self.build_without_cuda()):
                    self.extensions = []  # nothing to copy or to put in the wheel

        def build_without_cuda(self):
            for extension in self.extensions:
                extension.sources, extension.define_macros = list(SOURCES), []
                extension.libraries = [name for name in extension.libraries if "cuda" not in name]
            try:
                super().build_extensions()
            except failures as error:
                skipped(f"{type(error).__name__}: {error}")
                return False
            return True

    # at::parallel_for is a header template: compiled without OpenMP it runs on one thread
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    with_cuda = bool(CUDA_SOURCES) and torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    if with_cuda and not torch.cuda.is_available() and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0+PTX"  # torch has no GPU to ask, and would fail
        print(f"scope_fast._native: no GPU here, built for TORCH_CUDA_ARCH_LIST={architectures}", file=sys.stderr)
    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    extension = kind(
        "scope_fast._native",
        sources=SOURCES + (CUDA_SOURCES if with_cuda else []),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("SCOPE_FAST_WITH_CUDA", "1")] if with_cuda else [],
        # std::bit_cast; the oldest supported torch compiles as C++17 unless asked
        extra_compile_args={"cxx": ["-std=c++20", "-O3", "-g0", "-Wno-psabi", *openmp], "nvcc": ["-std=c++20", "-O3"]},
        extra_link_args=openmp,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


setup(**native_extension())
