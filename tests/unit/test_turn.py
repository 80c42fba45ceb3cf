"""What one message brings, in which order it runs, and what is given away: without a store, a broker or a worker."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Ignore
from hypothesis import given
from hypothesis import strategies as st

import pipeline.turn
from pipeline.dispatch import Dispatcher, Message, read_message
from pipeline.result_store.rows import NOTHING, Claim, Ended, ReadyTask
from pipeline.turn import Step, Turn

ROOM = 60.0


class Away:
    """Hears what is given away."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, dict[str, int]]] = []
        self.closed: list[str] = []

    def close(self, executions: Sequence[str]) -> None:
        self.closed += executions

    def __call__(self, execution_id: str, tasks: dict[str, int]) -> None:
        self.tasks.append((execution_id, tasks))


def turn(away: Away, *named: tuple[str, str]) -> Turn:
    """A turn of a message that names these tasks, each of an execution."""
    (execution, task), *others = named
    message = Message(
        execution_id=execution, task_id=task, epoch=0, others=tuple((other, name, 0) for other, name in others)
    )
    return Turn(handler="h", message=message, room=ROOM, scatter=away, close=away.close)


def claimed(execution: str, task: str) -> Claim:
    return Claim(
        execution_id=execution, task_id=task, handler="h", epoch=1, attempt=1, retries=0, params=None, timeout=ROOM,
        dependencies=[], retry_policy=None,
    )  # fmt: skip


def ready(execution: str, *tasks: str, led_by: str | None = None) -> tuple[ReadyTask, ...]:
    return tuple(
        ReadyTask(execution_id=execution, task_id=task, epoch=0, handler="h", timeout=ROOM, led_by=led_by)
        for task in tasks
    )


def done(claim: Claim | None = None, tasks: tuple[ReadyTask, ...] = (), **more: Any) -> Ended:
    return Ended(outcome="done", ready=tasks, next=claim, **more)


def order(turn: Turn) -> list[tuple[str, str]]:
    """What runs from here on, where each task is claimed by itself."""
    found = []
    while (step := turn.next()) is not None:
        found.append((step.execution_id, step.task_id))
    return found


def test_turn_asks_for_the_next_task_of_its_message_whatever_its_execution() -> None:
    running = turn(Away(), ("x", "a"), ("y", "a"))
    follow = running.follow(known={"x"})
    assert (follow.execution_id, follow.task_id, follow.epoch, follow.room) == ("y", "a", 0, ROOM)
    assert (follow.durable, follow.with_state, running.follow(known={"y"}).with_state) == (False, True, False)


def test_followers_of_a_released_task_go_before_other_executions_and_the_rest_is_left_to_be_published() -> None:
    running = turn(Away(), ("x", "a"), ("y", "a"))
    released = (*ready("x", "c", "d", led_by="b"), *ready("x", "e"), *ready("x", "f", led_by="e"))
    left = running.go_on(done(claimed("x", "b"), released))
    assert [task.task_id for task in left] == ["e", "f"]
    assert order(turn_after(running)) == [("x", "c"), ("x", "d"), ("y", "a")]


def turn_after(running: Turn) -> Turn:
    """The turn once its claimed task is over."""
    step = running.next()
    assert step is not None
    assert running.claim_of(Message(execution_id=step.execution_id, task_id=step.task_id, epoch=step.epoch)) is not None
    return running


def test_task_of_the_same_name_in_another_execution_is_neither_kept_nor_taken_for_the_claimed_one() -> None:
    running = turn(Away(), ("x", "a"), ("y", "a"), ("z", "a"))
    left = running.go_on(done(claimed("y", "a"), ready("x", "b", led_by="a")))
    assert [(task.execution_id, task.task_id) for task in left] == [("x", "b")]
    step = running.next()
    assert step == Step(execution_id="y", task_id="a", epoch=0, handler="h")
    assert running.claim_of(Message(execution_id="x", task_id="a", epoch=0)) is None
    assert running.claim_of(Message(execution_id="y", task_id="a", epoch=0)) == claimed("y", "a")
    assert order(running) == [("z", "a")]


