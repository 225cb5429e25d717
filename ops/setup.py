"""Builds the compiled library of grootvl_ops. Run as `pip install --no-build-isolation ./ops`, with torch installed.

The CPU part needs a C++17 compiler; the CUDA part is built whenever nvcc and a CUDA build of torch are there, whether
or not a GPU is. Without a compiler the package is installed all the same, and its plain PyTorch reference serves.

Environment:
    FORCE_CUDA=1 / 0         stop if the CUDA part cannot be built / leave it out
    TORCH_CUDA_ARCH_LIST     architectures to build for, such as "8.0;9.0+PTX" (default: those of the visible GPUs, else
                             a list that covers every GPU since 2020)
    MAX_JOBS                 compilers to run at a time
    GROOTVL_CHECKED=1        assertions in the kernels, and full checks of trees in each scan (slow)
    CXX, CUDA_HOME           which compiler and which toolkit
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:  # without torch there is nothing to build against; `grootvl_ops` says so when it is imported
    torch = None

ROOT = Path(__file__).parent.resolve()
DEFAULT_CUDA_ARCHITECTURES = "8.0;8.6;9.0+PTX"


def cuda_wanted() -> bool:
    """Whether to build the CUDA part. Raises SystemExit where FORCE_CUDA=1 asks for what cannot be had."""
    force = os.environ.get("FORCE_CUDA", "")
    nvcc = cpp_extension.CUDA_HOME is not None and shutil.which(os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc"))
    possible = bool(nvcc) and torch.version.cuda is not None
    if force == "1" and not possible:
        found = f"nvcc: {nvcc or 'not found'}, torch {torch.__version__} built with CUDA: {torch.version.cuda}"
        raise SystemExit(f"FORCE_CUDA=1, but the CUDA part cannot be built ({found}): set CUDA_HOME")
    return possible and force != "0"


def checked() -> bool:
    """Whether to build assertions into the kernels, for those who change them."""
    return os.environ.get("GROOTVL_CHECKED", "0") not in ("", "0")


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


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extension(cuda: bool):
    headers = sources("csrc/**/*.h", "csrc/**/*.cuh")
    options = {"name": "grootvl_ops._C", "depends": headers, "py_limited_api": True}
    if os.name == "nt":
        cxx = ["/O2", "/std:c++17", "/openmp:experimental"]
    else:
        cxx = ["-O3", "-std=c++17", "-fopenmp-simd", "-fvisibility=hidden", "-g0"]
        # No program can see these differences, and without them loops with a comparison are not vectorised.
        cxx += ["-fno-trapping-math", "-fno-math-errno"]
        # A backward pass computes again what the forward pass did, and must get the same bits.
        cxx += ["-ffp-contract=off"]
    if checked():
        cxx.append("/DGROOTVL_CHECKED" if os.name == "nt" else "-DGROOTVL_CHECKED")
    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    if not cuda:
        return cpp_extension.CppExtension(sources=files, extra_compile_args=cxx, **options)
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_CUDA_ARCHITECTURES
    nvcc = ["-O3", "-std=c++17", "-Xcompiler", "-fvisibility=hidden"]
    if checked():
        nvcc.append("-DGROOTVL_CHECKED")
    # For headers that the toolkit lacks (a minimal one has no cusparse.h, say), after its own.
    nvcc += [f"-I{path}" for path in pip_cuda_files("include")]
    cxx += [f"-idirafter{path}" for path in pip_cuda_files("include")]
    library = cpp_extension.CUDAExtension(
        sources=files + sources("csrc/cuda/**/*.cu"), extra_compile_args={"cxx": cxx, "nvcc": nvcc}, **options
    )
    link_cuda_runtime(library)
    return library


def build_record(cuda: bool) -> dict[str, str | bool | None]:
    """What `grootvl_ops` checks when it is imported, and `python -m grootvl_ops` prints."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "architectures": os.environ.get("TORCH_CUDA_ARCH_LIST", "those of the GPUs it was built on") if cuda else None,
        "compiler": compiler_version([os.environ.get("CXX", "c++")]),
        "checked": checked(),
    }


class BuildExtension(cpp_extension.BuildExtension if torch else object):
    """Builds the library, or, where none was demanded, lets an install without it succeed."""

    def run(self) -> None:
        cuda = self.has_cuda()
        compiler = self.compiler  # the option, which a run replaces by an object
        try:
            super().run()
        except Exception as error:
            if os.environ.get("FORCE_CUDA") == "1":
                raise
            self.say(f"building {'the CUDA part' if cuda else 'the compiled library'} failed: {error}")
            if cuda:
                self.say("building for the CPU alone; FORCE_CUDA=1 makes this an error.")
                vars(self.extensions[0]).update(vars(extension(cuda=False)))
                self.compiler = compiler
                return self.run()
            self.say("installing without the compiled library; the slow plain PyTorch reference will serve.")
            self.extensions = self.distribution.ext_modules = []
            return
        record = Path(self.get_ext_fullpath("grootvl_ops._C")).with_name("_build.json")
        record.write_text(json.dumps(build_record(cuda), indent=2) + "\n")

    def has_cuda(self) -> bool:
        return any(source.endswith(".cu") for source in self.extensions[0].sources)

    @staticmethod
    def say(message: str) -> None:
        print(f"grootvl_ops: {message}", file=sys.stderr)


if torch is None:
    setup()
else:
    setup(
        ext_modules=[extension(cuda_wanted())],
        cmdclass={"build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
