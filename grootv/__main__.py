"""Run a script with the models of this package registered in timm, for programs that take models by name.

    python -m grootv train.py DATA --model grootv_tiny
    torchrun --nproc-per-node 2 -m grootv train.py DATA --model grootv_tiny

The arguments after the script are its own.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(f"python -m grootv SCRIPT ...: there is no script {script}")
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
