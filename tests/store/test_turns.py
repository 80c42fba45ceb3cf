"""Tasks that share a message, and successes that claim what comes next: what the store gives, and what it refuses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from pipeline.dispatch import Message, _messages
from pipeline.errors import IdempotencyConflict
from pipeline.result_store.rows import NOTHING, Claim, Fence, Follow, ReadyTask
from pipeline.states import ExecutionStatus
from pipeline.turn import Step, Turn
from tests.store.conftest import Driver

ROOM = Follow(room=300.0)
NOOP = "debug.noop"


@pytest.fixture
def able(lone: Driver) -> Iterator[Driver]:
    """The driver alone, its worker the only one, with a lease and the handler."""

    def make(handlers: str) -> None:
        lone.sql(
            "UPDATE pipeline.workers SET handlers = %s, slow = '{}', quick = '{}', expires_at = now() + interval '1 h' WHERE worker_id = %s",
            handlers, lone.worker,
        )  # fmt: skip

    make(f"{{{NOOP}}}")
    yield lone
    lone.set_clock(None)
    make("{}")


def leaders(ready: tuple[ReadyTask, ...]) -> dict[str, str | None]:
    return {task.task_id: task.led_by for task in ready}


def named(execution: str, task: str, epoch: int = 0, handler: str = NOOP) -> Follow:
    return replace(ROOM, execution_id=execution, task_id=task, epoch=epoch, handler=handler, with_state=True)


def holds(claim: Claim | None, execution: str, worker: int) -> Fence:
    """What a worker holds that goes on."""
    assert claim is not None
    return Fence(execution_id=execution, task_id=claim.task_id, epoch=claim.epoch, worker_id=worker)


def complete(drive: Driver, execution: str, task: str, follow: Follow) -> tuple[str | None, list[str]]:
    """Claim and complete; what is claimed next and what became ready."""
    ended = drive.store.complete(drive.must_claim(execution, task), {"by": task}, follow)
    assert ended.outcome == "done"
    return ended.next and ended.next.task_id, [t.task_id for t in ended.ready]


# sharing


def test_tasks_that_become_ready_together_share_as_many_messages_as_processes_could_run_them(able: Driver) -> None:
    for _ in range(2):
        able.new_worker()
    execution = able.start({f"t{n:02}": "" for n in range(18)})
    shared = leaders(able.ready_tasks(execution))
    assert shared == {f"t{n:02}": f"t{n - n % 6:02}" if n % 6 else None for n in range(18)}


def test_four_tasks_of_a_quick_handler_share_one_message_however_many_processes_there_are(able: Driver) -> None:
    for _ in range(9):
        able.new_worker()
    graph = {"a": "", "b": "", "c": "", "d": ""}
    assert set(leaders(able.ready_tasks(able.start(graph))).values()) == {None}, "of nothing is known how long it takes"
    able.store.renew_worker(able.worker, 3600, [], [NOOP])
    assert leaders(able.ready_tasks(able.start(graph))) == {"a": None, "b": "a", "c": "a", "d": "a"}


def test_tasks_with_different_timeouts_share_no_message(able: Driver) -> None:
    definition = able.define({f"t{n}": "" for n in range(6)})
    tasks = [task.model_copy(update={"timeout": 60.0 + n % 2}) for n, task in enumerate(definition.tasks)]
    created = able.dispatcher.create(definition.model_copy(update={"tasks": tuple(tasks)}), {})
    assert leaders(created.ready) == {"t0": None, "t1": None, "t2": "t0", "t3": "t1", "t4": "t0", "t5": "t1"}


@pytest.mark.parametrize("length", [3, 4, 12, 30, 50, 64])
def test_store_and_dispatch_agree_on_how_many_tasks_a_message_holds(able: Driver, length: int) -> None:
    execution = able.start({f"{n:0{length}}": "" for n in range(99)})
    messages = list(_messages(able.ready_tasks(execution)))
    assert len(messages) == able.store.count_published()
    assert (len(messages) < 99) == (length < 64)


def test_slow_handler_of_a_worker_that_lives_shares_no_message(able: Driver) -> None:
    able.store.renew_worker(able.worker, 3600, [NOOP])
    execution = able.start({f"t{n}": "" for n in range(9)})
    assert set(leaders(able.ready_tasks(execution)).values()) == {None}
    able.store.end_worker(able.worker)
    execution = able.start({f"t{n}": "" for n in range(9)})
    assert set(leaders(able.ready_tasks(execution)).values()) == {None, "t0"}


# going on


def test_complete_claims_the_only_task_that_it_releases_and_publishes_nothing(able: Driver) -> None:
    execution = able.start({"a": "", "b": "a", "c": "b"})
    ended = able.store.complete(able.must_claim(execution, "a"), {"n": 1}, ROOM)
    fence = holds(ended.next, execution, able.worker)
    assert (fence.task_id, fence.epoch, ended.ready) == ("b", 1, ())
    assert ended.next is not None and ended.next.results == {"a": {"n": 1}}
    task = able.store.get_tasks(execution)[1]
    assert (task.status, task.attempt, task.ready_at) == ("running", 1, task.started_at)
    assert able.store.complete(fence, None, ROOM).next == replace(
        ended.next, task_id="c", results={"b": None}, dependencies=["b"]
    )


def test_complete_without_room_claims_nothing(able: Driver) -> None:
    execution = able.start({"a": "", "b": "a"})
    assert complete(able, execution, "a", NOTHING) == (None, ["b"])


def test_complete_claims_no_task_with_a_longer_timeout_than_there_is_room(able: Driver) -> None:
    execution = able.start({"a": "", "b": "a"})
    assert complete(able, execution, "a", Follow(room=299.0)) == (None, ["b"])


def test_complete_claims_nothing_in_an_execution_that_is_paused(able: Driver) -> None:
    execution = able.start({"a": "", "b": "a", "c": ""})
    fence = able.must_claim(execution, "a")
    able.store.pause_execution(execution, None)
    ended = able.store.complete(fence, None, named(execution, "c"))
    assert (ended.next, [t.task_id for t in ended.ready]) == (None, ["b"])
    able.store.resume_execution(execution, None)


def test_complete_claims_nothing_for_a_worker_whose_lease_ran_out_and_records_its_success(able: Driver) -> None:
    execution = able.start({"a": "", "b": "a"})
    fence = able.must_claim(execution, "a")
    able.store.end_worker(able.worker)
    ended = able.store.complete(fence, None, ROOM)
    assert (ended.outcome, ended.next, [t.task_id for t in ended.ready]) == ("done", None, ["b"])


def test_complete_claims_no_task_whose_handler_the_worker_does_not_know(lone: Driver) -> None:
    execution = lone.start({"a": "", "b": "a"})
    assert complete(lone, execution, "a", ROOM) == (None, ["b"])


def test_complete_of_a_fan_out_claims_the_first_and_returns_the_others_with_their_leaders(able: Driver) -> None:
    able.new_worker()
    execution = able.start({"a": "", **{f"b{n}": "a" for n in range(10)}})
    ended = able.store.complete(able.must_claim(execution, "a"), None, ROOM)
    assert ended.next is not None and ended.next.task_id == "b0"
    assert leaders(ended.ready) == {f"b{n}": None if n == 5 else "b0" if n < 5 else "b5" for n in range(1, 10)}


def test_complete_claims_the_named_task_where_nothing_was_released(able: Driver) -> None:
    execution = able.start({"a": "", "b": "", "c": "a b"})
    assert complete(able, execution, "a", named(execution, "b")) == ("b", [])


@pytest.mark.parametrize(("task", "epoch", "handler"), [("b", 1, NOOP), ("b", 0, "debug.echo"), ("c", 0, NOOP), ("nowhere", 0, NOOP)])
def test_complete_claims_no_named_task_whose_message_is_stale_or_forged(
    able: Driver, task: str, epoch: int, handler: str
) -> None:
    execution, other = (able.start({"a": "", "b": "", "c": "a b"}) for _ in range(2))
    assert complete(able, execution, "a", named(execution, task, epoch, handler)) == (None, [])
    assert complete(able, execution, "b", named(other, task, epoch, handler)) == ("c", [])
    assert able.tasks(other) == dict.fromkeys("abc", "pending")
    execution = able.start({"a": "", "b": "", "c": "a b"})
    assert complete(able, execution, "a", named(other, task, epoch, handler)) == (None, [])
    assert able.tasks(other) == dict.fromkeys("abc", "pending")
    assert able.tasks(execution) == {"a": "success", "b": "pending", "c": "pending"}


def test_complete_along_the_careful_path_claims_nothing(able: Driver) -> None:
    execution = able.start({"s": "", "a": "", "b": "a"})
    able.end(execution, "s", "skipped")
    assert complete(able, execution, "a", ROOM) == (None, ["b"])


def test_repeat_of_a_complete_whose_answer_was_lost_gives_the_same_next_task(able: Driver) -> None:
    execution = able.start({"a": "", "b": "a", "c": "", "d": ""})
    fence = able.must_claim(execution, "a")
    first = able.store.complete(fence, None, named(execution, "c")).next
    again = able.store.complete(fence, None, named(execution, "c"))
    assert first is not None and again.outcome == "done"
    assert again.next == replace(first, results=None)
    fence = able.must_claim(execution, "c")
    first = able.store.complete(fence, None, named(execution, "d")).next
    assert first is not None and able.store.complete(fence, None, named(execution, "d")).next == first


def test_stale_complete_claims_nothing(able: Driver) -> None:
    execution = able.start({"a": "", "b": ""})
    fence = able.must_claim(execution, "a")
    ended = able.store.complete(replace(fence, epoch=fence.epoch + 1), None, named(execution, "b"))
    assert (ended.outcome, ended.next) == ("stale", None)
    assert able.tasks(execution) == {"a": "running", "b": "pending"}


def test_claim_leaves_out_results_that_are_large_and_those_of_many(able: Driver) -> None:
    execution = able.start({"a": "", "b": "a", **{f"m{n}": "" for n in range(17)}, "c": " ".join(f"m{n}" for n in range(17))})
    able.complete(execution, "a", [str(n) for n in range(5000)])
    for n in range(17):
        able.complete(execution, f"m{n}", n)
    for task in ("b", "c"):
        claim = able.store.claim(execution_id=execution, task_id=task, epoch=0, worker_id=able.worker, handler=NOOP)
        assert claim is not None and claim.results is None
    assert able.store.results(execution, ["m3"]) == {"m3": 3}


def test_claim_brings_what_never_changes_only_where_that_is_asked_for(able: Driver) -> None:
    execution = able.start({"a": ""}, input_data={"n": 1})
    for wanted in (False, True):  # the second is a repeat of the first
        claim = able.store.claim(
            execution_id=execution, task_id="a", epoch=0, worker_id=able.worker, handler=NOOP, with_state=wanted
        )
        assert claim is not None and claim.state == (able.store.state(execution) if wanted else None)


# giving away


def test_scatter_gives_messages_of_their_own_to_what_waits_and_leaves_out_what_moved_on(able: Driver) -> None:
    execution = able.start({f"t{n}": "" for n in range(4)})
    able.must_claim(execution, "t1")
    assert leaders(able.store.scatter(execution, {"t1": 0, "t2": 0, "t3": 1})) == {"t2": None}
    assert leaders(able.ready_tasks(execution)) == {"t0": None, "t2": None, "t3": "t0"}


def test_scatter_leaves_what_is_parked_in_a_pause(able: Driver) -> None:
    able.set_clock(0)
    execution = able.start({"a": "", "b": ""})
    able.store.pause_execution(execution, None)
    able.set_clock(60)
    assert able.store.take_due(10, first_only=False) == ()
    able.sql("UPDATE pipeline.task_executions SET due_at = 'infinity' WHERE execution_id = %s", execution)
    assert able.store.scatter(execution, {"a": 0, "b": 0}) == ()
    able.store.resume_execution(execution, None)


def test_take_due_leaves_what_shares_a_message_until_its_leader_was_claimed_a_while_ago(able: Driver) -> None:
    able.set_clock(0)
    execution = able.start({"a": "", "b": "", "c": ""})
    able.set_clock(100)
    assert able.store.take_due(10, first_only=True) == ()
    assert leaders(able.store.take_due(10, first_only=False)) == {"a": None}
    able.must_claim(execution, "a")
    able.set_clock(101)
    assert able.store.take_due(10, first_only=True) == ()
    able.set_clock(103)
    assert leaders(able.store.take_due(10, first_only=True)) == {"b": None, "c": None}
    assert able.store.take_due(10, first_only=True) == ()


def test_take_due_takes_what_shares_a_message_whose_leader_waits_for_a_retry(able: Driver) -> None:
    able.set_clock(0)
    execution = able.start({"a": "", "b": ""})
    able.store.end(able.must_claim(execution, "a"), "retry", delay=1000.0)
    able.set_clock(100)
    assert leaders(able.store.take_due(10, first_only=True)) == {"b": None}


def test_count_published_counts_messages_and_not_the_tasks_that_share_them(able: Driver) -> None:
    execution = able.start({f"t{n}": "" for n in range(8)})
    able.start({"alone": ""})
    assert able.store.count_published() == 2
    able.must_claim(execution, "t0")
    assert able.store.count_published() == 1


# other executions


def pair(drive: Driver) -> tuple[str, str]:
    """Two executions of one workflow."""
    created = drive.dispatcher.create_many(drive.define({"a": "", "b": "a"}), [{"n": 1}, {"n": 2}], idempotency_keys=[None, None])
    return created[0].execution_id, created[1].execution_id


def test_complete_goes_on_in_another_execution_brings_its_state_and_keeps_what_it_released(able: Driver) -> None:
    one, two = pair(able)
    ended = able.store.complete(able.must_claim(one, "a"), None, named(two, "a"))
    assert ended.next is not None and (ended.next.execution_id, ended.next.task_id, ended.next.epoch) == (two, "a", 1)
    assert ended.next.state is not None and ended.next.state.input_data == {"n": 2}
    assert ([task.task_id for task in ended.ready], ended.kept, ended.durable) == (["b"], True, False)
    assert (able.tasks(one), able.tasks(two)) == ({"a": "success", "b": "pending"}, {"a": "running", "b": "pending"})
    ended = able.store.complete(holds(ended.next, two, able.worker), None, replace(named(one, "b"), durable=True))
    assert ended.next is not None and (ended.next.execution_id, ended.next.task_id) == (one, "b")
    assert (ended.kept, ended.durable, ended.next.state is not None) == (True, True, True)


# executions that end together


def leave_open(drive: Driver, count: int = 1) -> tuple[list[str], Fence]:
    """Executions of one task, of which a worker has run all but the last and left them open; and what it runs now."""
    first, *others = [task.execution_id for task in starts(drive, count + 1, {"a": ""})]
    left, fence = list[str](), drive.must_claim(first, "a")
    for other in others:
        ended = drive.store.complete(fence, None, replace(named(other, "a"), closing=tuple(left)))
        left.append(fence.execution_id)
        assert (ended.closing, ended.durable) == (left, False)
        fence = holds(ended.next, other, drive.worker)
    return left, fence


def statuses(drive: Driver, executions: list[str]) -> set[str]:
    return {drive.status(execution) for execution in executions}


def test_complete_that_ends_an_execution_and_goes_on_in_another_leaves_it_open_and_waits_for_no_disk(able: Driver) -> None:
    (one,), fence = leave_open(able)
    assert (able.status(one), able.tasks(one)) == ("running", {"a": "success"})
    assert (able.status(fence.execution_id), able.store.audit()) == ("running", [])


def test_complete_that_goes_on_with_nothing_ends_its_execution_and_those_that_were_left_open(able: Driver) -> None:
    left, fence = leave_open(able, 3)
    ((before,),) = able.sql("SELECT pg_current_wal_insert_lsn()::text")
    ended = able.store.complete(fence, None, replace(ROOM, closing=tuple(left)))
    assert able.sql("SELECT pg_current_wal_flush_lsn() > %s::pg_lsn", before) == [(True,)]
    assert (ended.closing, ended.durable, ended.next) == ([], True, None)
    assert statuses(able, [*left, fence.execution_id]) == {"success"}
    assert able.sql("SELECT * FROM pipeline.closings WHERE execution_id = ANY (%s)", left) == []


def test_complete_that_has_to_be_durable_ends_what_was_left_open_and_its_own_execution_and_goes_on(able: Driver) -> None:
    other, *_ = starts(able, 1, {"a": ""})
    left, fence = leave_open(able, 2)
    ended = able.store.complete(fence, None, replace(named(other.execution_id, "a"), closing=tuple(left), durable=True))
    assert (ended.closing, ended.durable, ended.next is not None) == ([], True, True)
    assert statuses(able, [*left, fence.execution_id]) == {"success"}


def test_stale_complete_ends_nothing_that_was_left_open(able: Driver) -> None:
    left, fence = leave_open(able)
    ended = able.store.complete(replace(fence, epoch=7), None, replace(ROOM, closing=tuple(left)))
    assert (ended.outcome, ended.closing, statuses(able, left)) == ("stale", None, {"running"})


def test_complete_along_the_careful_path_ends_nothing_that_was_left_open(able: Driver) -> None:
    left, _ = leave_open(able)
    execution = able.start({"a": "", "b": ""})
    fence = able.must_claim(execution, "a")
    able.store.end(able.must_claim(execution, "b"), "skipped")
    ended = able.store.complete(fence, None, replace(ROOM, closing=tuple(left)))
    assert (ended.outcome, ended.closing, able.status(execution), statuses(able, left)) == ("done", None, "success", {"running"})


def test_repeat_of_a_complete_that_left_its_execution_open_ends_it(able: Driver) -> None:
    one, two = (task.execution_id for task in starts(able, 2, {"a": ""}))
    fence, follow = able.must_claim(one, "a"), named(two, "a")
    first, again = (able.store.complete(fence, None, follow) for _ in range(2))
    assert (first.closing, again.closing, again.next) == ([one], [], first.next)
    assert able.status(one) == "success"


def test_close_ends_only_what_was_left_open(able: Driver) -> None:
    left, fence = leave_open(able, 2)
    able.store.close_executions([*left, fence.execution_id, "exec-none"])
    assert (statuses(able, left), able.status(fence.execution_id)) == ({"success"}, "running")


def test_recovery_ends_what_was_left_open_once_its_time_has_passed_and_not_before(able: Driver) -> None:
    able.set_clock(0)
    left, _ = leave_open(able, 2)
    grace = able.store.grace.total_seconds()
    able.set_clock(grace / 4 - 1)
    assert (able.store.recovery_work().closing, able.store.close_overdue(10)) == (False, 0)
    able.set_clock(grace / 4)
    assert (able.store.recovery_work().closing, able.store.close_overdue(10)) == (True, 2)
    assert (able.store.recovery_work().closing, statuses(able, left)) == (False, {"success"})


def test_pause_of_an_execution_that_was_left_open_comes_too_late(able: Driver) -> None:
    (one,), _ = leave_open(able)
    assert able.store.pause_execution(one, None) is ExecutionStatus.SUCCESS
    assert (able.store.get_execution(one).paused, able.store.get_events(one)) == (False, [])


def test_rerun_of_an_execution_that_was_left_open_starts_it_again_and_no_earlier_end_ends_that_run(able: Driver) -> None:
    (one,), _ = leave_open(able)
    assert able.store.reopen_execution(one, None, task_id="a") is ExecutionStatus.SUCCESS
    able.store.close_executions([one])
    assert (able.status(one), able.tasks(one)) == ("retry", {"a": "pending"})


def test_run_after_a_rerun_is_left_open_too_while_somebody_deletes_what_the_first_left(able: Driver) -> None:
    (one,), fence = leave_open(able)
    able.store.complete(fence, None, ROOM)
    able.store.reopen_execution(one, None, task_id="a")
    (other,) = starts(able, 1, {"a": ""})
    able.store.complete(able.must_claim(one, "a"), None, named(other.execution_id, "a"))
    assert (able.status(one), able.store.audit()) == ("running", [])
    able.store.close_executions([one])
    assert able.status(one) == "success"


@pytest.mark.parametrize("steer", ["pause_execution", "cancel_execution"])
def test_steering_does_not_end_a_rerun_whose_last_task_succeeded_before(able: Driver, steer: str) -> None:
    execution = able.start({"a": "", "b": ""}, enable_parallel=False)
    able.drain(execution)
    able.store.reopen_execution(execution, None, task_id="a")
    assert able.tasks(execution) == {"a": "pending", "b": "success"}
    assert getattr(able.store, steer)(execution, None) is ExecutionStatus.RETRY
    assert (able.status(execution), able.store.audit()) == ({"p": "retry", "c": "cancelled"}[steer[0]], [])


def test_close_does_not_end_a_rerun_whose_last_task_succeeded_before(able: Driver) -> None:
    execution = able.start({"a": "", "b": ""}, enable_parallel=False)
    (other,) = starts(able, 1, {"a": ""})
    able.complete(execution, "a")
    assert able.store.complete(able.must_claim(execution, "b"), None, named(other.execution_id, "a")).closing == [execution]
    able.store.reopen_execution(execution, None, task_id="a")
    able.store.close_executions([execution])
    assert (able.status(execution), able.store.audit()) == ("retry", [])
    assert able.drain(execution) == ["a"]
    assert able.status(execution) == "success"


@pytest.mark.parametrize("steer", ["cancel", "expire"])
def test_execution_that_was_left_open_and_whose_end_another_is_about_to_record_ends_with_success(able: Driver, steer: str) -> None:
    (one,), _ = leave_open(able)
    able.sql("UPDATE pipeline.workflow_executions SET deadline_at = '1999-01-01' WHERE execution_id = %s", one)
    with psycopg.connect(able.url) as ending:
        ending.execute("SELECT FROM pipeline.closings WHERE execution_id = %s FOR UPDATE", [one])
        if steer == "cancel":
            assert able.store.cancel_execution(one, "ana") is ExecutionStatus.SUCCESS
        else:
            assert able.store.expire_executions(10) == 0
        assert able.status(one) == "success"
    able.store.close_executions([one])
    assert (able.status(one), able.store.audit()) == ("success", [])


@pytest.mark.parametrize("who", ["changes it", "closes it"])
def test_close_does_not_wait_for_who_changes_or_closes_an_execution_and_leaves_it_to_recovery(able: Driver, who: str) -> None:
    (one, two), _ = leave_open(able, 2)
    with psycopg.connect(able.url) as other:
        if who == "changes it":
            other.execute("SELECT pg_advisory_xact_lock(pipeline.lock_key(%s))", [one])
        else:
            other.execute("SELECT FROM pipeline.closings WHERE execution_id = %s FOR UPDATE", [one])
        able.store.close_executions([one, two])
        assert (able.status(one), able.status(two)) == ("running", "success")
    able.set_clock(4_000_000_000)
    assert able.store.close_overdue(10) > 0
    assert able.status(one) == "success"


def test_end_of_an_execution_that_was_left_open_is_told_to_who_waits_for_it(able: Driver) -> None:
    (one,), _ = leave_open(able)
    with psycopg.connect(able.url, autocommit=True) as waiting:
        waiting.execute("LISTEN pipeline_finished")
        able.store.await_execution(one)
        able.store.close_executions([one])
        assert [told.payload for told in waiting.notifies(timeout=10, stop_after=1)] == [one]


@pytest.mark.parametrize("why", ["more than one message", "unknown handler", "more time than there is"])
def test_complete_keeps_nothing_that_has_to_be_published(able: Driver, why: str) -> None:
    two = able.start({"a": ""})
    one = able.start({"a": "", **{f"b{n}": "a" for n in range(4)}})
    follow = named(two, "a")
    if why == "more than one message":
        able.new_worker()
    elif why == "unknown handler":
        able.sql("UPDATE pipeline.workers SET handlers = '{}' WHERE worker_id = %s", able.worker)
    else:
        timeouts = "UPDATE pipeline.workflow_tasks SET timeout = 301 WHERE task_id LIKE 'b%' AND timeout < 301"
        able.sql(timeouts)
    ended = able.store.complete(able.must_claim(one, "a"), None, follow)
    assert ended.next is not None and ended.next.execution_id == two
    assert (len(ended.ready), ended.kept, ended.durable) == (4, False, True)


def test_turn_starts_nothing_before_what_it_builds_on_is_on_disk_and_waits_for_the_disk_once_for_many(able: Driver) -> None:
    graph = {"a": "", "b": "a", "c": "a", "d": "b c"}
    first, *others = starts(able, 6, graph)
    scattered = list[str]()
    turn = Turn(
        handler=NOOP, room=300.0, scatter=lambda execution, tasks: scattered.append(execution), close=scattered.extend,
        message=Message(
            execution_id=first.execution_id, task_id="a", epoch=0, others=tuple((r.execution_id, r.task_id, r.epoch) for r in others)
        ),
    )  # fmt: skip
    recorded, waits = dict[tuple[str, str], str](), 0
    step: Step | None = turn.step
    while step is not None:
        for needed in graph[step.task_id].split():
            at = recorded[step.execution_id, needed]
            assert able.sql("SELECT pg_current_wal_flush_lsn() >= %s::pg_lsn", at) == [(True,)], (step, needed)
        named_so = Message(execution_id=step.execution_id, task_id=step.task_id, epoch=step.epoch)
        claim = turn.claim_of(named_so)
        if claim is None:
            claim = able.store.claim(**vars_of(named_so), worker_id=able.worker, handler=NOOP)
        fence = holds(claim, step.execution_id, able.worker)
        ended = able.store.complete(fence, None, turn.follow())
        ((at,),) = able.sql("SELECT pg_current_wal_insert_lsn()::text")
        recorded[step.execution_id, step.task_id] = at
        waits += ended.durable
        assert turn.go_on(ended) == ()
        step = turn.next()
    assert scattered == []
    assert {able.status(execution) for execution, _ in recorded} == {"success"} and len(recorded) == 24
    assert waits <= 3, "before the first b, before the first d, and for the end of all"


def test_complete_goes_on_in_no_execution_that_takes_no_claims(able: Driver) -> None:
    for stop in (able.store.pause_execution, able.store.cancel_execution):
        one, two = pair(able)
        fence = holds(able.store.complete(able.must_claim(one, "a"), None, ROOM).next, one, able.worker)
        stop(two, None)
        ended = able.store.complete(fence, None, named(two, "a"))
        assert (ended.outcome, ended.next, ended.state, able.status(one)) == ("done", None, None, "success")
        assert able.tasks(two)["a"] in ("pending", "cancelled")


def test_complete_does_not_wait_for_another_execution_that_somebody_changes(able: Driver) -> None:
    one, two = pair(able)
    fence = holds(able.store.complete(able.must_claim(one, "a"), None, ROOM).next, one, able.worker)
    with psycopg.connect(able.url) as changing:
        changing.execute("SELECT pg_advisory_xact_lock(pipeline.lock_key(%s))", [two])
        ended = able.store.complete(fence, None, named(two, "a"))
    assert (ended.outcome, ended.next, able.status(one)) == ("done", None, "success")
    assert able.claim(two, "a") is not None


def vars_of(message: Message) -> dict[str, Any]:
    return {"execution_id": message.execution_id, "task_id": message.task_id, "epoch": message.epoch}


def test_settle_of_a_success_that_did_not_wait_for_the_disk_waits_for_it(able: Driver) -> None:
    for _ in range(20):  # Postgres writes by itself too, now and then
        one, two = pair(able)
        ended = able.store.complete(able.must_claim(one, "a"), None, named(two, "a"))
        ((at, behind),) = able.sql(
            "SELECT lsn::text, pg_current_wal_flush_lsn() < lsn FROM pg_current_wal_insert_lsn() lsn"
        )
        able.store.settle_task(one, "a")
        assert able.sql("SELECT pg_current_wal_flush_lsn() >= %s::pg_lsn", at) == [(True,)]
        if behind and not ended.durable:
            return
    pytest.fail("no end was seen before it was on disk")


def test_repeat_of_a_complete_that_went_on_elsewhere_gives_the_same_next_task(able: Driver) -> None:
    one, two = pair(able)
    fence = holds(able.store.complete(able.must_claim(one, "a"), None, ROOM).next, one, able.worker)
    first, again = (able.store.complete(fence, None, named(two, "a")) for _ in range(2))
    assert first.next is not None and (again.outcome, again.next) == ("done", first.next)


def test_repeat_of_a_complete_that_kept_what_it_released_gives_it_up_for_publishing_once_it_is_on_disk(able: Driver) -> None:
    one, two = pair(able)
    fence, follow = able.must_claim(one, "a"), named(two, "a")
    first = able.store.complete(fence, None, follow)
    ((at,),) = able.sql("SELECT pg_current_wal_insert_lsn()::text")
    again = able.store.complete(fence, None, follow)
    assert able.sql("SELECT pg_current_wal_flush_lsn() >= %s::pg_lsn", at) == [(True,)]
    assert (first.kept, first.durable, again.kept, again.durable) == (True, False, False, True)
    assert [task.task_id for task in again.ready] == ["b"] and again.next == first.next


def starts(drive: Driver, count: int, graph: dict[str, str] | None = None) -> list[ReadyTask]:
    """What becomes ready where so many executions are recorded at once."""
    definition = drive.define(graph or {"a": "", "b": "a"})
    created = drive.dispatcher.create_many(definition, [{}] * count, idempotency_keys=[None] * count)
    return [task for one in created for task in one.ready]


def test_executions_that_are_recorded_together_share_as_many_messages_as_processes_could_run_them(able: Driver) -> None:
    able.new_worker()
    messages = list(_messages(starts(able, 10)))
    assert [1 + len(others) for _, others in messages] == [5, 5]
    for first, others in messages:
        assert {(other.led_in, other.led_by) for other in others} == {(first.execution_id, "a")}


def test_executions_recorded_together_of_a_slow_handler_have_messages_of_their_own(able: Driver) -> None:
    able.sql("UPDATE pipeline.workers SET slow = %s WHERE worker_id = %s", [NOOP], able.worker)
    assert [others for _, others in _messages(starts(able, 10))] == [[]] * 10


def test_executions_recorded_together_that_begin_with_several_tasks_share_no_message_with_each_other(able: Driver) -> None:
    messages = list(_messages(starts(able, 3, {"a": "", "b": "", "c": "a b"})))
    assert [[task.execution_id for task in others] for first, others in messages] == [
        [first.execution_id] for first, _ in messages
    ]


@pytest.mark.parametrize("handler", [NOOP, "é" * 52, "я" * 57, "語" * 60])
def test_messages_for_executions_with_long_names_keep_their_size(able: Driver, handler: str) -> None:
    definition = able.define({"a": ""})
    task = definition.tasks[0].model_copy(update={"id": "a" * 64, "handler": handler})
    definition = definition.model_copy(update={"tasks": (task,)})
    created = able.dispatcher.create_many(definition, [{}] * 50, idempotency_keys=[None] * 50)
    messages = list(_messages([task for one in created for task in one.ready]))
    assert all(other.led_in == first.execution_id for first, others in messages for other in others), "as the store counts"
    assert sum(1 + len(others) for _, others in messages) == 50


def test_executions_recorded_in_a_callers_transaction_share_nothing_for_recovery_publishes_them(able: Driver) -> None:
    with psycopg.connect(able.url) as connection:
        able.dispatcher.create_many(
            able.define({"a": ""}), [{}] * 3, idempotency_keys=[None] * 3, store=able.store.within(connection)
        )
    assert [others for _, others in _messages(able.store.take_due(10, first_only=True))] == [[]] * 3


@pytest.mark.parametrize("gone", ["cancelled", "paused", "forgotten"])
def test_take_due_publishes_what_shares_the_message_of_an_execution_that_will_not_start(able: Driver, gone: str) -> None:
    able.set_clock(0)
    leader, led = starts(able, 2)
    assert led.led_in == leader.execution_id
    able.set_clock(60)
    assert [task.execution_id for task in able.store.take_due(10, first_only=True)] == [], "its leader's message is there"
    if gone == "paused":
        able.store.pause_execution(leader.execution_id, None)
    else:
        able.store.cancel_execution(leader.execution_id, None)
    if gone == "forgotten":
        able.store.forget_executions([leader.execution_id])
    found = list[ReadyTask]()
    for seconds in (70, 80):
        able.set_clock(seconds)
        found += [task for task in able.store.take_due(10, first_only=False) if task.execution_id == led.execution_id]
    assert [(task.execution_id, task.led_by) for task in found] == [(led.execution_id, None)]
    able.clear()


def test_executions_recorded_together_are_all_there_or_none(able: Driver) -> None:
    definition = able.define({"a": ""})
    first = able.dispatcher.create(definition, {"n": 0}, idempotency_key="k")
    with pytest.raises(IdempotencyConflict, match="k"):
        able.dispatcher.create_many(definition, [{"n": 1}, {"n": 2}], idempotency_keys=[None, "k"])
    assert [row.execution_id for row in able.store.list_executions(limit=9) if row.workflow_id == definition.id] == [first.execution_id]
    created = able.dispatcher.create_many(definition, [{"n": 1}, {"n": 0}, {"n": 1}], idempotency_keys=["l", "k", "l"])
    assert [one.created for one in created] == [True, False, False]
    assert created[1].execution_id == first.execution_id and created[2].execution_id == created[0].execution_id


def test_execution_recorded_with_others_whose_id_is_taken_gets_another(
    able: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = able.start({"a": ""})
    ids = iter(["exec-0", taken, "exec-2", "exec-1"])
    monkeypatch.setattr("pipeline.dispatch._fresh_id", lambda: next(ids))
    inputs = [{"n": n} for n in range(3)]
    created = able.dispatcher.create_many(able.define({"a": ""}), inputs, idempotency_keys=[None] * 3)
    assert [one.execution_id for one in created] == ["exec-0", "exec-1", "exec-2"]
    assert [able.store.get_execution(one.execution_id).input_data for one in created] == inputs


def test_take_due_comes_to_what_lost_its_leader_however_many_wait_for_theirs(able: Driver) -> None:
    able.set_clock(0)
    starts(able, 1_300)
    leader, led = starts(able, 2)
    able.store.cancel_execution(leader.execution_id, None)
    found: list[str] = []
    for look in range(1, 8):
        able.set_clock(60 + look)
        found += [task.execution_id for task in able.store.take_due(2_000, first_only=True)]
    assert found == [led.execution_id]
    able.clear()


def test_scatter_waits_for_nobody_who_changes_the_execution_and_leaves_the_tasks_to_recovery(able: Driver) -> None:
    able.set_clock(0)
    execution = able.start({"a": "", "b": "", "c": ""})
    able.must_claim(execution, "a")
    with psycopg.connect(able.url) as changing:
        changing.execute("SELECT pg_advisory_xact_lock(pipeline.lock_key(%s))", [execution])
        assert able.store.scatter(execution, {"b": 0, "c": 0}) == ()
    able.set_clock(60)
    assert [task.task_id for task in able.store.take_due(10, first_only=True)] == ["b", "c"]
    able.clear()


def test_inputs_recorded_together_are_stored_as_they_are(able: Driver) -> None:
    class Headers(dict[str, int]):
        def __init__(self, name: str, **values: int) -> None:
            super().__init__(**values)

    definition, given = able.define({"a": ""}), {"n": 1, "x": Headers("h", a=2, b=3), "y": defaultdict(list, a=[1])}
    created = able.dispatcher.create_many(definition, [given], idempotency_keys=[None])
    assert able.store.get_execution(created[0].execution_id).input_data == {"n": 1, "x": {"a": 2, "b": 3}, "y": {"a": [1]}}


def test_inputs_that_are_large_together_are_recorded_by_several_statements_in_their_order(
    able: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.dispatch._MOST_BYTES", 1_000)
    inputs = [{"n": n, "text": "x" * (300 if n % 3 else 2_000)} for n in range(20)]
    created = able.dispatcher.create_many(able.define({"a": ""}), inputs, idempotency_keys=[f"k{n % 7}-{n}" for n in range(20)])
    assert [able.store.get_execution(one.execution_id).input_data for one in created] == inputs
