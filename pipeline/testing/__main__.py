"""`python -m pipeline.testing`: break workflows for some minutes, and say what was found."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.app import read_settings
from pipeline.document import read_document
from pipeline.errors import PipelineError
from pipeline.testing.campaign import Round
from pipeline.testing.fault import Fault, all_kinds, describe, from_json
from pipeline.testing.kit import CrashKit
from pipeline.testing.report import Report
from pipeline.testing.scenarios import SCENARIOS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 1 where something was lost."""
    options = _parser().parse_args(argv)
    if options.list:
        for kind in all_kinds():
            print(f"{kind:<24}  {describe(kind)}")
        return 0
    try:
        if options.scenario:
            return max(_scenario(name, options.seed) for name in options.scenario)
        worst = _campaign(options)
        if options.scenarios:
            worst = max(worst, *(_scenario(name, options.seed) for name in SCENARIOS))
    except (PipelineError, ValueError) as exc:
        print(exc, file=sys.stderr)
        return 2
    return worst


def _campaign(options: argparse.Namespace) -> int:
    plan: tuple[Fault, ...] = from_json(options.plan.read_text()) if options.plan else ()
    kit = CrashKit(
        read_document(options.file) if options.file else None, input_data=json.loads(options.input),
        handlers=read_settings().handlers, workers=options.workers, may_fail=options.may_fail,
        together=len(plan) or options.together, in_flight=options.in_flight,
        database_url=options.database_url, broker_url=options.broker_url, settings={"lease": options.lease},
    )  # fmt: skip
    report = kit.run(
        plan or (options.kinds.split(",") if options.kinds else None), seed=options.seed, minutes=options.minutes,
        executions=options.executions, tell=_tell,
    )  # fmt: skip
    print(report.table())
    print(report.details())
    _show(report)
    print(report.summary())
    return 1 if report.violations else 0


def _scenario(name: str, seed: int) -> int:
    began = time.monotonic()
    outcome = SCENARIOS[name](seed)
    print(
        f"{name}: {outcome.figure}, {time.monotonic() - began:.0f} s in all, violations: {len(outcome.violations)}",
        flush=True,
    )
    for text in outcome.violations:
        print(f"  {text}")
    return 1 if outcome.violations else 0


def _tell(done: Round) -> None:
    kinds = ", ".join(fault.kind for fault in done.injected)
    print(f"{done.number}: {done.executions} executions, recovered in {done.recovery:4.1f} s: {kinds}", file=sys.stderr)
    for text in done.violations:
        print(f"  VIOLATION {text}", file=sys.stderr, flush=True)


def _show(report: Report) -> None:
    for broken in report.broken:
        print(broken)
        print("  again: put the faults in a file and run `python -m pipeline.testing --seed"
              f" {broken.seed} --plan FILE`")  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.testing", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a workflow; without it: random graphs")
    parser.add_argument("--input", default="{}", metavar="JSON", help="the executions' input")
    parser.add_argument("--minutes", type=float, default=1.0, metavar="M", help="how long (default 1)")
    parser.add_argument("--executions", type=int, metavar="N", help="end after so many executions")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default 0)")
    parser.add_argument("--kinds", default="", metavar="A,B", help="kinds of faults, or beginnings of their names")
    parser.add_argument("--together", type=int, default=3, metavar="N", help="faults in a round (default 3)")
    parser.add_argument("--in-flight", type=int, default=8, metavar="N", help="executions in a round (default 8)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="worker processes (default 2)")
    parser.add_argument("--lease", type=float, default=3.0, metavar="S", help="seconds without a sign of life after which"
                        " a worker is taken for lost; longer than a handler holds Python's lock (default 3)")  # fmt: skip
    parser.add_argument("--may-fail", action="store_true", help="the workflow may fail; it must end")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="the faults of one round, as a report printed them")
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="only this; may be given again")
    parser.add_argument("--scenarios", action="store_true", help="the scenarios too, after the faults")
    parser.add_argument("--list", action="store_true", help="name all kinds of faults and leave")
    parser.add_argument("--database-url", metavar="URL", help="of a server where the kit may make a database")
    parser.add_argument("--broker-url", metavar="URL", help="of a broker; its queue there is the kit's own")
    return parser


if __name__ == "__main__":
    sys.exit(main())
