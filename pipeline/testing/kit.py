"""Break workflows again and again, and see that nothing is lost."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.definition import WorkflowDefinition
from pipeline.document import Document
from pipeline.testing.arena import Arena
from pipeline.testing.campaign import Campaign, Round
from pipeline.testing.checks import Record
from pipeline.testing.fault import OF_OWN_BROKER, OF_OWN_DATABASE, Fault, all_kinds, draw, select
from pipeline.testing.fleet import Fleet
from pipeline.testing.report import Broken, Report
from pipeline.testing.workload import random_work

#: how often a fault that did not hit is planned again
_AGAIN = 5


class CrashKit:
    """Runs a workflow (random ones where none is given) again and again, with faults in each round.

    Args:
        definition: a model, a dict or a parsed file; None: random graphs of 5 to 30 tasks.
        input_data: of every execution.
        handlers: modules of the handlers that it needs beside the built-in ones.
        workers: worker processes, with `concurrency` pool children each.
        in_flight: executions at a time, so that one fault hits many.
        together: faults in one round.
        patience: seconds in which a round must end.
        may_fail: the workflow may fail; it must end all the same.
        check: a further check of yours: what is wrong with an execution that ended.
        database_url: of a Postgres on which the kit may make a database; None: an embedded one, which it may kill.
        broker_url: of a broker; None: an embedded Redis, which it may kill.
        settings: changes to the installation's settings, by name.
    """

    def __init__(
        self, definition: WorkflowDefinition | Mapping[str, Any] | Document | None = None, *,
        input_data: Mapping[str, Any] | None = None, handlers: Sequence[str] = (), workers: int = 2, concurrency: int = 2,
        in_flight: int = 8, together: int = 3, patience: float = 90.0, may_fail: bool = False,
        check: Callable[[Record], Sequence[str]] = lambda record: (),
        database_url: str | None = None, broker_url: str | None = None, settings: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.definition, self.input_data = definition, dict(input_data or {})
        self.workers, self.concurrency, self.in_flight, self.together = workers, concurrency, in_flight, together
        self.patience, self.may_fail, self.check = patience, may_fail, check
        self.database_url, self.broker_url = database_url, broker_url
        self.handlers, self.settings = (*handlers, "pipeline.testing.handlers"), dict(settings or {})

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of faults that this kit can inject."""
        alien = (OF_OWN_BROKER if self.broker_url else frozenset()) | (
            OF_OWN_DATABASE if self.database_url else frozenset()
        )
        return tuple(kind for kind in all_kinds() if kind not in alien)

    def open_arena(self) -> Arena:
        """Servers and installation, for one campaign."""
        return Arena(
            handlers=self.handlers, database_url=self.database_url, broker_url=self.broker_url, changes=self.settings
        )

    def run(
        self, faults: Sequence[str] | Sequence[Fault] | None = None, *, seed: int = 0, minutes: float = 1.0,
        executions: int | None = None, tell: Callable[[Round], None] = lambda done: None,
    ) -> Report:  # fmt: skip
        """Inject faults for some minutes, or until so many executions ran.

        Args:
            faults: names of kinds (see `select`), all of them where None; or faults, each of which is made to hit once.
            seed: of everything that is drawn; the times at which processes meet are the machine's own.
            minutes: to go on for; with faults given, at most.
            executions: to end after.
            tell: is given every round.

        Raises:
            ValueError: a kind is not known.
            DefinitionError: the workflow is invalid.
            ServiceUnavailable: servers or workers do not start.
        """
        rng = random.Random(seed)  # noqa: S311 - draws faults, guards nothing
        fixed = [fault for fault in faults or () if isinstance(fault, Fault)]
        names = [name for name in faults or () if isinstance(name, str)]
        kinds = tuple(dict.fromkeys(f.kind for f in fixed)) or (select(names, self.kinds) if names else self.kinds)
        report = Report(seed=seed, kinds=kinds)
        began = time.monotonic()
        with self.open_arena() as arena:
            model = None if self.definition is None else arena.engine.register(self.definition)
            with Fleet(arena, workers=self.workers, concurrency=self.concurrency) as fleet:
                campaign = Campaign(arena, fleet, patience=self.patience, may_fail=self.may_fail, check=self.check)
                source, again, tries = (iter(fixed) if fixed else draw(kinds, rng)), deque[Fault](), Counter[Fault]()
                while time.monotonic() - began < minutes * 60 and report.executions < (executions or float("inf")):
                    planned: list[Fault] = []
                    while len(planned) < self.together:
                        fault = again.popleft() if again else next(source, None)
                        if fault is None:
                            break
                        planned.append(fault)
                    if not planned:
                        break
                    models = [model] * self.in_flight if model else random_work(rng, campaign.ledger.folder, self.in_flight)
                    done = campaign.round([(each, self.input_data) for each in models], planned)
                    for fault in done.missed:
                        sooner = replace(fault, nth=max(1, fault.nth // 2), after=0.0)
                        tries[sooner] += 1
                        if tries[sooner] <= _AGAIN:
                            again.append(sooner)
                    _add(report, done, planned)
                    report.restarts, report.seconds = fleet.restarts, time.monotonic() - began
                    tell(done)
                    if any("has not ended" in text for text in done.violations):
                        break  # what hangs would make every later round hang
            left = campaign.connections_left()
            if left:
                report.broken.append(Broken(violations=tuple(left), seed=seed, round=0, faults=()))
        return report


def _add(report: Report, done: Round, planned: Sequence[Fault]) -> None:
    report.faults.update(fault.kind for fault in done.injected)
    report.executions += done.executions
    report.runs += done.runs
    if done.violations:
        report.broken.append(
            Broken(violations=done.violations, seed=report.seed, round=done.number, faults=tuple(planned))
        )
    if done.recovery > report.slowest_recovery:
        report.slowest_recovery, report.slowest_faults = done.recovery, done.injected
