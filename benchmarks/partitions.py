"""`python -m benchmarks.partitions`: what a completion and the claim of the next task cost with so many partitions by day.

One connection, calling from within the server; with plans that are kept, as workers have it, and with those that Postgres
chooses to make anew.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks.joins import COMPLETIONS, WAYS, Fan
from benchmarks.machine import describe, line
from benchmarks.services import Ground
from benchmarks.table import markdown, short

#: partitions beside the default one
NUMBERS = (0, 5, 15)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.partitions", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each (default 5)")
    options = parser.parse_args(argv)
    taken: dict[tuple[int, bool], list[float]] = {}
    with Ground() as ground, ExitStack() as left:
        fans = {number: Fan(ground) for number in NUMBERS}
        for number, fan in fans.items():
            left.callback(fan.close)
            fan.make_partitions(number)
            fan.seconds(1, WAYS[1])
        for _ in range(options.repeats):
            for number, fan in fans.items():
                for keep_plans in (True, False):
                    found = taken.setdefault((number, keep_plans), [])
                    found.append(fan.seconds(1, WAYS[1], keep_plans=keep_plans) / COMPLETIONS * 1e6)
        about = describe(ground.server_versions(), ["ours"])
    median = {which: statistics.median(found) for which, found in taken.items()}
    rows = [
        [
            f"{number}",
            *(
                f"{short(median[number, keep])} ({short(median[number, keep] / median[0, keep])})"
                for keep in (True, False)
            ),
        ]
        for number in NUMBERS
    ]
    print(markdown(["partitions", "kept plans, us (times as long as with none)", "new plans, us"], rows))
    print(f"\n{line(about)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
