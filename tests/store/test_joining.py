"""Executions enqueued one after the other: the first task of each joins the message of one that still waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from pipeline.definition import WorkflowDefinition
from pipeline.result_store.rows import Created, Follow, NewExecution
from pipeline.result_store.store import ResultStore
from tests.store.conftest import Driver
from tests.store.test_races import Arena, Connect, message

NOOP = "debug.noop"
PAIR = {"a": "", "b": "a"}


@pytest.fixture
def quick(lone: Driver) -> Iterator[Driver]:
    """The driver alone, its worker the only one, which knows that the handler is quick; two messages wait for it."""
    lone.clear()
    know(lone, quick=[NOOP])
    for _ in range(2):
        lone.start({"a": ""})
    yield lone
    lone.set_clock(None)
    know(lone, quick=[])


@pytest.fixture
def arena(quick: Driver, connect: Connect) -> Arena:
    return Arena(quick, connect)


def know(drive: Driver, *, quick: list[str], slow: list[str] | None = None) -> None:
    drive.sql(
        "UPDATE pipeline.workers SET handlers = %s, slow = %s, quick = %s, expires_at = now() + interval '1 h' WHERE worker_id = %s",
        [NOOP], slow or [], quick, drive.worker,
    )  # fmt: skip


def enqueue(drive: Driver, definition: WorkflowDefinition, count: int = 1) -> list[Created]:
    """One after the other, by one program."""
    return [drive.dispatcher.create(definition, {}) for _ in range(count)]


def join(store: ResultStore, key: int, execution: str, leader: str) -> Created:
    new = NewExecution(execution_id=execution, input_data={}, input_digest="")
    (created,) = store.create_executions([new], definition_id=key, user_id=None, variables={}, timeout=None, leader=leader)
    return created


def claim(drive: Driver, execution: str, task: str = "a", epoch: int = 0) -> Any:
    return drive.store.claim(**message(execution, task, drive.worker, epoch))


def led(drive: Driver, execution: str) -> tuple[str | None, str | None]:
    (task,) = drive.ready_tasks(execution)
    return task.led_in, task.led_by


def test_create_of_a_quick_handler_joins_the_message_of_the_one_before_which_its_claim_tells(quick: Driver) -> None:
    first, *others = enqueue(quick, quick.define(PAIR), 4)
    ids = [other.execution_id for other in others]
    assert ([task.task_id for task in first.ready], [other.ready for other in others]) == (["a"], [()] * 3)
    assert {led(quick, execution) for execution in ids} == {(first.execution_id, "a")}
    assert quick.store.count_published() == 3
    assert claim(quick, first.execution_id).leads == ids
    assert claim(quick, first.execution_id).leads == ids, "the first answer was lost"
    assert [claim(quick, execution).leads for execution in ids] == [None] * 3
    assert quick.store.audit() == []


def test_create_of_a_ninth_has_a_message_of_its_own_and_others_join_that(quick: Driver) -> None:
    created = enqueue(quick, quick.define(PAIR), 17)
    assert [n for n, one in enumerate(created) if one.ready] == [0, 8, 16]
    assert {led(quick, one.execution_id)[0] for one in created[9:16]} == {created[8].execution_id}


def test_complete_that_goes_on_with_one_that_others_joined_is_told_of_them(quick: Driver) -> None:
    one = quick.start({"a": ""})
    two, three = enqueue(quick, quick.define(PAIR), 2)
    fence = quick.must_claim(one, "a")
    follow = Follow(room=300.0, execution_id=two.execution_id, task_id="a", epoch=0, handler=NOOP)
    for _ in range(2):  # the second time, the first answer was lost
        ended = quick.store.complete(fence, None, follow)
        assert ended.next is not None and ended.next.leads == [three.execution_id]


WHYS = (
    "not known to be quick", "slow elsewhere", "may be with a worker", "claimed", "cancelled", "paused", "a second old",
    "another workflow", "several first tasks", "published again", "never published", "somebody changes it",
)  # fmt: skip


@pytest.mark.parametrize("why", WHYS)
def test_create_joins_no_message_and_does_not_wait_where_the_one_before(quick: Driver, why: str) -> None:
    definition = quick.define({"a": "", "b": "", "c": "a b"} if why == "several first tasks" else PAIR)
    if why == "not known to be quick":
        know(quick, quick=[])
    elif why == "slow elsewhere":
        know(quick, quick=[NOOP], slow=[NOOP])
    elif why == "may be with a worker":
        quick.new_worker()  # now two messages are one for each process
    (first,) = enqueue(quick, definition)
    execution, changing = first.execution_id, psycopg.connect(quick.url)
    match why:
        case "claimed":
            assert claim(quick, execution) is not None
        case "cancelled":
            quick.store.cancel_execution(execution, None)
        case "paused":
            quick.store.pause_execution(execution, None)
        case "a second old":
            quick.sql("UPDATE pipeline.task_executions SET ready_at = now() - interval '1 s' WHERE execution_id = %s", execution)
        case "another workflow":
            definition = quick.define(PAIR)
        case "published again" | "never published":
            hints = 2 if why == "published again" else 0
            quick.sql("UPDATE pipeline.task_executions SET hints = %s WHERE execution_id = %s", hints, execution)
        case "somebody changes it":
            changing.execute("SELECT pg_advisory_xact_lock(pipeline.lock_key(%s))", [execution])
    (second,) = enqueue(quick, definition)
    changing.close()
    assert second.ready != ()
    assert {task.led_in for task in second.ready} == {None}
    assert quick.sql("SELECT leads FROM pipeline.task_executions WHERE execution_id = %s AND leads <> '{}'", execution) == []


def test_create_within_a_callers_transaction_joins_no_message_and_keeps_no_worker_waiting(quick: Driver) -> None:
    definition = quick.define(PAIR)
    (first,) = enqueue(quick, definition)
    with psycopg.connect(quick.url) as connection:
        second = quick.dispatcher.create(definition, {}, store=quick.store.within(connection))
        assert claim(quick, first.execution_id).leads == []
    assert led(quick, second.execution_id) == (None, None)
    (third,) = enqueue(quick, definition)
    assert led(quick, third.execution_id) == (None, None), "of what is recorded by others nobody knows when it is published"


def test_create_with_a_key_that_was_used_before_joins_nothing(quick: Driver) -> None:
    definition = quick.define(PAIR)
    first = quick.dispatcher.create(definition, {}, idempotency_key="k")
    again = quick.dispatcher.create(definition, {}, idempotency_key="k")
    assert (again.created, again.execution_id) == (False, first.execution_id)
    assert claim(quick, first.execution_id).leads == []


def test_second_attempt_of_one_that_others_joined_is_not_told_of_them_again(quick: Driver) -> None:
    first, second = enqueue(quick, quick.define(PAIR), 2)
    quick.end(first.execution_id, "a", "released")
    again = claim(quick, first.execution_id, epoch=1)
    assert (again.attempt, again.leads) == (2, None)
    assert claim(quick, second.execution_id) is not None


@pytest.mark.parametrize("stop", ["pause_execution", "cancel_execution"])
def test_message_of_one_that_takes_no_claims_tells_of_those_that_joined_it(quick: Driver, stop: str) -> None:
    first, second = enqueue(quick, quick.define(PAIR), 2)
    getattr(quick.store, stop)(first.execution_id, None)
    assert claim(quick, first.execution_id) is None
    assert quick.store.leads_of(first.execution_id, "a") == [second.execution_id]
    assert claim(quick, second.execution_id) is not None


def test_stale_message_of_one_that_runs_tells_of_nobody(quick: Driver) -> None:
    first, _ = enqueue(quick, quick.define(PAIR), 2)
    assert claim(quick, first.execution_id) is not None
    assert quick.store.leads_of(first.execution_id, "a") == []


def test_recovery_publishes_those_that_joined_a_message_once_that_has_come_to_nothing(quick: Driver) -> None:
    quick.set_clock(0)
    first, second = enqueue(quick, quick.define(PAIR), 2)
    grace = quick.store.grace.total_seconds()
    quick.set_clock(grace)
    assert [task.execution_id for task in quick.store.take_due(10, first_only=False)] == [first.execution_id]
    quick.set_clock(grace * 1.25)
    assert quick.store.take_due(10, first_only=False) == (), "the message was published again"
    assert claim(quick, first.execution_id).leads == [second.execution_id], "and its reader died"
    quick.set_clock(grace * 1.5 + 3)
    assert [(task.execution_id, task.led_by) for task in quick.store.take_due(10, first_only=False)] == [(second.execution_id, None)]


def test_join_meets_claim_which_waits_and_is_told_of_it(arena: Arena) -> None:
    definition = arena.drive.define(PAIR)
    (first,) = enqueue(arena.drive, definition)
    key = arena.drive.dispatcher.register(definition)
    joined, claimed = arena.meet(
        lambda store: join(store, key, "exec-2", first.execution_id),
        lambda store: store.claim(**message(first.execution_id, "a", arena.drive.worker)),
    )
    assert claimed is not None
    assert (joined.ready, claimed.leads) == ((), ["exec-2"])


def test_join_that_is_rolled_back_meets_claim_which_is_told_of_nothing(arena: Arena) -> None:
    definition = arena.drive.define(PAIR)
    (first,) = enqueue(arena.drive, definition)
    key = arena.drive.dispatcher.register(definition)
    _, claimed = arena.meet(
        lambda store: join(store, key, "exec-2", first.execution_id),
        lambda store: store.claim(**message(first.execution_id, "a", arena.drive.worker)),
        commit=False,
    )
    assert claimed is not None and claimed.leads == []


def test_claim_meets_join_which_has_a_message_of_its_own(arena: Arena) -> None:
    definition = arena.drive.define(PAIR)
    (first,) = enqueue(arena.drive, definition)
    key = arena.drive.dispatcher.register(definition)
    claimed, joined = arena.meet(
        lambda store: store.claim(**message(first.execution_id, "a", arena.drive.worker)),
        lambda store: join(store, key, "exec-2", first.execution_id),
    )
    assert claimed is not None
    assert ([task.task_id for task in joined.ready], claimed.leads) == (["a"], [])


def test_two_joins_of_one_message_meet_and_both_are_told(arena: Arena) -> None:
    definition = arena.drive.define(PAIR)
    (first,) = enqueue(arena.drive, definition)
    key = arena.drive.dispatcher.register(definition)
    arena.meet(
        lambda store: join(store, key, "exec-2", first.execution_id), lambda store: join(store, key, "exec-3", first.execution_id)
    )
    assert claim(arena.drive, first.execution_id).leads == ["exec-2", "exec-3"]
