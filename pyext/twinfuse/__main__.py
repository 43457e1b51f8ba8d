"""`python -m twinfuse doctor [--json]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from twinfuse import __version__
from twinfuse.doctor import doctor


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m twinfuse", description=__doc__)
    parser.add_argument("--version", action="version", version=f"twinfuse {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("doctor", help="what is installed, what runs, what to do")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    found = doctor()
    print(json.dumps(found, indent=2) if options.json else found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
