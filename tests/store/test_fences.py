"""Who may change a task, how often an answer is given, and when a task is due."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import psycopg
import pytest

from pipeline.result_store.rows import Fence
from tests.store.conftest import Driver, released

KNOT = {"a": "", "b": "", "c": "", "ab": "a b", "bc": "b c", "end": "ab bc"}


@pytest.fixture
def ready(drive: Driver) -> str:
    """An execution whose task `a` waits for a worker."""
    return drive.start({"a": "", "b": "a"})


# Forgeries


@pytest.mark.parametrize("epoch", [-1, 1, 2, 2**31 - 2])
def test_claim_at_a_wrong_epoch_is_refused(drive: Driver, ready: str, epoch: int) -> None:
    before = drive.picture(ready)
    assert (
        drive.store.claim(execution_id=ready, task_id="a", epoch=epoch, worker_id=drive.worker, handler="debug.noop")
        is None
    )
    assert drive.picture(ready) == before


@pytest.mark.parametrize("where", [("exec-none", "a"), (None, "none"), ("", "")])
def test_claim_of_what_does_not_exist_is_refused(drive: Driver, ready: str, where: tuple[str | None, str]) -> None:
    execution, task = where
    assert (
        drive.store.claim(
            execution_id=execution or ready, task_id=task, epoch=0, worker_id=drive.worker, handler="debug.noop"
        )
        is None
    )


def test_claim_by_an_unknown_worker_is_refused(drive: Driver, ready: str) -> None:
    assert drive.claim(ready, "a", worker=2**40) is None


def test_claim_by_a_worker_whose_lease_ran_out_is_refused_until_it_is_renewed(drive: Driver, ready: str) -> None:
    late = drive.new_worker(lease=0)
    assert drive.claim(ready, "a", worker=late) is None
    assert drive.store.renew_worker(late, 3600)
    assert drive.claim(ready, "a", worker=late) is not None


def test_claim_by_a_worker_that_gave_its_lease_back_is_refused(drive: Driver, ready: str) -> None:
    gone = drive.new_worker()
    drive.store.end_worker(gone)
    assert drive.claim(ready, "a", worker=gone) is None


def test_claim_of_a_running_task_by_another_worker_is_refused(drive: Driver, ready: str) -> None:
    fence = drive.must_claim(ready, "a")
    rival = drive.new_worker()
    for epoch in (fence.epoch - 1, fence.epoch):
        assert (
            drive.store.claim(execution_id=ready, task_id="a", epoch=epoch, worker_id=rival, handler="debug.noop")
            is None
        )


def test_claim_hard_limit_and_timeout_make_the_deadline(drive: Driver) -> None:
    drive.set_clock(0)
    execution = drive.start({"a": ""})
    drive.must_claim(execution, "a")
    drive.set_clock(300 + drive.store.hard_limit.total_seconds() * 3 - 1)
    assert execution not in {a.execution_id for a in drive.store.overdue_attempts(1000)}
    drive.set_clock(300 + drive.store.hard_limit.total_seconds() * 3)
    assert execution in {a.execution_id for a in drive.store.overdue_attempts(1000)}


WRONG: dict[str, Callable[[Fence, Driver], Fence]] = {
    "older epoch": lambda fence, drive: replace(fence, epoch=fence.epoch - 1),
    "newer epoch": lambda fence, drive: replace(fence, epoch=fence.epoch + 1),
    "another worker": lambda fence, drive: replace(fence, worker_id=drive.new_worker()),
    "unknown worker": lambda fence, drive: replace(fence, worker_id=2**40),
    "unknown task": lambda fence, drive: replace(fence, task_id="none"),
    "another task": lambda fence, drive: replace(fence, task_id="b"),
    "unknown execution": lambda fence, drive: replace(fence, execution_id="exec-none"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "outcome", ["complete", "success", "failed", "skipped", "cancelled", "retry", "lost", "released"]
)
def test_end_with_a_wrong_fence_is_stale_and_changes_nothing(
    drive: Driver, ready: str, outcome: str, wrong: str
) -> None:
    fence = WRONG[wrong](drive.must_claim(ready, "a"), drive)
    before = drive.picture(ready)
    ended = drive.store.complete(fence, 1) if outcome == "complete" else drive.store.end(fence, outcome)
    assert (ended.outcome, ended.ready) == ("stale", ())
    drive.store.set_progress(fence, 99, "forged")
    assert drive.picture(ready) == before


def test_complete_by_a_worker_whose_lease_ran_out_counts_while_nobody_took_the_task(drive: Driver, ready: str) -> None:
    drive.set_clock(0)
    worker = drive.new_worker(lease=10)
    fence = drive.claim(ready, "a", worker=worker)
    assert fence is not None
    drive.set_clock(1000)
    assert drive.store.complete(fence, 1).outcome == "done"


def test_complete_by_a_worker_that_was_declared_lost_is_stale(drive: Driver, ready: str) -> None:
    zombie = drive.must_claim(ready, "a")
    drive.store.end(zombie, "lost", error_message="no heartbeat")
    assert drive.store.complete(zombie, 1).outcome == "stale"
    second = drive.must_claim(ready, "a")
    assert drive.store.complete(zombie, 1).outcome == "stale"
    assert drive.store.complete(second, 2).outcome == "done"
    assert drive.store.complete(zombie, 1).outcome == "stale"
    assert drive.store.results(ready, ["a"]) == {"a": 2}


def test_complete_of_a_task_that_was_marked_while_it_ran_is_stale(drive: Driver, ready: str) -> None:
    fence = drive.must_claim(ready, "a")
    assert drive.mark(ready, "a", "success")
    before = drive.picture(ready)
    assert drive.store.complete(fence, 1).outcome == "stale"
    assert drive.picture(ready) == before
    assert [attempt.outcome for attempt in drive.store.get_attempts(ready, "a")] == ["released"]


def test_end_released_costs_no_budget(drive: Driver, ready: str) -> None:
    for _ in range(5):
        drive.end(ready, "a", "released")
    task = drive.store.get_tasks(ready)[0]
    assert (task.status, task.attempt, task.losses, task.retries) == ("pending", 5, 0, 0)


@pytest.mark.parametrize("outcome", ["lost", "released"])
def test_task_that_comes_back_from_its_worker_waits_anew_for_the_queue_timeout(lone: Driver, outcome: str) -> None:
    lone.set_clock(0)
    execution = lone.start({"a": ""}, queue_timeout=30.0)
    fence = lone.must_claim(execution, "a")
    lone.set_clock(100)
    lone.store.end(fence, outcome, error_message="why")
    lone.set_clock(129)
    assert lone.store.expire_executions(10) == 0
    lone.set_clock(131)
    assert lone.store.expire_executions(10) == 1


def test_running_attempts_are_found_by_their_workers_name_and_process_only(drive: Driver, ready: str) -> None:
    fence = drive.must_claim(ready, "a")
    found = [a for a in drive.store.running_in("driver", 1) if a.execution_id == ready]
    assert [(a.task_id, a.epoch, a.worker_id) for a in found] == [("a", fence.epoch, fence.worker_id)]
    assert drive.store.running_in("driver", 2) == drive.store.running_in("another", 1) == []


def test_end_with_an_outcome_that_is_none_is_refused_by_the_database(drive: Driver, ready: str) -> None:
    fence = drive.must_claim(ready, "a")
    for outcome in ("pending", "running"):
        with pytest.raises(psycopg.errors.CheckViolation):
            drive.store.end(fence, outcome)
    assert drive.tasks(ready)["a"] == "running"


# Pause and due times


def test_paused_tasks_are_parked_when_due_and_back_at_once_on_resume(drive: Driver) -> None:
    drive.set_clock(0)
    execution = drive.start({"a": "", "b": ""})
    drive.end(execution, "b", "retry")
    drive.store.pause_execution(execution, None)
    for moment in (60, 7200):
        drive.set_clock(moment)
        assert execution not in {t.execution_id for t in drive.store.take_due(1000, first_only=False)}
    assert drive.store.get_tasks(execution)[1].retry_at is None
    drive.store.resume_execution(execution, None)
    assert {t.task_id for t in drive.store.take_due(1000, first_only=True) if t.execution_id == execution} == {"a", "b"}


def test_resume_leaves_a_retry_that_is_not_due_to_its_delay(drive: Driver) -> None:
    drive.set_clock(0)
    execution = drive.start({"a": ""})
    fence = drive.must_claim(execution, "a")
    drive.store.end(fence, "retry", delay=500)
    drive.store.pause_execution(execution, None)
    drive.set_clock(100)
    drive.store.resume_execution(execution, None)
    assert drive.store.take_due(1000, first_only=False) == ()
    drive.set_clock(500)
    assert [t.execution_id for t in drive.store.take_due(1000, first_only=False)] == [execution]


def test_paused_execution_lets_what_runs_finish_and_start_nothing(drive: Driver, ready: str) -> None:
    fence = drive.must_claim(ready, "a")
    drive.store.pause_execution(ready, None)
    assert [t.task_id for t in drive.store.complete(fence, 1).ready] == ["b"]
    assert drive.claim(ready, "b") is None
    drive.store.resume_execution(ready, None)
    assert drive.claim(ready, "b") is not None


def test_take_due_looks_later_each_time_and_first_only_leaves_what_was_published(lone: Driver) -> None:
    lone.set_clock(0)
    lone.start({"a": ""})
    grace, moment = lone.store.grace.total_seconds(), 0.0
    for doubling in range(1, 4):
        moment += grace * 2 ** (doubling - 1)
        lone.set_clock(moment - 1)
        assert lone.store.take_due(10, first_only=False) == ()
        lone.set_clock(moment)
        assert lone.store.take_due(10, first_only=True) == ()
        assert lone.store.recovery_work().due
        assert len(lone.store.take_due(10, first_only=False)) == 1
        assert not lone.store.recovery_work().due
    assert lone.store.count_published() == 1


def test_take_due_takes_no_more_than_its_limit(lone: Driver) -> None:
    lone.start({f"a{n}": "" for n in range(10)})
    lone.sql("UPDATE pipeline.task_executions SET due_at = pipeline.clock(), led_by = NULL")
    assert [len(lone.store.take_due(4, first_only=False)) for _ in range(4)] == [4, 4, 2, 0]


def test_queue_timeout_ends_an_execution_whose_task_waits_too_long_unless_it_is_paused(drive: Driver) -> None:
    drive.set_clock(0)
    execution = drive.start({"a": ""}, queue_timeout=50)
    drive.store.pause_execution(execution, None)
    drive.set_clock(51)
    drive.store.expire_executions(1000)
    assert drive.status(execution) == "pending"
    drive.store.resume_execution(execution, None)
    drive.store.expire_executions(1000)
    assert drive.status(execution) == "failed"
    assert "queue_timeout" in (drive.message(execution) or "")


# Repeats: the answer was lost, the caller asks again


def test_repeat_of_complete_gives_the_same_ready_tasks_and_counts_once(drive: Driver) -> None:
    execution = drive.start(KNOT)
    for task in ("a", "c"):
        drive.complete(execution, task)
    fence = drive.must_claim(execution, "b")
    first = drive.store.complete(fence, 1)
    before = drive.counters(execution)
    assert drive.store.complete(fence, 1) == first
    assert released(first) == ["ab", "bc"]
    assert drive.counters(execution) == before


def test_repeat_of_complete_does_not_name_what_was_claimed_since(drive: Driver) -> None:
    execution = drive.start({"a": "", "b": "a", "c": "a"})
    fence = drive.must_claim(execution, "a")
    drive.store.complete(fence, 1)
    drive.claim(execution, "b")
    assert released(drive.store.complete(fence, 1)) == ["c"]


@pytest.mark.parametrize("outcome", ["failed", "skipped", "cancelled", "retry"])
def test_repeat_of_an_end_is_done_and_another_end_is_stale(drive: Driver, outcome: str) -> None:
    execution = drive.start({"a": "", "o": ""})
    fence = drive.must_claim(execution, "a")
    drive.store.end(fence, outcome, error_message="once")
    assert drive.store.end(fence, outcome, error_message="twice").outcome == "done"
    assert drive.store.complete(fence, 1).outcome == "stale"
    assert drive.message(execution, "a") == "once"
    assert drive.tasks(execution)["a"] == outcome


def test_running_attempt_is_told_to_stop_only_once_the_verdict_names_the_reason(drive: Driver) -> None:
    execution = drive.start({"a": ""}, timeout=10)
    drive.set_clock(0)
    drive.sql("UPDATE pipeline.workflow_executions SET deadline_at = pipeline.clock() + interval '10 s'")
    worker = drive.new_worker()
    assert drive.claim(execution, "a", worker=worker)

    drive.set_clock(11)
    (late,) = drive.store.running_on(worker, age=1)
    assert drive.sql("SELECT pipeline.expire_execution(%s)", execution) == [(True,)]
    (expired,) = drive.store.running_on(worker, age=1)

    assert (late.stop, expired.stop) == (False, True)