def test_what_is_kept_runs_last_and_asks_for_a_commit_on_disk_until_there_was_one() -> None:
    running = turn(Away(), ("x", "a"), ("y", "a"))
    assert running.go_on(done(claimed("y", "a"), ready("x", "b", "c"), kept=True, durable=False)) == ()
    turn_after(running)
    follow = running.follow()
    assert (follow.execution_id, follow.task_id, follow.durable) == ("x", "b", True)
    assert running.go_on(done(claimed("x", "b"), ready("y", "b"), kept=True, durable=True)) == ()
    turn_after(running)
    assert (running.follow().task_id, running.follow().durable) == ("c", False)
    assert order(running) == [("x", "c"), ("y", "b")]


def test_what_is_kept_and_may_not_be_on_disk_is_given_away_rather_than_claimed_by_itself() -> None:
    away = Away()
    running = turn(away, ("x", "a"), ("y", "a"))
    running.go_on(done(claimed("y", "a"), ready("x", "b", "c"), kept=True, durable=False))
    turn_after(running)
    assert running.next() is None  # the task of y failed: nothing was claimed with its end
    assert away.tasks == [("x", {"b": 0, "c": 0})]


def test_stale_answer_says_nothing_of_what_is_on_disk() -> None:
    away = Away()
    running = turn(away, ("x", "a"), ("y", "a"))
    running.go_on(done(claimed("y", "a"), ready("x", "b"), kept=True, durable=False))
    turn_after(running).go_on(Ended(outcome="stale", ready=()))
    assert (running.next(), away.tasks) == (None, [("x", {"b": 0})])


def test_those_that_joined_a_message_run_after_those_that_it_names() -> None:
    running = turn(Away(), ("x", "a"), ("y", "a"))
    running.lead(["v", "w"])
    assert order(running) == [("y", "a"), ("v", "a"), ("w", "a")]


def test_those_that_joined_the_message_of_a_task_that_was_claimed_on_the_way_run_too_or_are_given_away() -> None:
    for over in (False, True):
        away = Away()
        running = turn(away, ("x", "a"), ("y", "a"))
        running.go_on(done(replace(claimed("y", "a"), leads=["v", "w"])))
        turn_after(running).over = over
        assert order(running) == ([] if over else [("v", "a"), ("w", "a")])
        assert away.tasks == ([("v", {"a": 0}), ("w", {"a": 0})] if over else [])


def test_task_that_is_given_away_while_the_next_one_is_looked_for_lets_nothing_run_that_may_not_be_on_disk() -> None:
    running = turn(Away(), ("x", "a"), ("y", "a"), ("z", "a"))
    running.go_on(done(claimed("y", "a"), ready("x", "b"), kept=True, durable=False))

    class Meanwhile(set[Step]):
        """As if who looks after the turn took the first that waits at this moment."""

        def __contains__(self, step: object) -> bool:
            running._waiting.popleft()
            return super().__contains__(step)

    turn_after(running)
    running._unsure = Meanwhile(running._unsure)
    assert running.next() == Step(execution_id="z", task_id="a", epoch=0, handler="h")


def test_executions_left_open_are_brought_with_each_call_until_one_has_ended_them() -> None:
    away = Away()
    running = turn(away, ("x", "a"), ("y", "a"), ("z", "a"))
    running.go_on(done(claimed("y", "a"), closing=["x"], durable=False))
    assert (running.follow().closing, running.follow().durable) == (("x",), False)
    turn_after(running).go_on(done(claimed("z", "a"), closing=None, durable=False))
    assert running.follow().closing == ("x",), "the task of y went along the careful path"
    turn_after(running).go_on(done(closing=[]))
    assert (running.follow().closing, running.next(), away.closed) == ((), None, [])


