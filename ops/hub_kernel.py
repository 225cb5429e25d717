"""Turns a wheel into a kernel for the Hub: `python ops/hub_kernel.py WHEEL FOLDER`.

`kernels.get_local_kernel(FOLDER)`, of the package `kernels`, then gives the module `grootvl_ops`, and
`kernels.get_kernel` after an upload of the folder. One variant is for machines without a GPU, one for the wheel's CUDA.
"""

import json
import platform
import sys
import zipfile
from pathlib import Path

STABLE_ABI = "210"  # of PyTorch 2.10, as in setup.py


def write_kernel(wheel: Path, folder: Path) -> None:
    """Write `folder`/build/VARIANT for each variant that `wheel` has libraries for."""
    with zipfile.ZipFile(wheel) as content:
        version = wheel.name.split("-")[1]
        built = json.loads(content.read("grootvl_ops/_build.json"))
        backends = {"cpu": {"type": "cpu"}}
        if built["cuda"]:
            major, minor = built["cuda"].split(".")[:2]
            backends[f"cu{major}{minor}"] = {"type": "cuda", "archs": built["architectures"].split(";")}
        for name, backend in backends.items():
            target = folder / "build" / f"torch-stable-abi{STABLE_ABI}-{name}-{platform.machine()}-linux"
            for member in content.namelist():
                package, _, file = member.partition("/")
                if member.endswith("/"):  # auditwheel lists folders, too
                    continue
                if package == "grootvl_ops" and not (name == "cpu" and file.startswith("_C_cuda")):
                    (target / file).parent.mkdir(parents=True, exist_ok=True)
                    (target / file).write_bytes(content.read(member))
            metadata = {
                "id": f"grootvl_ops_{version.replace('.', '_')}_{name}",
                "name": "grootvl-ops",
                "version": 1,
                "license": "Apache-2.0",
                "python-depends": [],
                "backend": backend,
            }
            (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write_kernel(Path(sys.argv[1]), Path(sys.argv[2]))
