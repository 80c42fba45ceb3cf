"""Tasks as Celery's own AsyncResult shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult

from pipeline.result_store.connection import Database
from pipeline.states import TaskStatus
from tests.conftest import NO_RETRY, Site, task, workflow


def result_of(site: Site, execution_id: str, task_id: str = "t") -> AsyncResult:
    return site.engine.installation.celery.AsyncResult(f"{execution_id}_{task_id}")


def test_result_of_a_success_is_what_the_handler_returned(prefork_site: Site) -> None:
    done = prefork_site.run(workflow(task("t", "site.add", params={"a": 1})))
    found = result_of(prefork_site, done.execution_id)
    assert (found.state, found.result, found.get(timeout=60)) == ("SUCCESS", 2, 2)
    assert found.successful()
    assert found.date_done == done.tasks["t"].finished_at


def test_result_of_a_success_in_an_execution_that_goes_on_is_shown_once_it_is_on_disk(
    prefork_site: Site, tmp_path: Path
) -> None:  # fmt: skip
    site = prefork_site
    started = site.engine.execute_workflow(
        workflow(task("t"), task("late", "site.wait_for_file", params={"path": str(tmp_path / "x")}))
    )
    site.until(lambda: site.task(started, "t").status is TaskStatus.SUCCESS)
    site.until_running(started, "late")

    def locked_by() -> Any:
        """The last transaction that locked the row; to lock it is to write to the WAL, and to wait for that."""
        link = site.engine.installation.store.link
        assert isinstance(link, Database)
        query = b"SELECT xmax::text FROM pipeline.task_executions WHERE execution_id = %s AND task_id = 't'"
        return link.connection.execute(query, [started]).fetchone()

    before = locked_by()
    assert result_of(site, started).state == "SUCCESS"
    assert (settled := locked_by()) != before
    (tmp_path / "x").touch()
    site.engine.wait(started, 60)
    assert result_of(site, started).state == "SUCCESS"
    assert locked_by() == settled, "all is on disk where the execution has ended"


def test_result_of_a_failure_is_an_exception_with_its_message_and_traceback(prefork_site: Site) -> None:
    done = prefork_site.run(workflow(task("t", "debug.fail", params={"message": "broken"}, retry_policy=NO_RETRY)))
    found = result_of(prefork_site, done.execution_id)
    assert found.state == "FAILURE"
    assert found.failed()
    assert (type(found.result).__name__, str(found.result)) == ("RuntimeError", "broken")
    assert "in fail" in found.traceback
    with pytest.raises(Exception, match="broken"):
        found.get(timeout=60)


def test_result_of_a_running_and_of_a_cancelled_task(prefork_site: Site, tmp_path: Path) -> None:
    started = prefork_site.engine.execute_workflow(
        workflow(task("t", "site.wait_for_file", params={"path": str(tmp_path / "x")}), task("next", after=("t",)))
    )
    prefork_site.until_running(started, "t")
    assert result_of(prefork_site, started).state == "STARTED"
    assert result_of(prefork_site, started, "next").state == "PENDING"
    prefork_site.engine.cancel(started)
    prefork_site.engine.wait(started, 60)
    for task_id in ("t", "next"):
        found = result_of(prefork_site, started, task_id)
        assert found.state == "REVOKED"
        with pytest.raises(TaskRevokedError, match="cancelled"):
            found.get(timeout=60)


def test_result_of_a_task_that_waits_for_its_retry(prefork_site: Site) -> None:
    started = prefork_site.engine.execute_workflow(workflow(task("t", "site.retry_after", params={"seconds": 3600})))
    prefork_site.until(lambda: result_of(prefork_site, started).state == "RETRY")
    assert str(result_of(prefork_site, started).result) == "not yet"
    prefork_site.engine.cancel(started)


def test_result_of_a_skipped_task_does_not_keep_its_waiter(prefork_site: Site) -> None:
    done = prefork_site.run(workflow(task("t", "site.skip", params={"reason": "no data"})))
    with pytest.raises(TaskRevokedError, match="no data"):
        result_of(prefork_site, done.execution_id).get(timeout=60)


@pytest.mark.parametrize("task_id", ["unknown", "exec-0123456789ab_t", "exec-0123456789ab", "_", "è" * 300])
def test_result_of_an_unknown_task_is_pending(prefork_site: Site, task_id: str) -> None:
    found = prefork_site.engine.installation.celery.AsyncResult(task_id)
    assert (found.state, found.result) == ("PENDING", None)
