"""`python -m grootvl_ops`: what is built, for what, and what is in use."""

import platform

import torch

from . import __version__, _loading, backend


def report() -> str:
    """The report that `python -m grootvl_ops` prints, a fact a line."""
    built = _loading.built()
    lines = [
        ("grootvl_ops", __version__),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA: {torch.version.cuda or 'none'})"),
    ]
    if built:
        architectures = built.get("architectures", "unknown")
        lines += [
            ("built against", f"torch {built.get('torch', 'unknown')}"),
            ("compiler", built.get("compiler", "unknown")),
            ("assertions", "yes (slow)" if built.get("checked") else "no"),
            ("CUDA kernels", f"CUDA {built['cuda']}, for {architectures}" if built.get("cuda") else "none"),
        ]
    for part, problem in _loading.problems.items():
        state = "in use" if problem is None else f"not in use: {problem}"
        lines.append((f"{part} library", f"{_loading.library_file(part) or 'none'} ({state})"))
    lines.append(("CPU tensors", backend("cpu")))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(gpus)) or "no GPU visible"
    lines.append(("CUDA tensors", f"{backend('cuda')} ({names})"))
    return "\n".join(f"{name + ':':18} {value}" for name, value in lines)


if __name__ == "__main__":
    print(report())
