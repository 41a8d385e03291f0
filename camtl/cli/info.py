"""``camtl info``: versions, devices, and which backend can run which op."""

from __future__ import annotations

import json
from collections.abc import Sequence

from camtl.cli._parser import CommandParser, add_flag


def run(argv: Sequence[str]) -> int:
    """Run ``camtl info``."""
    parser = CommandParser(
        "info",
        "Print the versions of camtl and of what it stands on, the CPU, memory and GPUs, and for every op "
        "which backend can run here and, if not, why. The first thing to put into a bug report.",
        (("for people", "camtl info"), ("for programs", "camtl info --json")),
        "[--json]",
    )
    add_flag(parser, "json", "print JSON")
    args = parser.parse(argv)
    from camtl.info import collect, render

    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else render(facts))
    return 0
