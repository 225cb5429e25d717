"""A table of everyday flows: what works on GrootV, VMamba, and as controls on ConvNeXt and Swin.

    python benchmarks/everyday_flows.py
    python benchmarks/everyday_flows.py --before EARLIER
    python benchmarks/everyday_flows.py --device cuda

EARLIER is the folder of an earlier state of this project, whose GrootV gets a column of its own. Its operations have to
be built there: `cd EARLIER/ops && python setup.py build_ext --inplace`. The flows are those of this checkout,
tests/integrations/test_everyday_flows.py: each is a test that "works" on a model, or ends with the error that is shown.
AssertionError stands for a wrong result. All run in float32. A flow is "skipped" where its package is not installed, or
not made for the device.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from report import commit, table

ROOT = Path(__file__).parents[1]
MODELS = {
    "grootv_nano": "GrootV",
    "vmamba_nano": "VMamba",
    "convnext_tiny": "ConvNeXt",
    "swin_tiny_patch4_window7_224": "Swin",
}


def run(folder: Path, device: str, models: list[str]) -> dict[tuple[str, str], str]:
    """The outcomes, by flow and model, of the flows with the packages of `folder`."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    if folder != ROOT:
        paths.insert(0, str(folder / "ops"))
    with tempfile.TemporaryDirectory() as results:
        # The flows are copied: pytest would put the folders of this checkout before those of `paths`.
        for name in ("conftest.py", "integrations/test_everyday_flows.py", "integrations/everyday_models.py"):
            shutil.copy(ROOT / "tests" / name, results)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        options = {"cwd": results, "env": environment, "capture_output": True, "text": True}
        find = "import grootv; print(grootv.__file__)"
        found = subprocess.run([sys.executable, "-c", find], **options).stdout.strip()
        if not Path(found).is_relative_to(folder):
            sys.exit(f"grootv is imported from {found or 'nowhere'}, not from {folder}")
        command = [sys.executable, "-m", "pytest", "-q", "--junitxml=results.xml"]
        command += ["-k", f"{device} and ({' or '.join(models)})"]
        done = subprocess.run(command, **options)
        if done.returncode not in (0, 1):  # 1: some of the tests failed
            sys.exit(done.stdout + done.stderr)
        cases = ElementTree.parse(Path(results) / "results.xml").iter("testcase")
        return dict(outcome(case, device) for case in cases)


def outcome(case: ElementTree.Element, device: str) -> tuple[tuple[str, str], str]:
    """Flow and model of a test, and how it ended."""
    name, parameters = re.fullmatch(r"test_(\w+)\[(.*)\]", case.get("name")).groups()
    model = next(model for model in MODELS if model in parameters)
    others = [parameter for parameter in parameters.split("-") if parameter not in (model, device)]
    flow = name.replace("_", " ") + (f" ({', '.join(others)})" if others else "")
    problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    if problem is None:
        return (flow, model), "works"
    if problem.tag == "skipped":
        return (flow, model), "skipped"
    error = re.match(r"[\w.]+", problem.get("message"))[0].rpartition(".")[2]
    return (flow, model), error if error.endswith("Error") else "AssertionError"


def versions() -> str:
    """Of the packages that the flows use."""
    found = []
    for name in ("torch", "timm", "peft", "accelerate"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def main() -> None:
    """Run the flows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="folder of an earlier state of this project")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    now = run(ROOT, args.device, list(MODELS))
    columns = {label: {flow: end for (flow, m), end in now.items() if m == model} for model, label in MODELS.items()}
    if args.before is not None:
        earlier = run(args.before.resolve(), args.device, ["grootv_nano"])
        columns = {"GrootV before": {flow: end for (flow, _), end in earlier.items()}, **columns}
    flows = [[flow, *(column[flow] for column in columns.values())] for flow in columns["GrootV"]]
    counts = [sum(end == "works" for end in column.values()) for column in columns.values()]
    print(f"Commit {commit()}; {args.device}; Python {sys.version.split()[0]}, {versions()}\n")
    print(table(["flow", *columns], [*flows, [f"**work, of {len(flows)}**", *counts]]))


if __name__ == "__main__":
    main()
