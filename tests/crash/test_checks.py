"""Each check, on evidence that is sound and on evidence that is doctored."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.states import ExecutionStatus, TaskStatus
from pipeline.testing.checks import CHECKS, Evidence, Record, TaskRecord, violations
from pipeline.testing.ledger import Entry

X = "exec-000000000001"


def entry(kind: str, task_id: str, at: float, *, epoch: int = 1, worker_id: int = 1) -> Entry:
    return Entry(kind=kind, execution_id=X, task_id=task_id, epoch=epoch, worker_id=worker_id, pid=1, at=at)


def task(task_id: str, *after: str, **more: Any) -> TaskRecord:
    plain: dict[str, Any] = {"handler": "testing.effect", "status": TaskStatus.SUCCESS, "epoch": 1}
    return TaskRecord(task_id=task_id, dependencies=after, **{**plain, **more})


def record(*tasks: TaskRecord, **more: Any) -> Record:
    plain: dict[str, Any] = {"status": ExecutionStatus.SUCCESS, "error_message": None}
    return Record(execution_id=X, tasks={t.task_id: t for t in tasks}, **{**plain, **more})


#: a ran, was lost under epoch 1 and ran again under 2; b followed; c was skipped
SOUND = Evidence(
    records=[
        record(
            task("a", epoch=2, attempts={1: "lost"}),
            task("b", "a"),
            task("c", "b", handler="testing.skip", status=TaskStatus.SKIPPED),
        )
    ],
    entries=[
        entry("start", "a", 1), entry("start", "a", 2, epoch=2, worker_id=2), entry("end", "a", 3, epoch=2, worker_id=2),
        entry("start", "b", 4), entry("end", "b", 5), entry("start", "c", 6),
    ],
    effects=frozenset({f"{X}_a", f"{X}_b"}), faults=1,
)  # fmt: skip


def with_task(evidence: Evidence, task_id: str, **changes: Any) -> Evidence:
    (found,) = evidence.records
    tasks = {**found.tasks, task_id: replace(found.tasks[task_id], **changes)}
    return replace(evidence, records=[replace(found, tasks=tasks)])


def with_status(evidence: Evidence, status: ExecutionStatus) -> Evidence:
    return replace(evidence, records=[replace(evidence.records[0], status=status)])


def with_entries(evidence: Evidence, *more: Entry) -> Evidence:
    return replace(evidence, entries=[*evidence.entries, *more])


def without_entry(evidence: Evidence, kind: str, task_id: str, epoch: int = 1) -> Evidence:
    kept = [e for e in evidence.entries if (e.kind, e.task_id, e.epoch) != (kind, task_id, epoch)]
    return replace(evidence, entries=kept)


def test_sound_evidence_has_no_violations() -> None:
    assert violations(SOUND) == []


DOCTORED: list[tuple[str, Callable[[], Evidence]]] = [
    ("ended: .* has not ended: b running", lambda: with_status(
        with_task(SOUND, "b", status=TaskStatus.RUNNING), ExecutionStatus.RUNNING)),
    ("ended: .* is failed", lambda: with_status(SOUND, ExecutionStatus.FAILED)),
    ("ended: .* with open tasks b", lambda: with_task(SOUND, "b", status=TaskStatus.PENDING)),
    ("recorded_as_run: .*/b is recorded as a success of epoch 1", lambda: without_entry(SOUND, "end", "b")),
    ("recorded_as_run: .*/b is recorded as a success of epoch 3", lambda: with_task(SOUND, "b", epoch=3)),
    ("recorded_as_run: .*/b ran 2 times under epoch 1", lambda: with_entries(SOUND, entry("start", "b", 4.5, worker_id=9))),
    ("recorded_as_run: .*/b ran under epoch 7, which is not on", lambda: with_entries(SOUND, entry("start", "b", 8, epoch=7))),
    ("in_order: .*/b began before a had ended", lambda: with_entries(
        without_entry(SOUND, "start", "b"), entry("start", "b", 2.5))),
    ("in_order: .*/b began before a had ended", lambda: without_entry(SOUND, "end", "a", epoch=2)),
    ("run_again_for_a_reason: .*/a ran 1 times too often for 0 faults", lambda: replace(SOUND, faults=0)),
    ("effects_once: .*_b is recorded as a success, and its effect", lambda: replace(SOUND, effects=frozenset({f"{X}_a"}))),
    ("effects_once: .*_z had an effect, and never ran", lambda: replace(SOUND, effects=SOUND.effects | {f"{X}_z"})),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "doctored"), DOCTORED, ids=[expected for expected, _ in DOCTORED])
def test_doctored_evidence_is_a_violation(
    expected: str, doctored: Callable[[], Evidence]
) -> None:
    found = violations(doctored())
    assert any(re.match(expected, text) for text in found), found


def test_every_check_is_shown_to_fail() -> None:
    assert {check.__name__ for check in CHECKS} == {expected.partition(":")[0] for expected, _ in DOCTORED}


def test_failed_execution_that_may_fail_is_no_violation_and_one_that_hangs_is() -> None:
    may_fail = replace(SOUND, may_fail=True)
    assert violations(with_status(may_fail, ExecutionStatus.FAILED)) == []
    assert violations(with_status(may_fail, ExecutionStatus.RUNNING))


def test_claim_that_a_killed_database_forgot_may_be_given_again_but_success_must_have_run() -> None:
    forgotten = replace(SOUND, claims_forgotten=True, faults=2)
    assert violations(with_entries(forgotten, entry("start", "b", 4.5, worker_id=9))) == []
    assert violations(without_entry(forgotten, "end", "b"))


def test_retry_is_a_reason_to_run_again() -> None:
    asked = with_task(replace(SOUND, faults=0), "a", attempts={1: "retry"})
    assert violations(asked) == []
