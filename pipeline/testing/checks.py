"""What must hold after any fault: each check is a function of the evidence, and says what it found wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.states import TERMINAL_EXECUTIONS, ExecutionStatus, TaskStatus
from pipeline.testing.ledger import Entry


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """What the store says of one task."""

    task_id: str
    handler: str
    status: TaskStatus
    epoch: int
    dependencies: tuple[str, ...]
    #: epoch and outcome of each attempt that was followed by another
    attempts: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the store says of one execution."""

    execution_id: str
    status: ExecutionStatus
    error_message: str | None
    tasks: Mapping[str, TaskRecord]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the store says, and what the ledger says, of some executions."""

    records: Sequence[Record]
    entries: Sequence[Entry]
    effects: frozenset[str]
    #: how many faults could have made a task run again
    faults: int
    #: the database was killed: claims that it forgot may be given again under the same epoch
    claims_forgotten: bool = False
    may_fail: bool = False


def ended(evidence: Evidence) -> Iterator[str]:
    """Every execution ended, and well unless it is meant to fail; no task of it is open."""
    for record in evidence.records:
        if record.status not in TERMINAL_EXECUTIONS:
            waits = ", ".join(f"{t.task_id} {t.status}" for t in record.tasks.values() if t.status in _OPEN)
            yield f"{record.execution_id} has not ended: {waits or 'no task is open'}"
        elif record.status != ExecutionStatus.SUCCESS and not evidence.may_fail:
            yield f"{record.execution_id} is {record.status}: {record.error_message}"
        elif found := [t.task_id for t in record.tasks.values() if t.status in _OPEN]:
            yield f"{record.execution_id} is {record.status} with open tasks {', '.join(found)}"


def recorded_as_run(evidence: Evidence) -> Iterator[str]:
    """What succeeded ran to its end under the epoch that was recorded; what ran is on record, once for each claim."""
    finished = {(e.execution_id, e.task_id, e.epoch) for e in evidence.entries if e.kind == "end"}
    starts = Counter((e.execution_id, e.task_id, e.epoch) for e in evidence.entries if e.kind == "start")
    known: set[tuple[str, str, int]] = set()
    for record in evidence.records:
        for task in record.tasks.values():
            key = record.execution_id, task.task_id
            known |= {(*key, epoch) for epoch in (*task.attempts, task.epoch)}
            if task.status == TaskStatus.SUCCESS and (*key, task.epoch) not in finished:
                yield f"{'/'.join(key)} is recorded as a success of epoch {task.epoch}, which did not run to its end"
    if evidence.claims_forgotten:
        return
    for (execution_id, task_id, epoch), count in starts.items():
        if count > 1:
            yield f"{execution_id}/{task_id} ran {count} times under epoch {epoch}"
        if (execution_id, task_id, epoch) not in known:
            yield f"{execution_id}/{task_id} ran under epoch {epoch}, which is not on record"


def in_order(evidence: Evidence) -> Iterator[str]:
    """No run began before every dependency's recorded run had ended."""
    ends = {(e.execution_id, e.task_id, e.epoch): e.at for e in reversed(evidence.entries) if e.kind == "end"}
    records = {record.execution_id: record for record in evidence.records}
    for entry in evidence.entries:
        record = records.get(entry.execution_id)
        if entry.kind != "start" or record is None or entry.task_id not in record.tasks:
            continue
        for dependency in record.tasks[entry.task_id].dependencies:
            end = ends.get((entry.execution_id, dependency, record.tasks[dependency].epoch))
            if end is None or end > entry.at:
                yield f"{entry.execution_id}/{entry.task_id} began before {dependency} had ended"


def run_again_for_a_reason(evidence: Evidence) -> Iterator[str]:
    """No task, and so no chord's body, ran again beyond its retries without faults enough that explain it."""
    runs = Counter((e.execution_id, e.task_id) for e in evidence.entries if e.kind == "start")
    for record in evidence.records:
        for task in record.tasks.values():
            asked = sum(outcome == "retry" for outcome in task.attempts.values())
            extra = runs[record.execution_id, task.task_id] - 1 - asked
            if extra > 2 * evidence.faults:
                yield f"{record.execution_id}/{task.task_id} ran {extra} times too often for {evidence.faults} faults"


def effects_once(evidence: Evidence) -> Iterator[str]:
    """Every effect of a recorded success is there, and none that nobody ran."""
    ran = {f"{e.execution_id}_{e.task_id}" for e in evidence.entries}
    for record in evidence.records:
        for task in record.tasks.values():
            key = f"{record.execution_id}_{task.task_id}"
            if task.handler in ("testing.effect", "testing.note") and task.status == TaskStatus.SUCCESS and key not in evidence.effects:
                yield f"{key} is recorded as a success, and its effect is not there"
    for key in sorted(evidence.effects - ran):
        if any(key.startswith(record.execution_id) for record in evidence.records):
            yield f"{key} had an effect, and never ran"


CHECKS = (ended, recorded_as_run, in_order, run_again_for_a_reason, effects_once)
_OPEN = frozenset({TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.RETRY})


def violations(evidence: Evidence) -> list[str]:
    """What all checks found."""
    return [f"{check.__name__}: {found}" for check in CHECKS for found in check(evidence)]


def records_of(
    executions: Iterable[tuple[str, str, str | None]],
    tasks: Iterable[tuple[str, str, str, str, int, list[str]]],
    attempts: Iterable[tuple[str, str, int, str]],
) -> list[Record]:
    """Rows of the store, as records."""
    before: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for execution_id, task_id, epoch, outcome in attempts:
        before[execution_id, task_id][epoch] = outcome
    found: dict[str, dict[str, TaskRecord]] = defaultdict(dict)
    for execution_id, task_id, handler, status, epoch, dependencies in tasks:
        found[execution_id][task_id] = TaskRecord(
            task_id=task_id, handler=handler, status=TaskStatus(status), epoch=epoch, dependencies=tuple(dependencies),
            attempts=before[execution_id, task_id],
        )  # fmt: skip
    return [
        Record(execution_id=x, status=ExecutionStatus(status), error_message=error, tasks=found[x])
        for x, status, error in executions
    ]
