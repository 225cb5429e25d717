"""Builds the compiled libraries of grootvl_ops. Run as `pip install ./ops`.

Three libraries, of which each may be missing:

* `_C_cpu`, which needs a C++ compiler, and `_C_cuda`, which needs nvcc, whether or not a GPU is there. They use nothing
  but PyTorch's stable ABI: one build runs under every Python and every PyTorch from 2.10 on; the second for one major
  version of CUDA.
* `_C_autograd`, gradients that take the host less time than those registered in Python. It fits the PyTorch release
  that it was built against.

The headers are those of the PyTorch that is installed, or else of one that pip fetches for the build
(`build_backend.py`). Without a compiler the package is installed all the same, and its plain PyTorch reference runs.
What failed is in `_build.json`, which `python -m grootvl_ops` prints.

Environment:
    GROOTVL_REQUIRE_COMPILED=1   stop if the CPU part cannot be built
    FORCE_CUDA=1 / 0             stop if the CUDA part cannot be built / leave it out
    TORCH_CUDA_ARCH_LIST         architectures to build for, such as "8.0;9.0+PTX" (default: those of the visible GPUs,
                                 else a list that covers every GPU since 2020)
    MAX_JOBS                     compilers to run at a time
    GROOTVL_CHECKED=1            assertions in the kernels, and full checks of trees in each scan (slow)
    CXX, CUDA_HOME               which compiler and which toolkit
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import setup

# An isolated build does not see the packages of the environment that it is for, in which PyTorch may be.
sys.path.append(sysconfig.get_path("purelib"))
try:
    import torch
    from torch.utils import cpp_extension
except ImportError:  # without torch there is nothing to build against; `grootvl_ops` says so when it is imported
    torch = None

ROOT = Path(__file__).parent.resolve()
DEFAULT_CUDA_ARCHITECTURES = "8.0;8.6;9.0+PTX"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # of PyTorch 2.10
MANYLINUX = "csrc/manylinux.cpp"
WINDOWS = os.name == "nt"


def asked(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def cuda_wanted() -> bool:
    """Whether to build the CUDA part. Raises SystemExit where FORCE_CUDA=1 asks for what cannot be had."""
    force = os.environ.get("FORCE_CUDA", "")
    home = cpp_extension.CUDA_HOME if torch else None
    nvcc = home is not None and shutil.which(os.path.join(home, "bin", "nvcc"))
    found = {
        "nvcc": nvcc or "not found (set CUDA_HOME)",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}" if torch else "not found",
        "CUDA sources": sources("csrc/cuda/**/*.cu"),
    }
    possible = bool(nvcc) and torch.version.cuda is not None and bool(found["CUDA sources"])
    if force == "1" and not possible:
        found["CUDA sources"] = len(found["CUDA sources"])
        raise SystemExit(f"FORCE_CUDA=1, but the CUDA part cannot be built: {found}")
    return possible and force != "0"


def pip_cuda_files(pattern: str) -> list[str]:
    """Files of the nvidia packages that pip installs with torch, those of its own CUDA version first."""
    nvidia = Path(torch.__file__).parent.parent / "nvidia"
    own = f"cu{torch.version.cuda.split('.')[0]}"
    found = sorted(nvidia.glob(f"*/{pattern}"), key=lambda path: (own not in path.parts, path))
    return [str(path) for path in found]


def link_cuda_runtime(library) -> None:
    """Link against pip's CUDA runtime, which torch loads anyway, where the toolkit's cannot be found."""
    if any(Path(folder, name).exists() for folder in library.library_dirs for name in ("libcudart.so", "cudart.lib")):
        return
    runtimes = pip_cuda_files("lib/libcudart.so*")
    if runtimes:
        library.libraries.remove("cudart")
        library.extra_link_args.append(runtimes[0])


def compiler_version(command: list[str]) -> str:
    try:
        output = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return command[0]
    return output.partition("\n")[0]


def extensions(cuda: bool) -> list:
    common = {"depends": sources("csrc/**/*.h", "csrc/**/*.cuh"), "py_limited_api": True}
    checked = [f"{'/D' if WINDOWS else '-D'}GROOTVL_CHECKED"] if asked("GROOTVL_CHECKED") else []
    # torch.utils.cpp_extension adds the C++ standard that its headers need.
    cxx = ["/O2", "/openmp:experimental"] if WINDOWS else ["-O3", "-fopenmp-simd", "-fvisibility=hidden", "-g0"]
    if not WINDOWS:
        # No program can see these differences, and without them loops with a comparison are not vectorised.
        cxx += ["-fno-trapping-math", "-fno-math-errno"]
        # A backward pass computes again what the forward pass did, and must get the same bits.
        cxx += ["-ffp-contract=off"]
    kernels = cpp_extension.CppExtension(
        "grootvl_ops._C_cpu",
        sources("csrc/cpu/*.cpp", MANYLINUX),
        extra_compile_args=[*cxx, STABLE_ABI, *checked],
        **common,
    )
    kernels.libraries = ["torch_cpu"]
    gradients = cpp_extension.CppExtension(
        "grootvl_ops._C_autograd", sources("csrc/autograd.cpp", MANYLINUX), extra_compile_args=cxx, **common
    )
    if not cuda:
        return [kernels, gradients]
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_CUDA_ARCHITECTURES
    nvcc = ["-O3", "-Xcompiler", "-fvisibility=hidden", STABLE_ABI, "-DUSE_CUDA", *checked]
    # For headers that the toolkit lacks (a minimal one has no cusparse.h, say), after its own.
    nvcc += [f"-I{path}" for path in pip_cuda_files("include")]
    gpu_kernels = cpp_extension.CUDAExtension(
        "grootvl_ops._C_cuda",
        sources("csrc/cuda/**/*.cu", MANYLINUX),
        extra_compile_args={"nvcc": nvcc, "cxx": cxx},
        **common,
    )
    gpu_kernels.libraries = ["torch_cpu", "torch_cuda", "cudart"]
    link_cuda_runtime(gpu_kernels)
    return [kernels, gpu_kernels, gradients]


@contextmanager
def recorded_output(record: list[str]) -> Iterator[None]:
    """Append to `record` what the process and its children write, which is written out when the context ends."""
    sys.stdout.flush(), sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            file.seek(0)
            record.append(file.read().decode(errors="replace"))
            sys.stdout.write(record[-1])
            sys.stdout.flush()


def first_error(output: str, error: BaseException) -> str:
    """The first line in which a compiler, or the shell that finds none, says what is wrong, or else the exception."""
    line = re.search(r"^.*\berror: .*$", output, re.MULTILINE) or re.search(r"^.*: not found$", output, re.MULTILINE)
    return " ".join((line.group() if line else str(error)).split())[:500]


class BuildExtension(cpp_extension.BuildExtension if torch else object):
    """Builds the libraries, or, where none was demanded, lets an install without them succeed."""

    def build_extension(self, extension) -> None:
        part = extension.name.rpartition("_")[2]
        output: list[str] = []
        try:
            with recorded_output(output):
                super().build_extension(extension)
        except (Exception, SystemExit) as error:
            self.errors[part] = first_error("".join(output), error)
            self.remove_library(part)
            if (part == "cuda" and asked("FORCE_CUDA")) or (part == "cpu" and asked("GROOTVL_REQUIRE_COMPILED")):
                raise
            without = {
                "cpu": "the slow plain PyTorch reference will run; GROOTVL_REQUIRE_COMPILED=1 makes this an error",
                "cuda": "operations on GPUs will run the slow reference; FORCE_CUDA=1 makes this an error",
                "autograd": "gradients will take the host longer",
            }
            message = f"grootvl_ops: {extension.name} was not built ({self.errors[part]}): {without[part]}"
            print(message, file=sys.stderr)

    def remove_library(self, part: str) -> None:
        """Remove what an earlier build left in the same place: a wheel takes all that lies there."""
        for folder in self.folders:
            for library in Path(folder, "grootvl_ops").glob(f"_C_{part}.*"):
                library.unlink()

    def run(self) -> None:
        self.errors: dict[str, str] = {}
        self.folders = [self.build_lib, *([os.curdir] if self.inplace else [])]
        cuda = any(extension.name.endswith("_cuda") for extension in self.extensions)
        if not cuda:
            self.remove_library("cuda")
        try:
            super().run()
        except Exception as error:  # before the first file was compiled
            if asked("FORCE_CUDA") or asked("GROOTVL_REQUIRE_COMPILED"):
                raise
            self.errors.setdefault("cpu", first_error("", error))
        cuda = cuda and "cuda" not in self.errors
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "those of the GPUs it was built on") if cuda else None
        record = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None,
            "architectures": architectures,
            "compiler": compiler_version([os.environ.get("CXX", "c++")]),
            "checked": asked("GROOTVL_CHECKED"),
            "errors": self.errors,
        }
        file = Path(self.get_ext_fullpath("grootvl_ops._C_cpu")).with_name("_build.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=2) + "\n")
        self.extensions = self.distribution.ext_modules = [
            extension for extension in self.extensions if extension.name.rpartition("_")[2] not in self.errors
        ]


if torch is None:
    if asked("GROOTVL_REQUIRE_COMPILED") or asked("FORCE_CUDA"):
        raise SystemExit(
            "GROOTVL_REQUIRE_COMPILED or FORCE_CUDA is set, but torch was not found: its headers are needed"
        )
    setup()
else:
    setup(
        ext_modules=extensions(cuda_wanted()),
        cmdclass={"build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
