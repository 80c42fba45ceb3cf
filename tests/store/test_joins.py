"""What a graph's shape makes the store do: fan-outs, joins, ends, skips, failures and repeats."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from pipeline.compiler import SLOTS, WIDE
from tests.store.conftest import Driver, released

DIAMOND = {"a": "", "b": "a", "c": "a", "d": "b c"}
#: two joins that share part of their headers, one nested in another's header, a fan-out, and three sinks
KNOT = {
    "a": "",
    "b": "",
    "c": "",
    "ab": "a b",
    "bc": "b c",
    "abc": "ab bc",
    "fan": "ab",
    "end1": "abc a",
    "end2": "fan",
    "end3": "bc",
}
LAYERS = {
    f"{layer}.{n}": " ".join(f"{layer - 1}.{m}" for m in range(4)) if layer else ""
    for layer in range(4)
    for n in range(4)
}


def waits(graph: dict[str, str]) -> dict[str, set[str]]:
    return {task: set(needed.split()) for task, needed in graph.items()}


def test_start_makes_exactly_the_tasks_without_dependencies_ready(drive: Driver) -> None:
    execution = drive.start(KNOT)
    assert [task.task_id for task in drive.ready_tasks(execution)] == ["a", "b", "c"]
    assert drive.due(execution) == ["a", "b", "c"]
    assert drive.status(execution) == "pending"


def test_fan_out_complete_releases_all_successors_at_once(drive: Driver) -> None:
    execution = drive.start({"a": "", **{f"b{n}": "a" for n in range(30)}})
    assert drive.complete(execution, "a") == [f"b{n}" for n in range(30)]


def test_join_is_released_by_the_last_of_its_header_only(drive: Driver) -> None:
    execution = drive.start(DIAMOND)
    assert drive.complete(execution, "a") == ["b", "c"]
    assert drive.complete(execution, "c") == []
    assert drive.due(execution) == ["b"]
    assert drive.complete(execution, "b") == ["d"]
    assert drive.complete(execution, "d") == []
    assert drive.status(execution) == "success"


def test_join_of_three_hundred_is_released_once(drive: Driver) -> None:
    execution = drive.start({**{f"a{n}": "" for n in range(300)}, "end": " ".join(f"a{n}" for n in range(300))})
    order = random.Random(7).sample(range(300), 300)
    releases = [drive.complete(execution, f"a{n}") for n in order]
    assert releases == [[]] * 299 + [["end"]]


@pytest.mark.parametrize("careful", [False, True])
def test_join_in_slots_counts_completions_skips_and_marks_and_is_released_once(drive: Driver, *, careful: bool) -> None:
    names = [f"a{n}" for n in range(WIDE)]
    execution = drive.start({**dict.fromkeys([*names, "alone"], ""), "end": " ".join(names)})
    if careful:  # from here on, every end takes the careful path
        drive.end(execution, "alone", "skipped")
    for name in names[:-1]:
        assert drive.complete(execution, name) == []
    open_slot = 1 + (WIDE - 1) % SLOTS
    (header,) = {number for number, slot in drive.counters(execution) if slot}
    found = {slot: left for (number, slot), left in drive.counters(execution).items() if number == header and left}
    assert found == {0: 1, open_slot: 1}
    assert drive.complete(execution, names[-1]) == ["end"]
    drive.drain(execution)
    assert drive.status(execution) == "success"


def test_rerun_of_a_task_in_a_slot_counts_it_again_and_no_other(drive: Driver) -> None:
    names = [f"a{n}" for n in range(WIDE)]
    execution = drive.start({**dict.fromkeys(names, ""), "end": " ".join(names)})
    drive.drain(execution)
    drive.store.reopen_execution(execution, None, task_id="a2")
    counted = {place: left for place, left in drive.counters(execution).items() if left}
    assert counted == {(0, 0): 1, (1, 0): 1, (1, 3): 1}
    assert drive.drain(execution) == ["a2", "end"]
    assert drive.status(execution) == "success"


def test_wide_join_of_a_definition_from_before_there_were_slots_is_counted_by_one_counter(drive: Driver) -> None:
    names = [f"a{n}" for n in range(WIDE)]
    definition = drive.define({**dict.fromkeys(names, ""), "end": " ".join(names)})
    key = drive.dispatcher.register(definition)
    drive.sql("UPDATE pipeline.workflow_tasks SET slots = NULL WHERE definition_id = %s", key)
    drive.sql("UPDATE pipeline.workflow_headers SET slots = '{}' WHERE definition_id = %s", key)
    execution = drive.dispatcher.create(definition, {}).execution_id
    assert drive.counters(execution) == {(0, 0): 1, (1, 0): WIDE}
    assert drive.drain(execution)[-1] == "end"
    assert drive.status(execution) == "success"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("graph", [DIAMOND, KNOT, LAYERS], ids=["diamond", "knot", "layers"])
def test_any_order_of_completions_releases_each_task_once_and_after_its_dependencies(
    drive: Driver, graph: dict[str, str], seed: int
) -> None:
    execution = drive.start(graph)
    dice = random.Random(seed)
    ready, ended, seen = set(drive.due(execution)), set(), []
    while ready:
        task = dice.choice(sorted(ready))
        ready.remove(task)
        ended.add(task)
        seen.append(task)
        now_ready = set(drive.complete(execution, task))
        expected = {t for t, needed in waits(graph).items() if task in needed and needed <= ended}
        assert now_ready == expected
        ready |= now_ready
    assert sorted(seen) == sorted(graph)
    assert drive.status(execution) == "success"
    assert set(drive.counters(execution).values()) == {0}


def test_execution_with_several_sinks_ends_with_the_last_of_them(drive: Driver) -> None:
    execution = drive.start({"a": "", "b": "a", "c": "a", "lone": ""})
    for task in ("a", "b", "lone"):
        drive.complete(execution, task)
        assert drive.status(execution) == "running"
    drive.complete(execution, "c")
    assert drive.status(execution) == "success"


# One after another


def test_sequential_runs_one_after_another_in_dependency_order(drive: Driver) -> None:
    execution = drive.start({"late": "early", "early": "", "other": ""}, enable_parallel=False)
    order = []
    while due := drive.due(execution):
        assert len(due) == 1
        order += due
        assert len(drive.complete(execution, due[0])) <= 1
    assert order == ["early", "late", "other"]
    assert drive.status(execution) == "success"


def test_sequential_skip_does_not_stop_unrelated_later_tasks(drive: Driver) -> None:
    execution = drive.start({"a": "", "b": "a", "c": "", "d": "b", "e": "c"}, enable_parallel=False)
    drive.complete(execution, "a")
    assert drive.end(execution, "b", "skipped") == ["c"]
    assert drive.complete(execution, "c") == ["e"]
    assert drive.tasks(execution)["d"] == "skipped"
    assert drive.complete(execution, "e") == []
    assert drive.status(execution) == "success"


def test_sequential_retry_runs_what_was_skipped_before_anything_behind_it(drive: Driver) -> None:
    execution = drive.start({"a": "", "b": "", "c": "", "d": "a"}, enable_parallel=False)
    drive.end(execution, "a", "skipped")
    drive.complete(execution, "b")
    drive.end(execution, "c", "failed")
    assert drive.tasks(execution) == {"a": "skipped", "b": "success", "c": "failed", "d": "skipped"}
    drive.store.reopen_execution(execution, None)
    assert drive.due(execution) == ["a"]
    assert drive.complete(execution, "a") == ["c"], "b succeeded before and is passed over"
    assert drive.complete(execution, "c") == ["d"]
    assert drive.complete(execution, "d") == []
    assert drive.status(execution) == "success"


def test_sequential_retry_ends_where_only_successes_lie_behind(drive: Driver) -> None:
    execution = drive.start({"a": "", "b": ""}, enable_parallel=False)
    drive.end(execution, "a", "skipped")
    last = drive.must_claim(execution, "b")
    drive.store.cancel_execution(execution, None)
    drive.store.complete(last, 1)
    drive.store.reopen_execution(execution, None)
    assert drive.drain(execution) == ["a"]
    assert drive.status(execution) == "success"


# Skips


def test_skip_cascades_to_all_that_need_it_and_to_nothing_else(drive: Driver) -> None:
    execution = drive.start({"a": "", "b": "", "x": "a", "y": "x b", "z": "y", "own": "b"})
    assert drive.end(execution, "a", "skipped", "nothing new") == []
    assert drive.tasks(execution) == {
        "a": "skipped",
        "b": "pending",
        "x": "skipped",
        "y": "pending",
        "z": "pending",
        "own": "pending",
    }
    assert drive.complete(execution, "b") == ["own"]
    assert drive.tasks(execution) == {
        "a": "skipped", "b": "success", "x": "skipped", "y": "skipped", "z": "skipped", "own": "pending",
    }  # fmt: skip
    assert drive.message(execution, "a") == "nothing new"
    assert drive.message(execution, "x") == "dependency a was skipped"
    assert drive.message(execution, "z") == "dependency y was skipped"
    drive.complete(execution, "own")
    assert drive.status(execution) == "success"


def test_skip_of_everything_ends_the_execution_in_success(drive: Driver) -> None:
    execution = drive.start(LAYERS)
    for n in range(4):
        assert drive.end(execution, f"0.{n}", "skipped") == []
    assert set(drive.tasks(execution).values()) == {"skipped"}
    assert drive.status(execution) == "success"


def test_skip_of_a_root_of_five_thousand_is_one_step(drive: Driver) -> None:
    wide = {f"b{n}": "a" for n in range(2_500)}
    execution = drive.start({"a": "", **wide, **{f"c{n}": f"b{n}" for n in range(2_500)}})
    drive.end(execution, "a", "skipped")
    assert drive.status(execution) == "success"
    assert set(drive.tasks(execution).values()) == {"skipped"}


def test_joins_beside_a_skip_are_released_as_ever(drive: Driver) -> None:
    execution = drive.start({"s": "", "a": "", "b": "", "join": "a b", "gone": "s a"})
    drive.end(execution, "s", "skipped")
    assert drive.complete(execution, "a") == []
    assert drive.tasks(execution)["gone"] == "skipped"
    assert drive.complete(execution, "b") == ["join"]
    drive.complete(execution, "join")
    assert drive.status(execution) == "success"


# Failures and cancels


def test_failure_skips_what_has_not_started_with_the_reason(drive: Driver) -> None:
    execution = drive.start({"a": "", "b": "", "c": "b"})
    assert drive.end(execution, "a", "failed", "disk full") == []
    assert drive.tasks(execution) == {"a": "failed", "b": "skipped", "c": "skipped"}
    assert drive.message(execution, "c") == "task a failed: disk full"
    assert drive.message(execution) == "task a failed: disk full"
    assert drive.status(execution) == "failed"


def test_failure_lets_running_tasks_finish_and_releases_nothing_more(drive: Driver) -> None:
    execution = drive.start({"a": "", "b": "", "c": "b"})
    running = drive.must_claim(execution, "b")
    drive.end(execution, "a", "failed")
    assert drive.status(execution) == "running"
    assert released(drive.store.complete(running, {"kept": 1})) == []
    assert drive.tasks(execution) == {"a": "failed", "b": "success", "c": "skipped"}
    assert drive.store.results(execution, ["b"]) == {"b": {"kept": 1}}
    assert drive.status(execution) == "failed"


def test_failure_skips_what_waits_for_a_retry_and_keeps_its_error(drive: Driver) -> None:
    execution = drive.start({"a": "", "b": ""})
    drive.end(execution, "b", "retry", "first try")
    drive.end(execution, "a", "failed", "broken")
    assert drive.tasks(execution) == {"a": "failed", "b": "skipped"}
    assert drive.message(execution, "b") == "first try; task a failed: broken"


def test_second_failure_does_not_replace_the_first_reason(drive: Driver) -> None:
    execution = drive.start({"a": "", "b": ""})
    second = drive.must_claim(execution, "b")
    drive.end(execution, "a", "failed", "first")
    drive.store.end(second, "failed", error_message="second")
    assert drive.message(execution) == "task a failed: first"
    assert drive.status(execution) == "failed"


@pytest.mark.parametrize("outcome", ["retry", "lost"])
def test_running_task_that_asks_for_more_after_a_failure_fails(drive: Driver, outcome: str) -> None:
    execution = drive.start({"a": "", "b": ""})
    running = drive.must_claim(execution, "b")
    drive.end(execution, "a", "failed", "first")
    drive.store.end(running, outcome, error_message="once more")
    assert drive.tasks(execution) == {"a": "failed", "b": "failed"}
    assert drive.status(execution) == "failed"


def test_cancel_outweighs_a_failure_that_waits_for_running_tasks(drive: Driver) -> None:
    execution = drive.start({"a": "", "b": "", "c": "b"})
    running = drive.must_claim(execution, "b")
    drive.end(execution, "a", "failed", "broken")
    assert drive.store.cancel_execution(execution, "ana") == "running"
    drive.store.end(running, "cancelled")
    assert drive.status(execution) == "cancelled"
    assert drive.message(execution) == "cancelled by ana"


def test_failure_does_not_outweigh_a_cancel(drive: Driver) -> None:
    execution = drive.start({"a": "", "b": ""})
    running = drive.must_claim(execution, "a")
    drive.store.cancel_execution(execution, None)
    assert drive.tasks(execution) == {"a": "running", "b": "cancelled"}
    drive.store.end(running, "failed", error_message="broken")
    assert drive.tasks(execution) == {"a": "failed", "b": "cancelled"}
    assert drive.status(execution) == "cancelled"
    assert drive.message(execution) == "cancelled"


# Budgets


def test_lost_beyond_the_budget_fails_the_task(drive: Driver) -> None:
    execution = drive.start({"a": ""})
    for losses in (1, 2):
        drive.end(execution, "a", "lost", "no heartbeat")
        (task,) = drive.store.get_tasks(execution)
        assert (task.status, task.losses, task.retries) == ("pending", losses, 0)
    drive.end(execution, "a", "lost", "no heartbeat")
    assert drive.tasks(execution) == {"a": "failed"}
    assert (
        drive.message(execution, "a") == "lost its worker 3 times, more than the budget of 2 allows; last: no heartbeat"
    )
    assert [a.outcome for a in drive.store.get_attempts(execution, "a")] == ["lost", "lost"]


def test_retry_counts_and_is_due_after_its_delay(drive: Driver) -> None:
    drive.set_clock(0)
    worker = drive.new_worker()
    execution = drive.start({"a": ""})
    fence = drive.claim(execution, "a", worker=worker)
    assert fence is not None
    drive.store.end(fence, "retry", error_type="OSError", error_message="gone", delay=30)
    (task,) = drive.store.get_tasks(execution)
    assert (task.status, task.attempt, task.retries, task.losses) == ("retry", 1, 1, 0)
    assert drive.store.take_due(100, first_only=False) == ()
    drive.set_clock(30)
    assert [t.task_id for t in drive.store.take_due(100, first_only=False)] == ["a"]
    claim = drive.store.claim(
        execution_id=execution, task_id="a", epoch=task.epoch, worker_id=worker, handler="debug.noop"
    )
    assert claim is not None
    assert (claim.attempt, claim.retries) == (2, 1)
    (kept,) = drive.store.get_attempts(execution, "a")
    assert (kept.attempt, kept.outcome, kept.error_type, kept.error_message) == (1, "retry", "OSError", "gone")


# Retry of the execution


def test_retry_of_the_execution_keeps_what_succeeded_and_starts_the_rest_afresh(drive: Driver) -> None:
    execution = drive.start(KNOT)
    for task in ("a", "b", "ab", "c"):
        drive.complete(execution, task)
    drive.end(execution, "bc", "failed", "broken")
    assert drive.status(execution) == "failed"
    assert drive.store.reopen_execution(execution, "ana") == "failed"
    assert drive.status(execution) == "retry"
    assert drive.message(execution) is None
    kept = {t.task_id: t.result for t in drive.store.get_tasks(execution) if t.status == "success"}
    assert kept == {task: {"by": task} for task in ("a", "b", "ab", "c")}
    assert drive.due(execution) == ["bc", "fan"]
    assert drive.drain(execution, max) == ["fan", "end2", "bc", "end3", "abc", "end1"]
    assert drive.status(execution) == "success"


def test_retry_of_the_execution_computes_counters_anew_after_losing_half_a_join(drive: Driver) -> None:
    execution = drive.start(DIAMOND)
    drive.complete(execution, "a")
    running = drive.must_claim(execution, "b")
    drive.end(execution, "c", "failed")
    drive.store.complete(running, 1)  # counted no more: the execution was decided
    drive.store.reopen_execution(execution, None)
    assert drive.complete(execution, "c") == ["d"]


def test_retry_of_a_cancelled_execution_with_nothing_left_to_do_ends_it_in_success(drive: Driver) -> None:
    execution = drive.start({"a": ""})
    running = drive.must_claim(execution, "a")
    drive.store.cancel_execution(execution, None)
    drive.store.complete(running, 1)
    assert drive.status(execution) == "cancelled"
    assert drive.store.reopen_execution(execution, None) == "cancelled"
    assert drive.status(execution) == "success"


def test_retry_of_the_execution_gives_the_whole_timeout_each_time(drive: Driver) -> None:
    drive.set_clock(0)
    execution = drive.start({"a": ""}, timeout=60)
    for moment in (100, 5_000, 90_000):
        drive.set_clock(moment)
        drive.store.expire_executions(100)
        assert drive.status(execution) == "failed"
        drive.store.reopen_execution(execution, None)
        drive.set_clock(moment + 59)
        drive.store.expire_executions(100)
        assert drive.status(execution) == "retry"


def test_retry_of_the_execution_resets_budgets_and_fences_out_old_attempts(drive: Driver) -> None:
    execution = drive.start({"a": "", "b": ""})
    drive.end(execution, "a", "retry")
    drive.end(execution, "a", "lost")
    old = drive.must_claim(execution, "a")
    drive.store.end(old, "failed")
    drive.store.reopen_execution(execution, None)
    task = next(t for t in drive.store.get_tasks(execution) if t.task_id == "a")
    assert (task.status, task.attempt, task.retries, task.losses) == ("pending", 3, 0, 0)
    assert task.epoch > old.epoch
    assert drive.store.complete(old, 1).outcome == "stale"
    assert [a.outcome for a in drive.store.get_attempts(execution, "a")] == ["retry", "lost", "failed"]


def test_order_of_ready_tasks_is_topological(drive: Driver) -> None:
    graph = {"a": "", **{f"t{n}": "a" for n in (3, 1, 2)}}
    execution = drive.start(graph)
    assert drive.complete(execution, "a") == ["t3", "t1", "t2"]
    numbers = [n for (n,) in drive.sql(
        "SELECT w.number FROM pipeline.workflow_tasks w JOIN pipeline.workflow_executions e USING (definition_id)"
        " WHERE e.execution_id = %s ORDER BY 1", execution,
    )]  # fmt: skip
    assert all(b - a == 1 for a, b in pairwise(numbers))
