"""The command line: python -m grootv.explorer."""

import argparse
import logging
import os
import sys
from pathlib import Path

# OpenMP's threads otherwise spin while they wait, which takes the cores from drawing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HOSTS_HERE = ("127.0.0.1", "localhost", "::1")


def main(arguments: list[str] | None = None) -> int:
    """Run the explorer until it is interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m grootv.explorer",
        description="A page in the browser: trees, affinities and predictions of your own images and sentences.",
    )
    parser.add_argument("--host", default=HOSTS_HERE[0], help="to listen on (default: %(default)s, this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument(
        "--folder",
        type=Path,
        nargs="+",
        default=[Path()],
        help="where the page may read weights, configs and models; configs are run as Python (default: this folder)",
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for folder in args.folder:
        if not folder.is_dir():
            parser.error(f"--folder: {folder} is no folder")
    try:
        import uvicorn

        from . import views
        from .page import make_app
    except ImportError as error:
        print(f"error: the explorer needs Gradio ({error}): pip install 'grootv[explorer]'", file=sys.stderr)
        return 1
    views.plot_tree().encode("png")  # imports what the first picture needs
    app = make_app(args.folder)
    if args.host not in HOSTS_HERE:
        print(f"The explorer listens on {args.host}: whoever reaches this machine can use it.", flush=True)
    print(f"The explorer is at http://{args.host}:{args.port} (Ctrl+C ends it).", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
