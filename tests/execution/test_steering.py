"""What people do to executions, and what time does to them, on real workers."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pipeline.errors import DefinitionError, IllegalTransition, TaskNotFound
from pipeline.states import ExecutionStatus, TaskStatus


def task(id: str, handler: str = "debug.noop", after: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:  # noqa: A002
    return {"id": id, "handler": handler, "dependencies": list(after), **more}


def flow(name: str, *tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": f"{name}-{time.time_ns()}", "tasks": list(tasks), **more}


NO_RETRY = {"max_retries": 0}


@pytest.fixture(scope="module")
def steered(sites: Callable[..., Any]) -> Any:
    """An installation with a worker of its own."""
    site = sites()
    with site.worker(concurrency=2):
        yield site


def test_rerun_from_a_task_of_a_success_runs_it_and_what_is_downstream_and_nothing_else(steered: Any) -> None:
    engine = steered.engine
    definition = flow(
        "rerun", task("a"), task("b", "debug.echo", ("a",), params={"x": 1}), task("c", "debug.echo", ("b",)), task("d")
    )
    execution_id = engine.execute_workflow(definition)
    assert engine.wait(execution_id, timeout=60).status is ExecutionStatus.SUCCESS

    engine.rerun(execution_id, "b", params={"x": 2}, user_id="ana")
    execution = engine.wait(execution_id, timeout=60)

    assert execution.status is ExecutionStatus.SUCCESS
    assert execution.run == 2
    assert {name: t.attempt for name, t in execution.tasks.items()} == {"a": 1, "b": 2, "c": 2, "d": 1}
    assert execution.results["b"]["x"] == 2
    assert execution.results["c"]["b"]["x"] == 2
    assert [a.outcome for a in engine.get_attempts(execution_id, "b")] == ["success"]
    (event,) = engine.get_events(execution_id)
    assert (event.kind, event.task_id, event.user_id, event.detail) == ("rerun", "b", "ana", {"params": {"x": 2}})
    assert event.at.tzinfo is not None


def test_rerun_refuses_wrong_params_unknown_tasks_and_open_executions_and_changes_nothing(steered: Any) -> None:
    engine = steered.engine
    execution_id = engine.execute_workflow(flow("refuse", task("a", "site.add", params={"a": 1})))
    engine.wait(execution_id, timeout=60)

    with pytest.raises(DefinitionError, match="b"):
        engine.rerun(execution_id, "a", params={"a": 1, "bb": 2})
    with pytest.raises(TaskNotFound, match="nowhere"):
        engine.rerun(execution_id, "nowhere")
    assert engine.get_execution(execution_id).run == 1
    assert engine.get_events(execution_id) == []

    engine.rerun(execution_id, "a")
    engine.pause(execution_id)
    if engine.get_execution(execution_id).status is not ExecutionStatus.SUCCESS:
        with pytest.raises(IllegalTransition):
            engine.rerun(execution_id, "a")
        engine.resume(execution_id)
    engine.wait(execution_id, timeout=60)


def test_mark_success_of_a_failed_task_goes_on_with_the_result_given(steered: Any) -> None:
    engine = steered.engine
    definition = flow(
        "mark", task("a", "debug.fail", retry_policy=NO_RETRY), task("b", "debug.echo", ("a",)), task("c", after=("b",))
    )
    execution_id = engine.execute_workflow(definition)
    assert engine.wait(execution_id, timeout=60).status is ExecutionStatus.FAILED

    engine.mark(execution_id, "a", "success", result={"rows": 7}, reason="loaded by hand", user_id="ana")
    execution = engine.wait(execution_id, timeout=60)

    assert execution.status is ExecutionStatus.SUCCESS
    assert execution.results["b"]["a"] == {"rows": 7}
    assert execution.tasks["a"].attempt == 1
    assert "ana" in (execution.tasks["a"].error_message or "")
    kinds = [(e.kind, e.user_id) for e in engine.get_events(execution_id)]
    assert kinds == [("retry", "ana"), ("mark", "ana")]
    with pytest.raises(IllegalTransition):
        engine.mark(execution_id, "a", "skipped", reason="too late")


def test_mark_skipped_skips_what_needs_it_and_fences_the_attempt_that_runs(steered: Any, tmp_path: Path) -> None:
    engine = steered.engine
    definition = flow(
        "skip", task("a", "site.wait_for_file", params={"path": str(tmp_path / "go")}), task("b", after=("a",)), task("c")
    )
    execution_id = engine.execute_workflow(definition)
    steered.until(lambda: engine.get_execution(execution_id).tasks["a"].status is TaskStatus.RUNNING)

    engine.mark(execution_id, "a", "skipped", reason="not needed today", user_id="ana")
    execution = engine.wait(execution_id, timeout=60)
    (tmp_path / "go").touch()

    assert execution.status is ExecutionStatus.SUCCESS
    assert {name: t.status.value for name, t in execution.tasks.items()} == {"a": "skipped", "b": "skipped", "c": "success"}


def test_a_workflow_that_runs_longer_than_its_timeout_fails_and_its_tasks_are_stopped(steered: Any) -> None:
    definition = flow("late", task("a", "debug.sleep", params={"seconds": 120}), task("b", after=("a",)), timeout=1.5)
    execution_id = steered.engine.execute_workflow(definition)

    execution = steered.engine.wait(execution_id, timeout=60)

    assert execution.status is ExecutionStatus.FAILED
    assert "timeout of its workflow" in (execution.error_message or "")
    assert execution.tasks["b"].status is TaskStatus.SKIPPED


def test_a_task_that_no_worker_takes_fails_the_execution_after_its_queue_timeout(sites: Callable[..., Any]) -> None:
    site = sites()
    execution_id = site.engine.execute_workflow(flow("queued", task("a"), queue_timeout=0.5))

    def expired() -> bool:
        site.engine.installation.recovery.run_once()
        return bool(site.engine.get_execution(execution_id).ended)

    site.until(expired)
    execution = site.engine.get_execution(execution_id)
    assert execution.status is ExecutionStatus.FAILED
    assert "queue_timeout" in (execution.error_message or "")


def test_sigterm_lets_running_tasks_end_and_starts_no_more(sites: Callable[..., Any], tmp_path: Path) -> None:
    site = sites()
    go = tmp_path / "go"
    definition = flow("drain", task("a", "site.wait_for_file", params={"path": str(go)}), task("b", after=("a",)))
    with site.worker(concurrency=1) as process:
        execution_id = site.engine.execute_workflow(definition)
        site.until(lambda: Path(f"{go}.started").exists())
        process.send_signal(signal.SIGTERM)
        site.until(lambda: "Warm shutdown" in site.log("worker"))
        go.touch()
        process.wait(60)

    execution = site.engine.get_execution(execution_id)
    assert execution.tasks["a"].status is TaskStatus.SUCCESS
    assert execution.tasks["a"].attempt == 1
    assert execution.tasks["b"].status is TaskStatus.PENDING

    with site.worker(concurrency=1, name="next"):
        assert site.engine.wait(execution_id, timeout=60).status is ExecutionStatus.SUCCESS


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_second_sigterm_hands_running_tasks_back_without_counting_a_loss_or_a_retry(
    sites: Callable[..., Any], tmp_path: Path, pool: str
) -> None:
    site = sites()
    go = tmp_path / "go"
    execution_id = site.engine.execute_workflow(flow("back", task("a", "site.wait_for_file", params={"path": str(go)})))
    with site.worker(pool=pool, concurrency=1) as process:
        site.until(lambda: Path(f"{go}.started").exists())
        process.send_signal(signal.SIGTERM)
        site.until(lambda: "Warm shutdown" in site.log("worker"))
        process.send_signal(signal.SIGTERM)
        process.wait(60)

    handed_back = site.engine.get_execution(execution_id).tasks["a"]
    assert handed_back.status is TaskStatus.PENDING
    assert (handed_back.losses, handed_back.retries) == (0, 0)
    assert [a.outcome for a in site.engine.get_attempts(execution_id, "a")] == ["released"]

    go.touch()
    with site.worker(pool=pool, concurrency=1, name="next"):
        execution = site.engine.wait(execution_id, timeout=60)
    assert execution.status is ExecutionStatus.SUCCESS
    assert execution.tasks["a"].attempt == 2


def test_running_tasks_go_back_by_themselves_when_the_drain_time_is_up(sites: Callable[..., Any], tmp_path: Path) -> None:
    site = sites(drain=0.5)
    go = tmp_path / "go"
    execution_id = site.engine.execute_workflow(flow("drained", task("a", "site.wait_for_file", params={"path": str(go)})))
    with site.worker(concurrency=1) as process:
        site.until(lambda: Path(f"{go}.started").exists())
        process.send_signal(signal.SIGTERM)
        process.wait(60)

    assert [a.outcome for a in site.engine.get_attempts(execution_id, "a")] == ["released"]


def test_gc_forgets_old_executions_with_their_artifacts_after_archiving_them_and_no_others(
    sites: Callable[..., Any], tmp_path: Path
) -> None:
    site = sites(retention_days=30.0, archive_url=str(tmp_path / "archive"))
    with site.worker(concurrency=1):
        retried = task("b", "site.fail_until", params={"attempt": 2}, retry_policy={"max_retries": 1, "max_delay": 0.1})
        old, young = (site.engine.execute_workflow(flow("gc", task("a", "site.context"), retried)) for _ in range(2))
        site.engine.wait(old, timeout=60)
        site.engine.wait(young, timeout=60)
    open_one = site.engine.execute_workflow(flow("gc-open", task("a")))
    artifacts = Path(site.settings.artifacts_root)
    for execution_id in (old, young):
        (artifacts / execution_id / "a" / "1").mkdir(parents=True)
        (artifacts / execution_id / "a" / "1" / "x.txt").write_text("x")
    with psycopg.connect(site.settings.database_url, autocommit=True) as connection:
        connection.execute(
            "UPDATE pipeline.workflow_executions SET finished_at = finished_at - interval '31 days' WHERE execution_id = %s",
            (old,),
        )

    assert site.engine.installation.retention.run_once() == 1
    assert site.engine.installation.retention.run_once() == 0

    left = {row.execution_id for row in site.engine.list_executions()}
    assert left == {young, open_one}
    assert not (artifacts / old).exists()
    assert (artifacts / young / "a" / "1" / "x.txt").exists()
    archived = json.loads(gzip.decompress((tmp_path / "archive" / f"{old}.json.gz").read_bytes()))
    assert archived["execution_id"] == old
    assert archived["tasks"]["a"]["status"] == "success"
    assert [(a["attempt"], a["outcome"]) for a in archived["attempts"]["b"]] == [(1, "retry")]
    with psycopg.connect(site.settings.database_url) as connection:
        for table in ("task_executions", "join_counters", "workflow_states", "task_attempts", "workflow_events"):
            query = f"SELECT count(*) FROM pipeline.{table} WHERE execution_id = %s"
            assert connection.execute(query.encode(), (old,)).fetchone() == (0,), table
        made = connection.execute("SELECT first_day - pipeline.today(), last_day - pipeline.today() FROM pipeline.partitions")
        assert made.fetchall() == [(1, 10)], "a third of the time that executions are kept, from tomorrow on"


def test_beat_with_our_scheduler_publishes_what_was_enqueued_in_a_callers_transaction(sites: Callable[..., Any]) -> None:
    site = sites(recovery_beside=False)
    with site.worker(concurrency=1), psycopg.connect(site.settings.database_url) as connection:
        execution_id = site.engine.execute_workflow(flow("beat", task("a")), connection=connection)
        connection.commit()
        command = ["-A", "pipeline", "beat", "-S", "pipeline.beat:RecoveryScheduler", "--pidfile", ""]
        beat = site.spawn(*command, "--schedule", str(site.log_folder / "beat"), name="beat", module="celery")
        try:
            execution = site.engine.wait(execution_id, timeout=60)
        finally:
            os.kill(beat.pid, signal.SIGTERM)
            beat.wait(30)
    assert execution.status is ExecutionStatus.SUCCESS
