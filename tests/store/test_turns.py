"""Tasks that share a message, and successes that claim what comes next: what the store gives, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from pipeline.dispatch import _messages
from pipeline.result_store.rows import NOTHING, Claim, Fence, Follow, ReadyTask
from tests.store.conftest import Driver

ROOM = Follow(room=300.0)
NOOP = "debug.noop"


@pytest.fixture
def able(lone: Driver) -> Iterator[Driver]:
    """The driver alone, its worker the only one, with a lease and the handler."""

    def make(handlers: str) -> None:
        lone.sql(
            "UPDATE pipeline.workers SET handlers = %s, slow = '{}', expires_at = now() + interval '1 h' WHERE worker_id = %s",
            handlers, lone.worker,
        )  # fmt: skip

    make(f"{{{NOOP}}}")
    yield lone
    lone.set_clock(None)
    make("{}")


def leaders(ready: tuple[ReadyTask, ...]) -> dict[str, str | None]:
    return {task.task_id: task.led_by for task in ready}


def named(task: str, epoch: int = 0, handler: str = NOOP) -> Follow:
    return replace(ROOM, task_id=task, epoch=epoch, handler=handler)


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
    ended = able.store.complete(fence, None, named("c"))
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
    assert complete(able, execution, "a", named("b")) == ("b", [])


@pytest.mark.parametrize("follow", [named("b", 1), named("b", 0, "debug.echo"), named("c"), named("nowhere")])
def test_complete_claims_no_named_task_whose_message_is_stale_or_forged(able: Driver, follow: Follow) -> None:
    execution = able.start({"a": "", "b": "", "c": "a b"})
    assert complete(able, execution, "a", follow) == (None, [])
    assert able.tasks(execution) == {"a": "success", "b": "pending", "c": "pending"}


def test_complete_along_the_careful_path_claims_nothing(able: Driver) -> None:
    execution = able.start({"s": "", "a": "", "b": "a"})
    able.end(execution, "s", "skipped")
    assert complete(able, execution, "a", ROOM) == (None, ["b"])


def test_repeat_of_a_complete_whose_answer_was_lost_gives_the_same_next_task(able: Driver) -> None:
    execution = able.start({"a": "", "b": "a", "c": "", "d": ""})
    fence = able.must_claim(execution, "a")
    first = able.store.complete(fence, None, named("c")).next
    again = able.store.complete(fence, None, named("c"))
    assert first is not None and again.outcome == "done"
    assert again.next == replace(first, results=None)
    fence = able.must_claim(execution, "c")
    first = able.store.complete(fence, None, named("d")).next
    assert first is not None and able.store.complete(fence, None, named("d")).next == first


def test_stale_complete_claims_nothing(able: Driver) -> None:
    execution = able.start({"a": "", "b": ""})
    fence = able.must_claim(execution, "a")
    ended = able.store.complete(replace(fence, epoch=fence.epoch + 1), None, named("b"))
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
