"""Two at once, in an order that is made and not hoped for: one transaction is held open until its rival waits for it."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import psycopg
import pytest

from pipeline.compiler import WIDE
from pipeline.errors import ExecutionNotFound
from pipeline.result_store.rows import Fence, NewExecution
from pipeline.result_store.store import ResultStore
from tests.store.conftest import Driver

A, B = TypeVar("A"), TypeVar("B")
Connect = Callable[[], psycopg.Connection[Any]]
FORK = {"a": "", "b": "", "end": "a b"}


class Arena:
    """Runs two operations so that the second meets the first before it is committed."""

    def __init__(self, lone: Driver, connect: Connect) -> None:
        self.drive, self.connect = lone, connect

    def meet(
        self,
        first: Callable[[ResultStore], A],
        second: Callable[[ResultStore], B],
        *,
        commit: bool = True,
        waits: bool = True,
    ) -> tuple[A, B]:
        """Answers of both; `waits` says whether the second has to wait for the first, and is checked."""
        holder, observer = self.connect(), self.connect()
        with ThreadPoolExecutor(1) as pool:
            with holder.transaction(force_rollback=not commit):
                answer = first(self.drive.store.within(holder))
                rival = pool.submit(second, self.drive.store.within(self.connect()))
                end = time.monotonic() + 60
                while not (waiting := is_waiting(observer)) and not rival.done():
                    assert time.monotonic() < end, "the rival neither waits nor ends"
                assert waiting == waits
                if not waits:
                    rival.result(60)
            return answer, rival.result(60)


def is_waiting(observer: psycopg.Connection[Any]) -> bool:
    found = observer.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ).fetchone()
    return found is not None and found[0] > 0


@pytest.fixture
def arena(lone: Driver, connect: Connect) -> Arena:
    return Arena(lone, connect)


def message(execution: str, task: str, worker: int, epoch: int = 0) -> dict[str, Any]:
    return {
        "execution_id": execution, "task_id": task, "epoch": epoch, "worker_id": worker, "handler": "debug.noop",
    }  # fmt: skip


def test_claim_meets_claim_of_the_same_task_one_gets_it(arena: Arena) -> None:
    execution = arena.drive.start(FORK)
    one, two = arena.drive.new_worker(), arena.drive.new_worker()
    first, second = arena.meet(
        lambda store: store.claim(**message(execution, "a", one)),
        lambda store: store.claim(**message(execution, "a", two)),
    )
    assert first is not None
    assert second is None


def test_claim_meets_claim_that_is_rolled_back_and_gets_the_task(arena: Arena) -> None:
    execution = arena.drive.start(FORK)
    one, two = arena.drive.new_worker(), arena.drive.new_worker()
    _, second = arena.meet(
        lambda store: store.claim(**message(execution, "a", one)),
        lambda store: store.claim(**message(execution, "a", two)),
        commit=False,
    )
    assert second is not None
    assert second.epoch == 1


def test_first_claims_of_two_tasks_both_succeed(arena: Arena) -> None:
    execution = arena.drive.start(FORK)
    first, second = arena.meet(
        lambda store: store.claim(**message(execution, "a", arena.drive.worker)),
        lambda store: store.claim(**message(execution, "b", arena.drive.worker)),
    )
    assert first is not None
    assert second is not None
    assert arena.drive.status(execution) == "running"


def test_complete_meets_complete_of_the_same_join_exactly_one_releases_it(arena: Arena) -> None:
    execution = arena.drive.start(FORK)
    a, b = arena.drive.must_claim(execution, "a"), arena.drive.must_claim(execution, "b")
    first, second = arena.meet(lambda store: store.complete(a, 1), lambda store: store.complete(b, 2))
    assert first.ready == ()
    assert [task.task_id for task in second.ready] == ["end"]


def test_complete_meets_complete_that_is_rolled_back_and_releases_nothing(arena: Arena) -> None:
    execution = arena.drive.start(FORK)
    a, b = arena.drive.must_claim(execution, "a"), arena.drive.must_claim(execution, "b")
    _, second = arena.meet(lambda store: store.complete(a, 1), lambda store: store.complete(b, 2), commit=False)
    assert second.ready == ()
    assert [task.task_id for task in arena.drive.store.complete(a, 1).ready] == ["end"]


def test_complete_meets_its_own_repeat_and_counts_once(arena: Arena) -> None:
    execution = arena.drive.start({"a": "", "b": "a", "c": "a"})
    fence = arena.drive.must_claim(execution, "a")
    first, second = arena.meet(lambda store: store.complete(fence, 1), lambda store: store.complete(fence, 1))
    assert first == second
    assert len(first.ready) == 2


def test_last_two_sinks_meet_and_the_execution_closes(arena: Arena) -> None:
    execution = arena.drive.start({"a": "", "b": ""})
    a, b = arena.drive.must_claim(execution, "a"), arena.drive.must_claim(execution, "b")
    arena.meet(lambda store: store.complete(a, 1), lambda store: store.complete(b, 2))
    assert arena.drive.status(execution) == "success"


def test_cancel_meets_complete_of_the_last_running_task_and_waits_for_it(arena: Arena) -> None:
    execution = arena.drive.start({"a": "", "b": "a"})
    fence = arena.drive.must_claim(execution, "a")
    arena.meet(lambda store: store.complete(fence, 1), lambda store: store.cancel_execution(execution, None))
    assert arena.drive.tasks(execution) == {"a": "success", "b": "cancelled"}
    assert arena.drive.status(execution) == "cancelled"


def test_complete_meets_cancel_and_closes_the_execution(arena: Arena) -> None:
    execution = arena.drive.start({"a": "", "b": "a"})
    fence = arena.drive.must_claim(execution, "a")
    _, ended = arena.meet(lambda store: store.cancel_execution(execution, None), lambda store: store.complete(fence, 1))
    assert (ended.outcome, ended.ready) == ("done", ())
    assert arena.drive.tasks(execution) == {"a": "success", "b": "cancelled"}
    assert arena.drive.status(execution) == "cancelled"


def test_cancel_meets_complete_that_ended_the_execution_and_is_too_late(arena: Arena) -> None:
    execution = arena.drive.start({"a": ""})
    fence = arena.drive.must_claim(execution, "a")
    _, found = arena.meet(lambda store: store.complete(fence, 1), lambda store: store.cancel_execution(execution, None))
    assert found == arena.drive.status(execution) == "success"


@pytest.mark.parametrize("failure_first", [True, False])
def test_failure_meets_complete_and_the_execution_closes(arena: Arena, failure_first: bool) -> None:
    execution = arena.drive.start({"a": "", "b": "", "c": "a"})
    a, b = arena.drive.must_claim(execution, "a"), arena.drive.must_claim(execution, "b")

    def complete(store: ResultStore) -> Any:
        return store.complete(a, 1)

    def fail(store: ResultStore) -> Any:
        return store.end(b, "failed", error_message="broken")

    arena.meet(*((fail, complete) if failure_first else (complete, fail)))
    assert arena.drive.tasks(execution) == {"a": "success", "b": "failed", "c": "skipped"}
    assert arena.drive.status(execution) == "failed"


def test_complete_meets_a_skip_in_the_same_header_and_skips_the_body(arena: Arena) -> None:
    execution = arena.drive.start(FORK)
    a, b = arena.drive.must_claim(execution, "a"), arena.drive.must_claim(execution, "b")
    _, ended = arena.meet(lambda store: store.end(a, "skipped"), lambda store: store.complete(b, 1))
    assert ended.ready == ()
    assert arena.drive.tasks(execution) == {"a": "skipped", "b": "success", "end": "skipped"}
    assert arena.drive.status(execution) == "success"


def test_two_recoveries_end_the_same_attempt_as_lost_once(arena: Arena) -> None:
    execution = arena.drive.start({"a": ""})
    fence = arena.drive.must_claim(execution, "a")
    first, second = arena.meet(lambda store: store.end(fence, "lost"), lambda store: store.end(fence, "lost"))
    assert (first.outcome, second.outcome) == ("done", "stale")
    assert arena.drive.store.get_tasks(execution)[0].losses == 1


def test_complete_meets_its_own_loss_and_is_stale(arena: Arena) -> None:
    execution = arena.drive.start({"a": ""})
    fence = arena.drive.must_claim(execution, "a")
    _, second = arena.meet(lambda store: store.end(fence, "lost"), lambda store: store.complete(fence, 1))
    assert second.outcome == "stale"
    assert arena.drive.tasks(execution) == {"a": "pending"}


def test_loss_meets_a_completion_and_is_stale(arena: Arena) -> None:
    execution = arena.drive.start({"a": ""})
    fence = arena.drive.must_claim(execution, "a")
    _, second = arena.meet(lambda store: store.complete(fence, 1), lambda store: store.end(fence, "lost"))
    assert second.outcome == "stale"
    assert arena.drive.status(execution) == "success"


def test_completions_of_neighbours_in_a_wide_join_do_not_wait_for_each_other(arena: Arena) -> None:
    names = [f"a{n}" for n in range(WIDE)]
    execution = arena.drive.start({**dict.fromkeys(names, ""), "end": " ".join(names)})
    fences = [arena.drive.must_claim(execution, name) for name in names[:2]]
    arena.meet(lambda store: store.complete(fences[0], 1), lambda store: store.complete(fences[1], 1), waits=False)
    assert arena.drive.drain(execution)[-1] == "end"


def test_last_completions_of_two_slots_wait_for_each_other_and_release_once(arena: Arena) -> None:
    names = [f"a{n}" for n in range(WIDE)]
    execution = arena.drive.start({**dict.fromkeys(names, ""), "end": " ".join(names)})
    for name in names[2:]:
        arena.drive.complete(execution, name)
    fences = [arena.drive.must_claim(execution, name) for name in names[:2]]
    first, second = arena.meet(lambda store: store.complete(fences[0], 1), lambda store: store.complete(fences[1], 1))
    assert [[task.task_id for task in ended.ready] for ended in (first, second)] == [[], ["end"]]
    assert arena.drive.drain(execution) == ["end"]


def failed(drive: Driver) -> str:
    execution = drive.start({"a": "", "b": "a"})
    drive.end(execution, "a", "failed")
    return execution


@pytest.mark.parametrize("forget", ["forget_executions", "close_for_good"])
def test_forget_meets_a_retry_and_keeps_the_execution(arena: Arena, forget: str) -> None:
    execution = failed(arena.drive)
    _, kept = arena.meet(
        lambda store: store.reopen_execution(execution, None),
        lambda store: store.close_for_good(execution) if forget == "close_for_good" else store.forget_executions([execution]),
    )
    assert not kept
    assert arena.drive.drain(execution) == ["a", "b"]
    assert arena.drive.store.audit() == []


@pytest.mark.parametrize("forget", ["forget_executions", "close_for_good"])
def test_retry_meets_a_forgetting_and_finds_nothing_and_leaves_nothing_due(arena: Arena, forget: str) -> None:
    execution = failed(arena.drive)

    def retry(store: ResultStore) -> str:
        try:
            return store.reopen_execution(execution, None).value
        except ExecutionNotFound:
            return "not found"

    _, found = arena.meet(
        lambda store: store.close_for_good(execution) if forget == "close_for_good" else store.forget_executions([execution]),
        retry,
    )
    assert found == "not found"
    assert arena.drive.due(execution) == []
    assert arena.drive.store.audit() == []


def creator(drive: Driver, key: int, execution: str, digest: str = "d") -> Callable[[ResultStore], Any]:
    def create(store: ResultStore) -> Any:
        new = NewExecution(execution_id=execution, idempotency_key="k", input_data={}, input_digest=digest)
        (created,) = store.create_executions([new], definition_id=key, user_id=None, variables={}, timeout=None)
        return created

    return create


@pytest.mark.parametrize("digest", ["d", "other"])
def test_create_meets_create_with_the_same_key_and_finds_the_first(arena: Arena, digest: str) -> None:
    key = arena.drive.dispatcher.register(arena.drive.define(FORK))
    first, second = arena.meet(creator(arena.drive, key, "exec-1"), creator(arena.drive, key, "exec-2", digest))
    assert (first.created, first.execution_id) == (True, "exec-1")
    assert (second.created, second.execution_id, second.same_work) == (False, "exec-1", digest == "d")
    assert arena.drive.sql("SELECT execution_id FROM pipeline.workflow_executions") == [("exec-1",)]


def test_create_meets_create_that_is_rolled_back_and_creates(arena: Arena) -> None:
    key = arena.drive.dispatcher.register(arena.drive.define(FORK))
    _, second = arena.meet(creator(arena.drive, key, "exec-1"), creator(arena.drive, key, "exec-2"), commit=False)
    assert (second.created, second.execution_id) == (True, "exec-2")
    assert arena.drive.drain("exec-2") == ["a", "b", "end"]


def test_register_meets_register_of_the_same_definition_and_finds_its_key(arena: Arena) -> None:
    definition = arena.drive.define(FORK)
    first, second = arena.meet(
        lambda store: arena.drive.dispatcher.register(definition, store=store),
        lambda store: arena.drive.dispatcher.register(definition, store=store),
    )
    assert first == second


def test_retry_meets_retry_and_only_one_opens_the_execution(arena: Arena) -> None:
    execution = arena.drive.start({"a": ""})
    arena.drive.end(execution, "a", "failed")
    first, second = arena.meet(
        lambda store: store.reopen_execution(execution, None), lambda store: store.reopen_execution(execution, None)
    )
    assert (first, second) == ("failed", "retry")
    assert arena.drive.store.get_execution(execution).run == 2


def test_expiry_meets_a_failure_and_is_too_late(arena: Arena) -> None:
    execution = arena.drive.start({"a": "", "b": ""}, timeout=1000)
    failing = arena.drive.must_claim(execution, "a")
    arena.drive.claim(execution, "b")
    arena.drive.sql("UPDATE pipeline.workflow_executions SET deadline_at = pipeline.clock()")
    _, expired = arena.meet(
        lambda store: store.end(failing, "failed", error_message="broken"), lambda store: store.expire_executions(10)
    )
    assert expired == 0
    assert arena.drive.message(execution) == "task a failed: broken"


def test_claim_meets_pause_and_is_refused(arena: Arena) -> None:
    execution = arena.drive.start({"a": ""})
    _, claim = arena.meet(
        lambda store: store.pause_execution(execution, None),
        lambda store: store.claim(**message(execution, "a", arena.drive.worker)),
    )
    assert claim is None


def test_pause_meets_claim_and_leaves_the_task_running(arena: Arena) -> None:
    execution = arena.drive.start({"a": ""})
    arena.meet(
        lambda store: store.claim(**message(execution, "a", arena.drive.worker)),
        lambda store: store.pause_execution(execution, None),
    )
    assert arena.drive.tasks(execution) == {"a": "running"}


def test_take_due_meets_a_claim_and_passes_it_by(arena: Arena) -> None:
    execution = arena.drive.start({"a": "", "b": ""})
    arena.drive.sql("UPDATE pipeline.task_executions SET due_at = pipeline.clock(), led_by = NULL")
    _, taken = arena.meet(
        lambda store: store.claim(**message(execution, "a", arena.drive.worker)),
        lambda store: store.take_due(10, first_only=False),
        waits=False,
    )
    assert [task.task_id for task in taken] == ["b"]


def test_two_take_due_share_the_tasks(arena: Arena) -> None:
    arena.drive.start({f"a{n}": "" for n in range(6)})
    arena.drive.sql("UPDATE pipeline.task_executions SET due_at = pipeline.clock(), led_by = NULL")
    first, second = arena.meet(
        lambda store: store.take_due(4, first_only=False),
        lambda store: store.take_due(4, first_only=False),
        waits=False,
    )
    assert len(first) == 4
    assert len({task.task_id for task in first + second}) == 6


def test_resume_meets_take_due_that_parks_and_nothing_stays_parked(arena: Arena) -> None:
    execution = arena.drive.start({"a": ""})
    arena.drive.store.pause_execution(execution, None)
    arena.drive.sql("UPDATE pipeline.task_executions SET due_at = pipeline.clock()")
    parked, _ = arena.meet(
        lambda store: store.take_due(10, first_only=False), lambda store: store.resume_execution(execution, None)
    )
    assert parked == ()
    assert [task.task_id for task in arena.drive.store.take_due(10, first_only=True)] == ["a"]


def test_take_due_meets_a_resume_and_leaves_the_task_for_the_next_look(arena: Arena) -> None:
    execution = arena.drive.start({"a": ""})
    arena.drive.store.pause_execution(execution, None)
    arena.drive.sql("UPDATE pipeline.task_executions SET due_at = pipeline.clock()")
    arena.meet(
        lambda store: store.resume_execution(execution, None),
        lambda store: store.take_due(10, first_only=False),
        waits=False,
    )
    assert [task.task_id for task in arena.drive.store.take_due(10, first_only=True)] == ["a"]


def test_many_workers_with_doubled_messages_neither_deadlock_nor_lose_a_task(lone: Driver, connect: Connect) -> None:
    layers = {f"{r}.{n}": " ".join(f"{r - 1}.{m}" for m in range(5)) if r else "" for r in range(4) for n in range(5)}
    executions = [lone.start(layers) for _ in range(12)]
    bag: queue.SimpleQueue[tuple[str, str, int]] = queue.SimpleQueue()
    for execution in executions:
        for task in lone.ready_tasks(execution):
            bag.put((execution, task.task_id, task.epoch))

    def work(seed: int) -> None:
        dice, store = random.Random(seed), lone.store.within(connect())  # no second try after a deadlock
        worker = store.start_worker(name=str(seed), pid=1, lease=3600)
        while True:
            try:
                execution, task, epoch = bag.get(timeout=1)
            except queue.Empty:
                return
            claim = store.claim(**message(execution, task, worker, epoch))
            if claim is None:
                continue
            fence = Fence(execution_id=execution, task_id=task, epoch=claim.epoch, worker_id=worker)
            if dice.random() < 0.005:
                store.cancel_execution(execution, None)
            outcome = dice.choices(["success", "failed", "skipped", "lost"], [0.94, 0.01, 0.02, 0.03])[0]
            ended = store.complete(fence, 1) if outcome == "success" else store.end(fence, outcome)
            again = store.take_due(5, first_only=True) if dice.random() < 0.2 or outcome == "lost" else ()
            for ready in (*ended.ready, *again):
                for _ in range(1 + (dice.random() < 0.3)):
                    bag.put((ready.execution_id, ready.task_id, ready.epoch))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(4)]:
            done.result(120)
    for execution in executions:
        lone.drain(execution)
    assert {lone.status(e) for e in executions} <= {"success", "failed", "cancelled"}
