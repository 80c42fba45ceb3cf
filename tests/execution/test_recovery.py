"""What is lost comes back: processes, messages, connections and publishers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg
import pytest
from severable_line import line

from pipeline.errors import ExecutionNotFound, IllegalTransition
from pipeline.recovery import Recovered
from pipeline.states import ExecutionStatus, TaskStatus
from tests.conftest import NO_RETRY, Servers, Site, end, task, workflow

SUCCESS, PENDING = TaskStatus.SUCCESS, TaskStatus.PENDING


def take(site: Site, count: int) -> int:
    """Take messages out of the queue as if they had been lost; returns how many there were."""
    celery = site.engine.installation.celery
    with celery.connection_for_read() as connection, connection.channel() as channel:
        queue = celery.amqp.queues[site.settings.queue].bind(channel)
        return sum(queue.get(no_ack=True) is not None for _ in range(count))


def test_killed_process_of_the_pool_is_replaced_and_its_task_runs_again_at_no_cost_to_its_retries(prefork_site: Site) -> None:
    done = prefork_site.run(workflow(task("t", "site.die", params={"attempts": 1}, retry_policy=NO_RETRY)))
    found = done.tasks["t"]
    assert (found.status, found.result, found.attempt, found.retries, found.losses) == (SUCCESS, 2, 2, 0, 1)
    (lost,) = prefork_site.engine.get_attempts(done.execution_id, "t")
    assert (lost.outcome, lost.error_type) == ("lost", "WorkerLost")


def test_task_that_kills_its_process_again_and_again_fails_once_its_budget_is_spent(prefork_site: Site) -> None:
    done = prefork_site.run(workflow(task("t", "site.die", params={"attempts": 99})))
    found = done.tasks["t"]
    assert (found.status, found.attempt, found.retries) == (TaskStatus.FAILED, 2, 0)
    assert "lost its worker 2 times, more than the budget of 1 allows" in found.error_message
    assert prefork_site.run(workflow(task("t"))).status is ExecutionStatus.SUCCESS


def test_killed_worker_loses_its_task_to_another_after_its_lease(sites: Callable[..., Site], tmp_path: Path) -> None:
    site = sites(lease=3.0)
    path = tmp_path / "x"
    with site.worker(concurrency=1, name="first") as first:
        started = site.engine.execute_workflow(
            workflow(task("t", "site.wait_for_file", params={"path": str(path)}, retry_policy=NO_RETRY))
        )
        site.until(Path(f"{path}.started").exists)
        with site.worker(concurrency=1, name="second"):
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
            site.until(lambda: (site.task(started, "t").worker or "").startswith("second@"))
            path.touch()
            found = site.engine.wait(started, 60).tasks["t"]
    assert (found.status, found.retries) == (SUCCESS, 0)
    assert found.losses >= 1
    assert {a.outcome for a in site.engine.get_attempts(started, "t")} == {"lost"}
    assert site.engine.installation.store.audit() == []


def test_lost_messages_are_published_again_and_those_that_wait_are_not(sites: Callable[..., Site]) -> None:
    site = sites(grace=1.0)
    recovery, store = site.engine.installation.recovery, site.engine.installation.store
    started = [site.engine.execute_workflow(workflow(task("t"))) for _ in range(30)]
    site.until(lambda: store.recovery_work().due)
    site.until(lambda: len(due(site)) == 30)
    assert recovery.run_once() == Recovered()
    assert take(site, 7) == 7
    assert recovery.run_once() == Recovered(published=7)
    assert recovery.run_once() == Recovered()
    assert site.engine.installation.dispatcher.waiting() == 30
    assert take(site, 40) == 30
    site.until(lambda: len(due(site)) == 30)
    assert recovery.run_once() == Recovered(published=30)
    assert take(site, 40) == 30
    assert {site.engine.get_execution(e).status for e in started} == {ExecutionStatus.PENDING}


def test_shared_messages_that_were_lost_are_published_again_first_their_leaders_then_each_other_task(
    sites: Callable[..., Site],
) -> None:
    site = sites(grace=60.0, recovery_beside=False)
    recovery, dispatcher = site.engine.installation.recovery, site.engine.installation.dispatcher
    started = site.engine.execute_workflow(workflow(*(task(f"t{n}") for n in range(100))))
    messages = dispatcher.waiting()
    assert 1 < messages < 20

    def expire(whose: str) -> None:
        """Let the grace of these be over, and of no others: on a slow machine a short one would be, for any."""
        with site.engine.installation.store.link.connection.cursor() as cursor:
            cursor.execute(f"UPDATE pipeline.task_executions SET due_at = now() WHERE due_at IS NOT NULL AND {whose}".encode())

    expire("true")
    assert len(due(site)) == 100
    assert recovery.run_once() == Recovered()
    assert take(site, messages) == messages
    assert recovery.run_once() == Recovered(published=messages)
    assert recovery.run_once() == Recovered()
    published = messages
    with site.worker(concurrency=1):
        while not site.engine.get_execution(started).finished_at:
            expire("led_by IS NOT NULL")
            published += recovery.run_once().published
    done = site.engine.get_execution(started)
    assert (done.status, {t.attempt for t in done.tasks.values()}) == (ExecutionStatus.SUCCESS, {1})
    assert published == 100


def due(site: Site) -> list[object]:
    """Tasks whose message is looked for."""
    with site.engine.installation.store.link.connection.cursor() as cursor:
        return cursor.execute("SELECT 1 FROM pipeline.task_executions WHERE due_at <= now()").fetchall()


def test_backlog_behind_a_busy_worker_is_not_published_again_but_for_what_rabbitmq_handed_it(
    sites: Callable[..., Site], tmp_path: Path
) -> None:
    site = sites(grace=1.0, recovery_beside=False)
    recovery, dispatcher = site.engine.installation.recovery, site.engine.installation.dispatcher
    path = tmp_path / "x"
    with site.worker(concurrency=1, name="busy"):
        busy = site.engine.execute_workflow(workflow(task("t", "site.wait_for_file", params={"path": str(path)})))
        site.until_running(busy, "t")
        started = [site.engine.execute_workflow(workflow(task("t"))) for _ in range(50)]
        fetched = int(site.settings.broker_url.startswith("amqp"))
        site.until(lambda: dispatcher.waiting() == 50 - fetched)
        site.until(lambda: len(due(site)) == 50)
        assert recovery.run_once() == Recovered(published=fetched)
        assert recovery.run_once() == Recovered()
        assert dispatcher.waiting() == 50
        with site.worker(concurrency=1, name="idle"):
            done = [site.engine.wait(e, 60).tasks["t"] for e in started]
            assert {str(t.worker).partition("@")[0] for t in done} == {"idle"}
            assert {t.attempt for t in done} == {1}
            path.touch()
            assert site.engine.wait(busy, 60).tasks["t"].attempt == 1


def test_broker_that_is_down_delays_what_is_submitted_and_what_runs_and_loses_nothing(
    servers: Servers, sites: Callable[..., Site], tmp_path: Path
) -> None:
    path = tmp_path / "x"
    with line(servers.broker_url) as broker:
        site = sites(broker_url=broker.url, grace=1.0)
        broker.cut()
        first = site.engine.execute_workflow(
            workflow(task("t", "site.wait_for_file", params={"path": str(path)}), task("next", after=("t",)))
        )
        assert site.engine.get_execution(first).status is ExecutionStatus.PENDING
        broker.mend()
        with site.worker(concurrency=1):
            site.until_running(first, "t")
            broker.cut()  # everybody's connection breaks, the engine's and the worker's
            path.touch()
            second = site.engine.execute_workflow(workflow(task("a"), task("b", after=("a",))))
            site.until(lambda: site.task(first, "t").status is SUCCESS)
            broker.mend()
            third = site.engine.execute_workflow(workflow(task("a"), task("b", after=("a",))))
            for execution_id in (first, second, third):
                done = site.engine.wait(execution_id, 60)
                assert [(t.status, t.attempt) for t in done.tasks.values()] == [(SUCCESS, 1), (SUCCESS, 1)]


def test_database_lost_while_a_task_runs_loses_neither_it_nor_what_follows(
    sites: Callable[..., Site], tmp_path: Path
) -> None:
    site = sites(grace=1.0, lease=60.0)
    path = tmp_path / "x"
    assert site.settings.database_url
    with line(site.settings.database_url) as database, site.worker(
        concurrency=1, env={"PIPELINE_DATABASE_URL": database.url}
    ):
        started = site.engine.execute_workflow(
            workflow(task("t", "site.wait_for_file", params={"path": str(path)}), task("next", after=("t",)))
        )
        site.until_running(started, "t")
        database.cut()
        path.touch()
        site.until(lambda: "trying again" in site.log("worker"))
        assert site.task(started, "t").status is TaskStatus.RUNNING
        database.mend()
        done = site.engine.wait(started, 60)
        assert [(t.status, t.attempt) for t in done.tasks.values()] == [(SUCCESS, 1), (SUCCESS, 1)]
        # the attendant hears of cancellations again
        path.unlink()
        started = site.engine.execute_workflow(workflow(task("t", "site.wait_for_file", params={"path": str(path)})))
        site.until_running(started, "t")
        site.engine.cancel(started)
        assert site.engine.wait(started, 60).status is ExecutionStatus.CANCELLED


def test_submission_inside_a_transaction_exists_only_once_that_commits(prefork_site: Site) -> None:
    definition = workflow(task("a"), task("b", after=("a",)))
    with psycopg.connect(prefork_site.settings.database_url) as connection:
        gone = prefork_site.engine.execute_workflow(definition, connection=connection)
        connection.rollback()
        kept = prefork_site.engine.execute_workflow(definition, connection=connection)
        with pytest.raises(ExecutionNotFound):
            prefork_site.engine.get_execution(kept)
        connection.commit()
    with pytest.raises(ExecutionNotFound):
        prefork_site.engine.get_execution(gone)
    assert prefork_site.engine.wait(kept, 60).status is ExecutionStatus.SUCCESS


def test_paused_execution_finishes_what_runs_and_starts_nothing_until_it_is_resumed(busy_site: Site, tmp_path: Path) -> None:
    path = tmp_path / "x"
    started = busy_site.engine.execute_workflow(
        workflow(task("t", "site.wait_for_file", params={"path": str(path)}), task("next", after=("t",)))
    )
    busy_site.until_running(started, "t")
    busy_site.engine.pause(started)
    path.touch()
    busy_site.until(lambda: busy_site.task(started, "t").status is SUCCESS)
    busy_site.run(workflow(task("later")))  # its message came after that of `next`
    found = busy_site.engine.get_execution(started)
    assert (found.status, found.paused, found.tasks["next"].status) == (ExecutionStatus.RUNNING, True, PENDING)
    assert found.tasks["next"].attempt == 0
    busy_site.engine.resume(started)
    assert busy_site.engine.wait(started, 60).status is ExecutionStatus.SUCCESS


def test_retry_of_a_failed_execution_runs_what_did_not_succeed(busy_site: Site) -> None:
    done = busy_site.run(
        workflow(
            task("good", "site.context"),
            task("bad", "site.fail_until", ("good",), params={"attempt": 2}, retry_policy=NO_RETRY),
            task("next", after=("bad",)),
        )
    )
    assert done.status is ExecutionStatus.FAILED
    with pytest.raises(IllegalTransition, match="resume is not possible"):
        busy_site.engine.resume(done.execution_id)
    busy_site.engine.retry(done.execution_id)
    again = busy_site.engine.wait(done.execution_id, 60)
    assert again.status is ExecutionStatus.SUCCESS
    assert again.run == 2
    assert again.tasks["good"] == done.tasks["good"]
    assert [t.attempt for t in again.tasks.values()] == [1, 2, 1]
    (before,) = busy_site.engine.get_attempts(done.execution_id, "bad")
    assert (before.outcome, before.error_message) == ("failed", "attempt 1 is too early")
    with pytest.raises(IllegalTransition, match="is success"):
        busy_site.engine.retry(done.execution_id)


def test_recovery_that_dies_beside_a_worker_is_started_again(sites: Callable[..., Site]) -> None:
    site = sites(grace=1.0)
    with site.worker(concurrency=1) as worker:
        site.until(lambda: recoveries(worker.pid))
        (process,) = recoveries(worker.pid)
        process.kill()
        site.until(lambda: recoveries(worker.pid) not in ([], [process]))
        assert "recovery ended with code -9; starting it again" in site.log("worker")
        with psycopg.connect(site.settings.database_url) as connection:
            started = site.engine.execute_workflow(workflow(task("t")), connection=connection)
        assert site.engine.wait(started, 60).status is ExecutionStatus.SUCCESS
        (process,) = recoveries(worker.pid)
        end(worker)
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def recoveries(pid: int) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):
            if "scheduler" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found
