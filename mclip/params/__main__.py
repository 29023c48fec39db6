"""`python -m mclip.params`: see mclip.params."""

import argparse
import sys

from mclip import params
from mclip.params import ParamsError, apply_overlay, load


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mclip.params", description=params.__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="validate params.yaml")
    commands.add_parser("apply", help="lay an overlay over params.yaml").add_argument("overlay")
    args = parser.parse_args(argv)
    try:
        if args.command == "apply":
            apply_overlay(args.overlay)
        else:
            load()
    except ParamsError as err:
        print(err, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
