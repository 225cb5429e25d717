"""Print a config with inheritance and overrides applied: python tools/print_config.py CONFIG [--cfg-options ...]."""

import argparse

from mmengine.config import Config

from grootv.openmmlab.runtime.command_line import OptionsAction


def main() -> None:
    """Parse the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="path of the config")
    parser.add_argument("--cfg-options", nargs="+", action=OptionsAction, default={}, help="overrides, key=value")
    args = parser.parse_args()
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    print(config.pretty_text)


if __name__ == "__main__":
    main()
