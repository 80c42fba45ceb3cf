"""The query that KEDA asks in docs/keda.yaml: as many as there are tasks that a worker could run now, or runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.store.conftest import Driver

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "keda.yaml"


def scaled_object() -> dict[str, Any]:
    """The one ScaledObject of the document."""
    (found,) = (part for part in yaml.safe_load_all(DOCUMENT.read_text("utf-8")) if part["kind"] == "ScaledObject")
    assert isinstance(found, dict)
    return found


def query() -> str:
    """What its only trigger asks."""
    (trigger,) = scaled_object()["spec"]["triggers"]
    assert trigger["type"] == "postgresql"
    text = trigger["metadata"]["query"]
    assert isinstance(text, str)
    return text


def wanted(drive: Driver) -> int:
    """What KEDA would read."""
    ((count,),) = drive.sql(query())
    assert isinstance(count, int)
    return count


def test_nothing_is_wanted_where_nothing_is_to_do(lone: Driver) -> None:
    assert wanted(lone) == 0
    execution = lone.start({"a": "", "b": "a"})
    lone.drain(execution)
    assert wanted(lone) == 0


def test_task_is_wanted_from_when_its_dependencies_ended_until_its_own_end(lone: Driver) -> None:
    lone.start({"x": ""})
    execution = lone.start({"a": "", "b": "a", "c": "", "d": "b c"})
    assert wanted(lone) == 3
    fence = lone.must_claim(execution, "a")
    assert wanted(lone) == 3
    lone.store.complete(fence, None)
    assert (lone.due(execution), wanted(lone)) == (["b", "c"], 3)
    lone.complete(execution, "c")
    assert wanted(lone) == 2


def test_tasks_that_share_a_message_are_wanted_each(lone: Driver) -> None:
    execution = lone.start({f"t{n}": "" for n in range(20)})
    assert lone.store.count_published() < 20
    assert wanted(lone) == 20
    lone.store.cancel_execution(execution, None)
    assert wanted(lone) == 0


def test_retry_is_wanted_once_its_delay_has_passed_and_from_then_on(lone: Driver) -> None:
    lone.set_clock(0)
    execution = lone.start({"a": ""})
    lone.store.end(lone.must_claim(execution, "a"), "retry", delay=100.0)
    lone.set_clock(99)
    assert wanted(lone) == 0
    lone.set_clock(100)
    assert wanted(lone) == 1
    (ready,) = lone.store.take_due(10, first_only=False)
    assert (ready.task_id, wanted(lone)) == ("a", 1)  # its message is published, its due time is ahead again


def test_task_whose_worker_was_lost_is_wanted_again(lone: Driver) -> None:
    execution = lone.start({"a": ""})
    lone.store.end(lone.must_claim(execution, "a"), "lost")
    assert wanted(lone) == 1


@pytest.mark.parametrize("parked", [False, True])
def test_what_waits_in_a_pause_is_not_wanted_and_what_runs_in_it_is(lone: Driver, *, parked: bool) -> None:
    lone.set_clock(0)
    execution = lone.start({"a": "", "b": ""})
    lone.must_claim(execution, "a")
    lone.store.pause_execution(execution, None)
    if parked:
        lone.set_clock(60)
        assert lone.store.take_due(10, first_only=False) == ()
    assert wanted(lone) == 1
    lone.store.resume_execution(execution, None)
    assert wanted(lone) == 2


def test_query_reads_open_tasks_by_their_indexes(lone: Driver) -> None:
    key = lone.dispatcher.register(lone.define({"a": ""}))
    lone.sql(
        """INSERT INTO pipeline.workflow_executions
               (execution_id, definition_id, workflow_id, input_digest, status, started_at, finished_at)
           SELECT 'old-' || n, %s, 'w', '', 'success', now(), now() FROM generate_series(1, 5000) n""",
        key,
    )
    lone.sql(
        """INSERT INTO pipeline.task_executions (execution_id, task_id, handler, status, epoch, attempt, worker_id, finished_at)
           SELECT 'old-' || n, 'a', 'h', 'success', 1, 1, 1, now() FROM generate_series(1, 5000) n"""
    )
    lone.sql("ANALYZE pipeline.task_executions, pipeline.workflow_executions")
    plan = "\n".join(line for (line,) in lone.sql(f"EXPLAIN {query()}"))
    lone.clear()
    assert "task_executions_default_due_at_idx" in plan
    assert "task_executions_default_worker_id_idx" in plan
    assert "Seq Scan on task_executions_default" not in plan


def test_pods_are_asked_for_by_the_number_of_tasks_for_each_of_them() -> None:
    spec = scaled_object()["spec"]
    (trigger,) = spec["triggers"]
    assert trigger["metricType"] == "AverageValue"
    assert float(trigger["metadata"]["targetQueryValue"]) >= 1
    assert spec["minReplicaCount"] < spec["maxReplicaCount"]
