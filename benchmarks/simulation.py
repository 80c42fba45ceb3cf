"""`python -m benchmarks.simulation`: how many tasks a second so many processes run, and what keeps them from running more.

The fleets of `benchmarks.fleet`, from the costs that `python -m benchmarks.costs` has measured. `--check` holds them against
workers that run here, `--write` puts the tables into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.costs import FILE, Bench, Costs
from benchmarks.fleet import Fleet, Load, simulate
from benchmarks.machine import place
from benchmarks.services import Ground
from benchmarks.shapes import Shape
from benchmarks.table import markdown, short

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
FLEETS = (1, 2, 4, 8, 10, 100, 1000)
DURATIONS = (0.0, 0.1, 1.0, 10.0)
CHECKED = (1, 2, 4, 8)
#: what is run for a check: shape and seconds of a task
CHECKS = (("W1000", 0.0), ("W200", 0.05))
_REPEATS = 3
#: beside `idle`: time in which nothing ran, or that is in another figure already
_NOT_BUSY = ("iowait", "guest", "guest_nice")


def fleet_table(costs: Costs, fleets: Sequence[Fleet], executions: int) -> str:
    """Tasks a second by fleet and duration, with what saturates."""
    header = ["processes", "0 s, one execution", *(f"{duration:g} s" for duration in DURATIONS)]
    rows = []
    for fleet in fleets:
        tasks = max(2_000, 20 * fleet.processes)
        loads = [Load(tasks=tasks), *(Load(tasks=tasks, duration=d, executions=executions) for d in DURATIONS)]
        found = [simulate(costs, fleet, load) for load in loads]
        rows.append([f"{fleet.processes:,}", *(f"{short(outcome.rate)}: {outcome.narrow}" for outcome in found)])
    return markdown(header, rows)


def cost_table(costs: Costs) -> str:
    """Microseconds of CPU for a task, and what one core of each could do."""
    rows = []
    for title, kind in (("process of the pool", "pool"), ("worker's main process", "main"), ("Postgres", "database"),
                        ("broker", "broker")):  # fmt: skip
        one, many = getattr(costs.single, kind), getattr(costs.shared, kind)
        rows.append([title, f"{one * 1e6:,.0f}", f"{many * 1e6:,.0f}", f"{short(1 / one)} to {short(1 / many)}"])
    created = f"{costs.create * 1e6:,.0f} + {costs.submit * 1e6:,.0f}"
    rows.append(["create: Postgres + who submits", created, created, short(1 / (costs.create + costs.submit))])
    beat, look = (f"{seconds * 1e6:,.0f}" for seconds in (costs.heartbeat, costs.look))
    memory = ", ".join(f"{kind} {megabytes:.0f}" for kind, megabytes in costs.memory.items())
    idle = ", ".join(f"{kind} {100 * share:.2f}" for kind, share in costs.idle.items())
    return (
        markdown(["CPU us for a task", "message of its own", f"{costs.shared.tasks_per_message:.0f} share one",
                  "tasks/s of one core"], rows)
        + f"\n\nPostgres takes {beat} us for a heartbeat of a process and {look} us for a look of recovery that finds"
        f" nothing; a call to it on the same machine waits {costs.wait * 1e6:,.0f} us in which neither side works."
        f" Memory in MB of one process (PSS): {memory}. Idle, in % of a core for a worker with two processes: {idle}."
        f"\n\n{place(dict(costs.about))}, load {costs.about['machine']['load'][0]:g} from other programs as well."
    )  # fmt: skip


def check(costs: Costs) -> str:
    """Run what is predicted, here: servers and one worker on one machine."""
    rows = []
    cores = os.cpu_count() or 1
    with Ground() as ground:
        for processes in CHECKED:
            with Bench(ground, processes) as bench:
                for name, seconds in CHECKS:
                    graph = Shape.named(name).graph()
                    bench.run(Shape.named("W50").graph(), min(seconds, 0.03))
                    ours, all_of_it, began = sum(bench.cpu().values()) + time.process_time(), busy(), time.monotonic()
                    times = [bench.run(graph, seconds) for _ in range(1 if seconds else _REPEATS)]
                    ours = sum(bench.cpu().values()) + time.process_time() - ours
                    others = max(0.0, busy() - all_of_it - ours) / (time.monotonic() - began)
                    fleet = Fleet(processes=processes, per_worker=processes, cores=cores,
                                  round_trip=costs.wait, together=True)  # fmt: skip
                    predicted = simulate(costs, fleet, Load(tasks=len(graph), duration=seconds))
                    measured = len(graph) / statistics.median(times)
                    rows.append([name, f"{seconds:g}", str(processes), short(predicted.rate), short(measured),
                                 f"{predicted.rate / measured:.2f}", predicted.narrow, f"{others:.1f}"])  # fmt: skip
    rows.sort(key=lambda row: (row[0] != CHECKS[0][0], int(row[2])))
    header = ["shape", "seconds of a task", "processes", "predicted tasks/s", "measured", "ratio", "saturates",
              "cores that other programs took"]  # fmt: skip
    return f"{markdown(header, rows)}\n\n{cores} cores for everything, and what other programs took of them is not predicted."


def busy() -> float:
    """CPU seconds of all processes of this machine since its start."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - sum(getattr(times, kind, 0.0) for kind in _NOT_BUSY))


def replace_between(text: str, name: str, inside: str) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- /name -->` replaced.

    Raises:
        ValueError: it has no such markers.
    """
    before, begin, rest = text.partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not begin or not end:
        raise ValueError(f"there is no <!-- {name} --> ... <!-- /{name} -->")
    return f"{before}{begin}\n\n{inside.strip()}\n\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    fleet = Fleet(processes=1)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__)
    add = parser.add_argument
    add("--costs", type=Path, default=FILE, metavar="FILE", help=f"what was measured (default {FILE})")
    add("--per-worker", type=int, default=fleet.per_worker, metavar="N", help="processes of a worker (default 8)")
    add("--cores", type=int, default=fleet.cores, metavar="N", help="of a worker's machine (default 8)")
    add("--database-cores", type=int, default=fleet.database_cores, metavar="N", help="of Postgres (default 8)")
    add("--round-trip", type=float, default=fleet.round_trip, metavar="S", help="to Postgres (default 0.0003 s)")
    add("--executions", type=int, default=100, metavar="N", help="that run at the same time (default 100)")
    add("--check", action="store_true", help="also run 1, 2, 4 and 8 processes here; a minute")
    add("--write", action="store_true", help="put the tables into docs/scaling.md")
    options = parser.parse_args(argv)
    costs = Costs.read(options.costs)
    fleets = [
        Fleet(processes=processes, per_worker=options.per_worker, cores=options.cores,
              database_cores=options.database_cores, round_trip=options.round_trip)
        for processes in FLEETS
    ]  # fmt: skip
    tables = {"costs": cost_table(costs), "fleets": fleet_table(costs, fleets, options.executions)}
    if options.check:
        tables["check"] = check(costs)
    for table in tables.values():
        print(f"\n{table}")
    if options.write:
        text = DOCUMENT.read_text("utf-8")
        for name, table in tables.items():
            text = replace_between(text, name, table)
        DOCUMENT.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
