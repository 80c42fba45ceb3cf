"""What a task gets, what it gives, and in which order tasks run: on real workers of both pools."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.states import ExecutionStatus, TaskStatus
from tests.conftest import NO_RETRY, SOON, Site, task, workflow

SUCCESS, FAILED, SKIPPED = TaskStatus.SUCCESS, TaskStatus.FAILED, TaskStatus.SKIPPED


def statuses(execution: Any) -> dict[str, TaskStatus]:
    return {name: found.status for name, found in execution.tasks.items()}


def test_execution_of_a_diamond_succeeds_with_all_results_times_and_workers(busy_site: Site) -> None:
    done = busy_site.run(
        workflow(
            task("a", "site.add", params={"a": 1}),
            task("b", "site.add", ("a",), params={"b": 10}),
            task("c", "site.double", ("a",), params={"value": "{{ tasks.a }}"}),
            task("d", "debug.echo", ("b", "c")),
        ),
        user_id="ana",
    )
    assert done.status is ExecutionStatus.SUCCESS
    assert (done.error_message, done.created_by) == (None, "ana")
    assert done.results == {"a": 2, "b": 12, "c": {"value": 4}, "d": {"b": 12, "c": {"value": 4}}}
    assert set(statuses(done).values()) == {SUCCESS}
    for found in done.tasks.values():
        assert found.attempt == 1
        assert found.worker is not None
        assert found.worker.startswith("worker@")
        assert found.ready_at <= found.started_at <= found.finished_at
    assert done.created_at <= done.started_at <= done.tasks["a"].finished_at
    assert done.tasks["a"].finished_at <= min(done.tasks[t].started_at for t in "bc")
    assert max(done.tasks[t].finished_at for t in "bc") <= done.tasks["d"].started_at
    assert done.tasks["d"].finished_at <= done.finished_at


def test_merged_input_is_params_then_input_then_results_of_dependencies(busy_site: Site) -> None:
    done = busy_site.run(
        workflow(
            task("first-one", "site.add", params={"a": 1}),
            task("all", "debug.echo", ("first-one",), params={"x": "param", "y": "param", "first-one": "param"}),
        ),
        {"y": "input", "z": "input", "first-one": "input"},
    )
    assert done.results["all"] == {"x": "param", "y": "input", "z": "input", "first-one": 2}


def test_dependency_with_a_dash_is_bound_to_the_parameter_with_an_underscore(busy_site: Site) -> None:
    done = busy_site.run(
        workflow(task("the-value", "site.add", params={"a": 20}), task("use", "site.named", ("the-value",)))
    )
    assert done.results["use"] == 22


def test_template_that_is_one_expression_keeps_its_type_and_others_become_text(busy_site: Site) -> None:
    params = {
        "number": "{{ variables.size }}", "list": "{{ input.days }}", "object": "{{ variables.more }}",
        "text": "{{ variables.size }} of {{ input.days[0] }}", "sum": "{{ tasks.a + variables.size }}",
        "id": "{{ execution.id }}", "plain": "as it is",
    }  # fmt: skip
    done = busy_site.run(
        workflow(
            task("a", "site.add", params={"a": 1}), task("b", "debug.echo", ("a",), params=params),
            variables={"size": 3, "more": {"deep": [1.5, None, True]}},
        ),
        {"days": ["mon", "tue"]},
    )  # fmt: skip
    assert done.results["b"] == {
        "number": 3, "list": ["mon", "tue"], "object": {"deep": [1.5, None, True]}, "text": "3 of mon", "sum": 5,
        "id": done.execution_id, "plain": "as it is", "days": ["mon", "tue"], "a": 2,
    }  # fmt: skip


def test_result_of_an_ancestor_that_is_no_dependency_can_be_named(busy_site: Site) -> None:
    done = busy_site.run(
        workflow(
            task("one", "site.add", params={"a": 1}),
            task("two", after=("one",)),
            task("three", "site.add", ("two",), params={"a": "{{ tasks.one }}", "b": 5}),
        )
    )
    assert done.results["three"] == 7


def test_parameters_are_coerced_to_their_types(busy_site: Site) -> None:
    params = {"day": "2026-02-03", "amount": "1.50", "tags": "{{ input.tags }}", "flag": "{{ input.yes }}"}
    done = busy_site.run(workflow(task("t", "site.typed", params=params)), {"tags": ["b", "a", "b"], "yes": "yes"})
    assert done.results["t"] == {"day": "2026-02-03", "amount": "2.50", "tags": ["a", "b"], "flag": True}


def test_parameters_that_do_not_fit_fail_the_task_at_once_and_are_all_named(busy_site: Site) -> None:
    done = busy_site.run(
        workflow(task("t", "site.typed", params={"day": "{{ input.day }}", "amount": "{{ input.day }}", "tags": []})),
        {"day": "someday"},
    )
    failed = done.tasks["t"]
    assert (failed.status, failed.attempt, failed.error_type) == (FAILED, 1, "ParamsError")
    assert "input of handler 'site.typed' does not fit: day: Input should be a valid date" in failed.error_message
    assert "; amount: Input should be a valid decimal" in failed.error_message
    assert busy_site.engine.get_attempts(done.execution_id, "t") == []


def test_template_that_cannot_be_evaluated_fails_the_task_at_once(busy_site: Site) -> None:
    done = busy_site.run(
        workflow(task("a", "site.add", params={"a": 1}), task("b", "debug.echo", ("a",), params={"x": "{{ tasks.a / 0 }}"}))
    )
    assert (done.tasks["b"].status, done.tasks["b"].attempt, done.tasks["b"].error_type) == (FAILED, 1, "TemplateError")
    assert "tasks.a / 0" in done.tasks["b"].error_message


def test_handler_that_changes_its_input_changes_nobody_elses(busy_site: Site) -> None:
    names = [f"t{n}" for n in range(4)]
    done = busy_site.run(
        workflow(
            *(task(n, "site.mutate", params={"param": {"list": []}, "variable": "{{ variables.v }}"}) for n in names),
            variables={"v": {"list": []}},
        ),
        {"given": {"list": []}, "rest": {"list": []}},
    )
    assert done.results == {name: [0, 0, 0, 0] for name in names}


def test_context_tells_the_attempt(busy_site: Site) -> None:
    done = busy_site.run(workflow(task("t", "site.context")), user_id="bo")
    assert done.results["t"] == {
        "execution_id": done.execution_id, "task_id": "t", "attempt": 1, "epoch": 1, "user_id": "bo",
        "key": f"{done.execution_id}_t",
    }  # fmt: skip


def test_progress_is_visible_while_the_handler_runs(busy_site: Site, tmp_path: Path) -> None:
    started = busy_site.engine.execute_workflow(workflow(task("t", "site.progress", params={"path": str(tmp_path / "go")})))
    busy_site.until(lambda: busy_site.task(started, "t").progress == 42)
    assert busy_site.task(started, "t").progress_message == "half way"
    (tmp_path / "go").touch()
    assert busy_site.engine.wait(started, 60).status is ExecutionStatus.SUCCESS


def test_artifacts_of_two_attempts_lie_in_folders_of_their_own(busy_site: Site) -> None:
    done = busy_site.run(workflow(task("t", "site.write", retry_policy=SOON)))
    root = Path(busy_site.settings.artifacts_root, done.execution_id, "t")
    assert done.results["t"] == f"file://{root}/2/out.txt"
    assert {p.parent.name: p.read_text() for p in root.glob("*/out.txt")} == {"1": "attempt 1", "2": "attempt 2"}


def test_execution_without_parallelism_runs_one_task_after_another(busy_site: Site) -> None:
    names = [f"t{n}" for n in range(6)]
    done = busy_site.run(workflow(*(task(n) for n in names), enable_parallel=False))
    ordered = sorted(done.tasks.values(), key=lambda t: t.started_at)
    assert [t.task_id for t in ordered] == names
    assert all(one.finished_at <= other.started_at for one, other in pairwise(ordered))


def test_skip_skips_what_depends_on_it_with_the_reason_and_the_rest_runs(busy_site: Site) -> None:
    done = busy_site.run(
        workflow(
            task("skipper", "site.skip", params={"reason": "no data today"}),
            task("other"),
            task("needs", after=("skipper", "other")),
            task("needs-that", after=("needs",)),
            task("free", after=("other",)),
        )
    )
    assert done.status is ExecutionStatus.SUCCESS
    assert statuses(done) == {
        "skipper": SKIPPED, "other": SUCCESS, "needs": SKIPPED, "needs-that": SKIPPED, "free": SUCCESS,
    }  # fmt: skip
    assert done.tasks["skipper"].error_message == "no data today"
    assert done.tasks["needs"].error_message == "dependency skipper was skipped"
    assert done.tasks["needs-that"].error_message == "dependency needs was skipped"
    assert done.tasks["needs"].attempt == 0


def test_failure_lets_running_tasks_finish_and_skips_the_rest_with_the_reason(busy_site: Site, tmp_path: Path) -> None:
    go = tmp_path / "go"
    started = busy_site.engine.execute_workflow(
        workflow(
            task("slow", "site.wait_for_file", params={"path": str(go)}),
            task("trigger", "site.wait_for_file", params={"path": str(go) + ".started"}),
            task("bad", "debug.fail", ("trigger",), params={"message": "broken"}, retry_policy=NO_RETRY),
            task("after-bad", after=("bad",)),
            task("after-slow", after=("slow",)),
        )
    )
    busy_site.until(lambda: busy_site.task(started, "after-bad").status is SKIPPED)
    found = busy_site.engine.get_execution(started)
    assert found.status is ExecutionStatus.RUNNING
    assert found.tasks["slow"].status is TaskStatus.RUNNING
    go.touch()
    done = busy_site.engine.wait(started, 60)
    assert done.status is ExecutionStatus.FAILED
    assert done.error_message == "task bad failed: broken"
    assert statuses(done) == {
        "slow": SUCCESS, "trigger": SUCCESS, "bad": FAILED, "after-bad": SKIPPED, "after-slow": SKIPPED,
    }  # fmt: skip
    assert done.results["slow"] == "seen"
    assert done.tasks["after-slow"].error_message == done.tasks["after-bad"].error_message == "task bad failed: broken"


@pytest.mark.parametrize(("width", "layers"), [(40, 1), (8, 5)], ids=["wide", "layered"])
def test_execution_of_many_tasks_runs_each_once_and_after_all_it_waits_for(busy_site: Site, width: int, layers: int) -> None:
    rows = [[f"t{layer}.{n}" for n in range(width)] for layer in range(layers)]
    tasks = [task(t, after=tuple(rows[i - 1]) if i else ()) for i, row in enumerate(rows) for t in row]
    done = busy_site.run(workflow(*tasks, task("end", after=tuple(rows[-1]))))
    assert done.status is ExecutionStatus.SUCCESS
    assert {t.attempt for t in done.tasks.values()} == {1}
    for above, below in zip(rows, [*rows[1:], ["end"]], strict=True):
        ends = max(done.tasks[t].finished_at for t in above)
        assert all(done.tasks[t].started_at >= ends for t in below)