def test_executions_left_open_for_longer_than_a_moment_ask_for_a_commit_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pipeline.turn.time, "monotonic", lambda: now[0])
    running = turn(Away(), ("x", "a"), ("y", "a"), ("z", "a"))
    running.go_on(done(claimed("y", "a"), closing=["x"], durable=False))
    now[0] = 0.04
    turn_after(running).go_on(done(claimed("z", "a"), closing=["x", "y"], durable=False))
    assert not running.follow().durable
    now[0] = 0.06
    assert running.follow().durable, "x ended 60 ms ago, although the present task has just begun"


@pytest.mark.parametrize("end", ["next", "over", "look"])
def test_executions_left_open_end_with_their_turn_or_when_its_task_takes_long(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    now, away = [0.0], Away()
    monkeypatch.setattr(pipeline.turn.time, "monotonic", lambda: now[0])
    running = turn(away, ("x", "a"), ("y", "a"))
    running.go_on(done(claimed("y", "a"), closing=["x"], durable=False))
    turn_after(running)
    assert (running.look(), away.closed) == (0.05, [])
    if end == "look":
        now[0] = 0.06
        assert running.look() is None
    else:
        running.over = end == "over"
        assert running.next() is None  # the task of y failed: nothing was closed with its end
    assert (away.closed, running.follow().closing) == (["x"], ())


def test_turn_that_is_over_follows_nothing_and_gives_away_what_waits_by_execution() -> None:
    away = Away()
    running = turn(away, ("x", "a"), ("y", "a"), ("x", "b"), ("y", "b"))
    running.over = True
    assert (running.follow(), running.next()) == (NOTHING, None)
    assert away.tasks == [("y", {"a": 0, "b": 0}), ("x", {"b": 0})]


NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=20)
TASKS = st.lists(
    st.builds(
        ReadyTask, execution_id=st.sampled_from(["exec-0", "exec-1", "exec-2"]), task_id=NAMES,
        epoch=st.integers(0, 1000), handler=st.just("h"), timeout=st.just(1.0),
    ),
    min_size=1, max_size=30,
)  # fmt: skip


@given(tasks=TASKS)
def test_reader_of_a_message_finds_every_task_that_the_writer_named(tasks: list[ReadyTask]) -> None:
    dispatcher = Dispatcher(None, Celery("tests", set_as_current=False), hard_limit=1.0)  # type: ignore[arg-type]
    (args, _, _), _, _ = dispatcher._message(tasks[0], tasks[1:])
    found = read_message(tuple(json.loads(json.dumps(args))))
    named = [(found.execution_id, found.task_id, found.epoch), *found.others]
    assert sorted(named) == sorted((task.execution_id, task.task_id, task.epoch) for task in tasks)
    assert named[0] == (tasks[0].execution_id, tasks[0].task_id, tasks[0].epoch)


@pytest.mark.parametrize(
    "args",
    [
        (), ("x",), ("x", "t"), ("x", "t", True), ("x", "t", -1), ("x", "t", 2**31), ("x", "t\0", 0), ("é", "t", 0),
        ("x", "t", 0, "t"), ("x", "t", 0, ["t"]), ("x", "t", 0, ["t", None]), ("x", "t", 0, [], ["y", "t"]),
        ("x", "t", 0, [], ["y", "t", -1]), ("x", "t", 0, [], [None, "t", 0]), ("x", "t", 0, [], ["y\0", "t", 0]),
        ("x", "t", 0, [], [], []), ("x", "t", 0, None, []), ("x", "t", 0, [], ["y", "t", 0] * 121), ("x", "t", 0, ["t", 0] * 121),
        ("x", "t", 0, [], [["y"], "t", 0]), ("x", "t", 0, [], {"y": 1}),
    ],
)  # fmt: skip
def test_message_of_another_form_is_dropped(args: tuple[Any, ...]) -> None:
    with pytest.raises(Ignore):
        read_message(args)


def test_claims_are_told_apart_by_their_epochs() -> None:
    running = turn(Away(), ("x", "a"))
    running.go_on(done(replace(claimed("x", "b"), epoch=5)))
    assert running.claim_of(Message(execution_id="x", task_id="b", epoch=0)) is None
    assert running.claim_of(Message(execution_id="x", task_id="b", epoch=4)) is not None
