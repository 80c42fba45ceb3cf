"""Three promises, each as a run with a figure: workers killed at random, the broker lost, the database killed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.testing.campaign import Campaign
from pipeline.testing.fault import Fault
from pipeline.testing.fleet import Fleet
from pipeline.testing.kit import CrashKit
from pipeline.testing.workload import random_workflow, wide_workflow

#: seconds in which an execution ends by itself after the loss of a server
_RECOVERY = 60.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a scenario showed."""

    figure: str
    violations: tuple[str, ...]


def killed_workers(seed: int = 0, *, executions: int = 200, workers: int = 4) -> Outcome:
    """200 executions while each of four workers is killed every few seconds: all succeed."""
    rng = random.Random(seed)  # noqa: S311 - draws faults, guards nothing
    due = [rng.uniform(1, 5) for _ in range(workers)]

    def kill(seconds: float, ended: int) -> Sequence[Fault]:
        found = []
        for worker, moment in enumerate(due):
            if moment <= seconds:
                due[worker] = seconds + rng.uniform(3, 7)
                kind = rng.choice(("session-kill", "main-kill", "child-kill"))
                found.append(Fault(kind=kind, after=seconds, target=worker))
        return found

    kit = CrashKit(workers=workers)
    with kit.open_arena() as arena, Fleet(arena, workers=workers, concurrency=2) as fleet:
        campaign = Campaign(arena, fleet, patience=400)
        done = campaign.round(
            [(random_workflow(rng, campaign.ledger.folder), {}) for _ in range(executions)], (), meanwhile=kill
        )
    return Outcome(
        figure=f"{executions} executions with {len(done.injected)} kills of {workers} workers, {done.runs} handler runs",
        violations=done.violations,
    )


def lost_broker(seed: int = 0, *, width: int = 1_000) -> Outcome:
    """All that the broker holds is lost in the middle of a thousand tasks: the execution ends by itself within 60 s."""
    return _in_the_middle("broker-flush", width)


def killed_database(seed: int = 0, *, width: int = 1_000) -> Outcome:
    """kill -9 of Postgres and its restart in the middle of a thousand tasks: the execution ends within 60 s."""
    return _in_the_middle("database-kill", width)


def _in_the_middle(kind: str, width: int) -> Outcome:
    struck: list[int] = []

    def strike(seconds: float, ended: int) -> Sequence[Fault]:
        if ended < width // 3 or struck:
            return ()
        struck.append(ended)
        return (Fault(kind=kind, after=seconds),)

    with CrashKit().open_arena() as arena, Fleet(arena, workers=2, concurrency=2) as fleet:
        campaign = Campaign(arena, fleet, patience=_RECOVERY * 2)
        done = campaign.round(
            [(wide_workflow(width, campaign.ledger.folder, seconds=0.005), {})], (), meanwhile=strike
        )
    found = list(done.violations)
    if not done.injected:
        found.append("the execution ended before the fault")
    if done.recovery > _RECOVERY:
        found.append(f"it took {done.recovery:.1f} s to end, more than {_RECOVERY:g}")
    when = f"after {struck[0]} of {width + 2} tasks" if struck else "never"
    return Outcome(
        figure=f"{kind} {when}: ended {done.recovery:.1f} s later, {done.runs} handler runs", violations=tuple(found)
    )


SCENARIOS: Mapping[str, Callable[[int], Outcome]] = {
    "killed-workers": killed_workers,
    "lost-broker": lost_broker,
    "killed-database": killed_database,
}
