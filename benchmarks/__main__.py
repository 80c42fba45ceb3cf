"""`python -m benchmarks`: race everybody on this machine, print ratios and targets, write results and a chart."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.chart import draw
from benchmarks.environment import NotInstalled, cache, python_of
from benchmarks.field import CORE, FIELD, PEERS
from benchmarks.machine import describe, line, place
from benchmarks.race import Heat, Runner, pace_of, race
from benchmarks.remote import Absent, Remote
from benchmarks.services import Ground
from benchmarks.shapes import Shape
from benchmarks.table import heat_table, replace_marked, speed_table
from benchmarks.targets import target_table, targets

ROOT = Path(__file__).parents[1]
SHAPES = (
    "W100,W1000,W10000,D100,D500,D1000,D2000,D10000,L10x10,L20x20,L50x20,N50,S500,B500,R400,submit10000,again10000,M1000,W100000,"
    "M100000,start2,idle30"
)
#: of a peer's heat: what is compared, and nothing else
PEER_SHAPES = "W100,W1000,W10000,D100,D500,D2000,L10x10,L20x20,L50x20,N50,S500,R400"
QUICK_SHAPES = "W1000,D100,D500,L10x10,L20x20,S100,B100,submit10000,start2,idle5"
QUICK_CORE = ("ours", "bare", "redis", "postgres")
QUICK_PEERS, QUICK_PEER_SHAPES = ("dbos",), "W1000,D100,L10x10"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(argv)
    if options.results:
        about = json.loads(options.results.read_text("utf-8"))
        heats = [Heat.from_json(found) for found in about.pop("heats")]
    else:
        heats, about = _run(options)
    found = targets(heats)
    for heat in heats:
        print(f"\n{heat_table(heat)}")
    chosen = options.shapes or options.contenders or options.peers
    shown = [target for target in found if target.reached is not None] if chosen else found
    print(f"\n{target_table(shown)}\n\n{line(about)}{pace_of(heats)}")
    output: Path = options.output or Path(tempfile.mkdtemp(prefix="bench-results-"))
    output.mkdir(parents=True, exist_ok=True)
    results = {**about, "heats": [heat.to_json() for heat in heats], "targets": [target.to_json() for target in found]}
    (output / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
    chart = draw(heats, place(about))
    (output / "speed.svg").write_text(chart, "utf-8")
    print(f"results and chart: {output}")
    if options.write:
        _publish(heats, about, chart)
    return 0


def _run(options: argparse.Namespace) -> tuple[list[Heat], dict[str, Any]]:
    quick = options.quick
    budget = options.budget or (8.0 if quick else 60.0)
    core = _names(options.contenders) or (QUICK_CORE if quick else CORE)
    # who names contenders wants these and nobody else
    peers = _names(options.peers) or (() if options.contenders else QUICK_PEERS if quick else PEERS)
    shapes = {
        "core": _names(options.shapes or (QUICK_SHAPES if quick else SHAPES)),
        **{p: _names(options.shapes or (QUICK_PEER_SHAPES if quick else PEER_SHAPES)) for p in peers if p != "none"},
    }
    entered = {
        heat: core
        if heat == "core"
        else ("ours", *_variants(heat, all_of_them=not quick or heat in _names(options.peers)))
        for heat in shapes
    }
    with Ground(options.graphs, keep=options.keep) as ground:
        about = describe(ground.server_versions(), dict.fromkeys(name for names in entered.values() for name in names))
        heats = [
            _heat(heat, names, shapes[heat], ground, repeats=options.repeats, budget=budget)
            for heat, names in entered.items()
        ]
    load = [round(load, 2) for load in os.getloadavg()]
    return heats, {**about, "repeats": options.repeats, "budget": budget, "load_afterwards": load}


def _heat(
    name: str, contenders: Sequence[str], shapes: Sequence[str], ground: Ground, *, repeats: int, budget: float
) -> Heat:
    runners: dict[str, Runner] = {}
    with ExitStack() as left:
        for contender in contenders:
            try:
                remote = Remote(FIELD[contender], python_of(FIELD[contender]), ground)
            except NotInstalled as exc:
                runners[contender] = Absent(f"does not install: {exc}")
                continue
            left.callback(remote.stop)
            runners[contender] = remote
        return race(name, runners, shapes, repeats=repeats, budget=budget)


def _variants(peer: str, *, all_of_them: bool) -> list[str]:
    found = [entry.name for entry in FIELD.values() if entry.peer == peer]
    return found if all_of_them else found[:1]


def _publish(heats: Sequence[Heat], about: dict[str, Any], chart: str) -> None:
    readme = ROOT / "README.md"
    how = f"{about['repeats']} runs of each, but one of what says no spread; cut after {about['budget']:g} s."
    table = f"{speed_table(heats)}\n\n{line(about)}{pace_of(heats)} {how}"
    readme.write_text(replace_marked(readme.read_text("utf-8"), table), "utf-8")
    (ROOT / "docs" / "speed.svg").write_text(chart, "utf-8")


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _known(kind: str, names: Sequence[str]) -> Any:
    def check(text: str) -> str:
        if wrong := set(_names(text)) - set(names):
            raise argparse.ArgumentTypeError(f"no {kind} {', '.join(sorted(wrong))}; there are {', '.join(names)}")
        return text

    return check


def _shapes(text: str) -> str:
    try:
        for name in _names(text):
            Shape.named(name)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__,
        epilog=f"Peers are installed under {cache()}; PIPELINE_BENCH_HOME names another folder.",
    )  # fmt: skip
    add, some = parser.add_argument, "A,B"
    add("--quick", action="store_true", help="a few shapes, stock Celery and DBOS steps, within five minutes")
    add("--shapes", type=_shapes, metavar=some, help=f"instead of {SHAPES}")
    add(
        "--contenders",
        type=_known("contender", CORE),
        metavar=some,
        help=f"of {','.join(CORE)}; peers only where named",
    )
    add("--peers", type=_known("peer", (*PEERS, "none")), metavar=some, help=f"of {','.join(PEERS)}; or none")
    add("--repeats", type=int, default=3, metavar="N", help="runs of each (default 3)")
    add("--budget", type=float, metavar="S", help="seconds after which a run of others than ours is cut (60; quick: 8)")
    graphs = ROOT.parent / "shared" / "wfinstances"
    add("--graphs", type=Path, default=graphs, metavar="FOLDER", help=f"real graphs, in WfFormat (default {graphs})")
    add("--output", type=Path, metavar="FOLDER", help="of results.json and speed.svg (default: a new one)")
    add("--results", type=Path, metavar="FILE", help="run nothing: tables and chart of an earlier results.json")
    add("--keep", action="store_true", help="keep the folder of servers and logs, under the system's temporary files")
    add("--write", action="store_true", help="put table and chart into README.md and docs/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
