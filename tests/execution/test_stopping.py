"""How running handlers are stopped, and what becomes of those that do not stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.errors import IllegalTransition
from pipeline.states import ExecutionStatus, TaskStatus
from tests.conftest import NO_RETRY, SOON, Site, task, workflow

CANCELLED, FAILED, SUCCESS = TaskStatus.CANCELLED, TaskStatus.FAILED, TaskStatus.SUCCESS


def start(site: Site, path: Path, handler: str, **more: object) -> str:
    """Start a workflow whose first task touches `path`.started, and wait until it has."""
    started = site.engine.execute_workflow(
        workflow(task("t", handler, params={"path": str(path)}, **more), task("next", after=("t",)))
    )
    site.until(Path(f"{path}.started").exists)
    return started


@pytest.mark.parametrize("handler", ["site.wait_for_file", "site.async_wait", "site.cooperate", "site.clean_up_badly"])
def test_cancel_stops_the_running_handler_and_starts_nothing_more(busy_site: Site, tmp_path: Path, handler: str) -> None:
    started = start(busy_site, tmp_path / "x", handler)
    busy_site.engine.cancel(started, "ana")
    done = busy_site.engine.wait(started, 60)
    assert done.status is ExecutionStatus.CANCELLED
    assert done.error_message == "cancelled by ana"
    assert [t.status for t in done.tasks.values()] == [CANCELLED, CANCELLED]
    assert done.tasks["t"].error_message == "the execution was cancelled"
    assert done.tasks["t"].result is None
    assert done.tasks["next"].error_message == "cancelled by ana"
    assert done.tasks["next"].attempt == 0
    with pytest.raises(IllegalTransition, match="is cancelled: cancel is not possible"):
        busy_site.engine.cancel(started)


def test_cancel_stops_a_handler_that_sleeps_at_once_in_a_prefork_pool(prefork_site: Site) -> None:
    started = prefork_site.engine.execute_workflow(workflow(task("t", "debug.sleep", params={"seconds": 600})))
    prefork_site.until_running(started, "t")
    pids = children_of(prefork_site)
    prefork_site.engine.cancel(started)
    assert prefork_site.engine.wait(started, 60).tasks["t"].status is CANCELLED
    assert children_of(prefork_site) == pids, "it was stopped by a signal, not by killing its process"


def test_cancel_of_what_waits_for_a_worker_runs_nothing_of_it(busy_site: Site, tmp_path: Path) -> None:
    go, marks = tmp_path / "go", tmp_path / "marks"
    marks.mkdir()
    names = ("t0", "t1")  # as many as the worker runs at a time
    busy = busy_site.engine.execute_workflow(
        workflow(*(task(name, "site.wait_for_file", params={"path": str(go)}) for name in names))
    )
    busy_site.until_running(busy, *names)
    started = busy_site.engine.execute_workflow(
        workflow(*(task(f"t{n}", "site.leave_a_mark", params={"folder": str(marks)}) for n in range(5)))
    )
    busy_site.engine.cancel(started)
    assert busy_site.engine.get_execution(started).status is ExecutionStatus.CANCELLED
    go.touch()
    assert busy_site.engine.wait(busy, 60).status is ExecutionStatus.SUCCESS
    busy_site.run(workflow(*(task(f"t{n}") for n in range(5))))
    assert list(marks.iterdir()) == []


def test_stubborn_handler_of_a_cancelled_execution_is_killed_and_its_process_replaced(prefork_site: Site) -> None:
    before = children_of(prefork_site)
    started = prefork_site.engine.execute_workflow(workflow(task("t", "site.stubborn", params={"seconds": 600})))
    prefork_site.until_running(started, "t")
    prefork_site.engine.cancel(started)
    done = prefork_site.engine.wait(started, 60)
    assert (done.status, done.tasks["t"].status, done.tasks["t"].losses) == (ExecutionStatus.CANCELLED, CANCELLED, 0)
    await_replacement(prefork_site, before)


def test_stubborn_handler_past_its_timeout_is_killed_and_retried(prefork_site: Site) -> None:
    before = children_of(prefork_site)
    done = prefork_site.run(
        workflow(
            task("t", "site.stubborn", params={"seconds": 600}, timeout=0.3, retry_policy={**SOON, "max_retries": 1})
        )
    )
    found, attempts = done.tasks["t"], prefork_site.engine.get_attempts(done.execution_id, "t")
    assert (found.status, found.attempt, found.retries, found.losses, found.error_type) == (FAILED, 2, 1, 0, "TaskTimeout")
    assert [(a.outcome, a.error_type) for a in attempts] == [("retry", "TaskTimeout")]
    await_replacement(prefork_site, before)


def test_stubborn_handler_in_a_thread_is_given_up_and_what_it_returns_later_is_ignored(threads_site: Site, tmp_path: Path) -> None:
    go = tmp_path / "go"
    for cancelled in (True, False):
        started = threads_site.engine.execute_workflow(
            workflow(
                task("t", "site.deaf", params={"path": str(go)}, timeout=600 if cancelled else 0.2, retry_policy=NO_RETRY)
            )
        )
        threads_site.until_running(started, "t")
        if cancelled:
            threads_site.engine.cancel(started)
        done = threads_site.engine.wait(started, 60)
        assert done.tasks["t"].status is (CANCELLED if cancelled else FAILED)
        assert done.tasks["t"].error_type == ("Cancelled" if cancelled else "TaskTimeout")
        go.touch()
        threads_site.until(lambda: not go.exists())
        # both threads are of use again, and neither has recorded anything
        threads_site.run(workflow(*(task(f"t{n}") for n in range(10))))
        assert threads_site.engine.get_execution(started) == done


def test_handler_that_holds_the_interpreter_is_killed_by_the_pool_and_recorded(sites: Callable[..., Site]) -> None:
    site = sites(hard_limit=1.0, lease=60.0)
    with site.worker(concurrency=1):
        before = children_of(site)
        done = site.run(workflow(task("t", "site.hold_gil", params={"seconds": 600}, timeout=0.5, retry_policy=NO_RETRY)))
        assert (done.tasks["t"].status, done.tasks["t"].error_type) == (FAILED, "TaskTimeout")
        assert "did not stop at its timeout and was killed" in done.tasks["t"].error_message
        await_replacement(site, before)
    assert site.engine.installation.store.audit() == []


def test_timeout_of_a_workflow_ends_the_execution_and_stops_what_runs(busy_site: Site, tmp_path: Path) -> None:
    started = busy_site.engine.execute_workflow(
        workflow(
            task("t", "site.cooperate", params={"path": str(tmp_path / "x")}), task("next", after=("t",)), timeout=1.0
        )
    )  # fmt: skip
    done = busy_site.engine.wait(started, 60)
    assert done.status is ExecutionStatus.FAILED
    assert done.error_message == "the execution ran longer than the timeout of its workflow"
    assert done.tasks["next"].status is TaskStatus.SKIPPED
    assert done.tasks["t"].status is not SUCCESS


def test_many_handlers_stopped_at_odd_moments_leave_pool_and_records_whole(busy_site: Site) -> None:
    tasks = [
        task(f"t{n}", "site.churn", timeout=0.001 + n % 7 / 500, retry_policy={"max_retries": 1, "max_delay": 0.01})
        for n in range(60)
    ]
    done = [busy_site.run(workflow(one)) for one in tasks[:3]]
    rest = [busy_site.engine.execute_workflow(workflow(one)) for one in tasks[3:]]
    done += [busy_site.engine.wait(started, 60) for started in rest]
    for execution in done:
        (found,) = execution.tasks.values()
        assert (found.status, found.losses) in ((SUCCESS, 0), (FAILED, 0)), found
        assert found.error_type in (None, "TaskTimeout"), found


def test_cancel_in_the_midst_of_a_storm_leaves_pool_and_records_whole(busy_site: Site) -> None:
    flow = workflow(*(task(f"t{n}", "site.churn") for n in range(30)), *(task(f"u{n}", after=(f"t{n}",)) for n in range(30)))
    started = [busy_site.engine.execute_workflow(flow) for _ in range(6)]
    for execution_id in started:
        busy_site.until(lambda execution_id=execution_id: any(
            t.status is not TaskStatus.PENDING for t in busy_site.engine.get_execution(execution_id).tasks.values()
        ))  # fmt: skip
        if busy_site.engine.get_execution(execution_id).status is ExecutionStatus.RUNNING:
            try:
                busy_site.engine.cancel(execution_id)
            except IllegalTransition:
                continue
    for execution_id in started:
        done = busy_site.engine.wait(execution_id, 60)
        assert done.status in (ExecutionStatus.CANCELLED, ExecutionStatus.SUCCESS)
        assert all(t.losses == 0 for t in done.tasks.values())


def test_worker_told_to_end_at_once_gives_its_task_back_and_one_told_to_end_finishes_it(
    sites: Callable[..., Site], tmp_path: Path
) -> None:
    site = sites(lease=60.0)
    path = tmp_path / "x"
    with site.worker(concurrency=1, name="first") as worker:
        started = start(site, path, "site.wait_for_file", retry_policy=NO_RETRY)
        worker.send_signal(signal.SIGQUIT)
        site.until(lambda: site.task(started, "t").status is TaskStatus.PENDING)
    assert [a.outcome for a in site.engine.get_attempts(started, "t")] == ["released"]
    with site.worker(concurrency=1, name="second") as worker:
        site.until_running(started, "t")
        worker.send_signal(signal.SIGTERM)
        site.until(lambda: "Warm shutdown" in site.log("second"))
        path.touch()
        site.until(lambda: worker.poll() is not None)
    found = site.engine.get_execution(started).tasks
    assert (found["t"].status, found["t"].attempt, found["t"].retries, found["t"].losses) == (SUCCESS, 2, 0, 0)
    assert (found["next"].status, found["next"].attempt) == (TaskStatus.PENDING, 0)
    assert site.engine.installation.store.live_workers(after=0) == 0
    assert site.engine.installation.store.audit() == []


def children_of(site: Site) -> set[int]:
    """The processes of the pool that are there to run tasks."""
    store = site.engine.installation.store
    with store.link.connection.cursor() as cursor:
        cursor.execute("SELECT pid FROM pipeline.workers WHERE expires_at > now()")
        return {pid for (pid,) in cursor.fetchall() if psutil.pid_exists(pid) and pid != os.getpid()}


def await_replacement(site: Site, before: set[int]) -> None:
    """The pool is as large as it was, one of its processes is new, and it works."""
    site.until(lambda: len(children_of(site)) == len(before) and children_of(site) != before)
    assert site.run(workflow(*(task(f"t{n}") for n in range(10)))).status is ExecutionStatus.SUCCESS
