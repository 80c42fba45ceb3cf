"""How attempts fail, what is recorded of them, and what is tried again: on real workers of both pools."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg import sql

from pipeline.execution import recordable
from pipeline.redaction import Redactor
from pipeline.result_store.rows import AttemptRow, TaskExecution
from pipeline.states import ExecutionStatus, TaskStatus
from tests.conftest import NO_RETRY, SOON, Site, task, workflow

FAILED, SUCCESS = TaskStatus.FAILED, TaskStatus.SUCCESS


def ended(site: Site, handler: str, **more: Any) -> tuple[TaskExecution, list[AttemptRow]]:
    """The only task of a workflow once it ended, and its attempts before the last."""
    done = site.run(workflow(task("t", handler, **more)))
    assert done.status is (ExecutionStatus.SUCCESS if done.tasks["t"].status is SUCCESS else ExecutionStatus.FAILED)
    return done.tasks["t"], site.engine.get_attempts(done.execution_id, "t")


def test_failed_task_keeps_type_message_traceback_and_attempt(busy_site: Site) -> None:
    found, before = ended(busy_site, "debug.fail", params={"message": "of no use"}, retry_policy=NO_RETRY)
    assert (found.status, found.attempt, found.retries, before) == (FAILED, 1, 0, [])
    assert (found.error_type, found.error_message) == ("RuntimeError", "of no use")
    assert found.error_traceback.startswith("Traceback (most recent call last):")
    assert "in fail\n    raise RuntimeError(message)" in found.error_traceback
    assert found.error_traceback.endswith("RuntimeError: of no use\n")
    assert found.result is None


def test_failed_task_is_retried_until_it_succeeds_and_every_attempt_is_kept(busy_site: Site) -> None:
    found, before = ended(busy_site, "site.fail_until", params={"attempt": 3}, retry_policy=SOON)
    assert (found.status, found.result, found.attempt, found.retries) == (SUCCESS, 3, 3, 2)
    assert (found.error_type, found.error_message, found.error_traceback) == (None, None, None)
    assert [(a.attempt, a.outcome, a.error_type, a.error_message) for a in before] == [
        (1, "retry", "RuntimeError", "attempt 1 is too early"), (2, "retry", "RuntimeError", "attempt 2 is too early"),
    ]  # fmt: skip
    assert all("in fail_until" in a.error_traceback and a.worker == found.worker for a in before)
    assert all(a.started_at <= a.ended_at for a in before)
    assert before[0].ended_at <= before[1].started_at


def test_task_whose_retries_are_used_up_fails_with_its_last_error(busy_site: Site) -> None:
    found, before = ended(busy_site, "site.fail_until", params={"attempt": 9}, retry_policy={**SOON, "max_retries": 2})
    assert (found.status, found.attempt, found.retries) == (FAILED, 3, 2)
    assert found.error_message == "attempt 3 is too early"
    assert [a.attempt for a in before] == [1, 2]


def test_task_waiting_for_its_retry_says_when_it_is_due_and_why(busy_site: Site) -> None:
    policy = {"max_retries": 1, "backoff": "linear", "jitter": "none"}
    started = busy_site.engine.execute_workflow(
        workflow(task("t", "site.retry_after", params={"seconds": 3600}, retry_policy=policy))
    )
    busy_site.until(lambda: busy_site.task(started, "t").status is TaskStatus.RETRY)
    found = busy_site.task(started, "t")
    assert (found.error_type, found.error_message) == ("Retry", "not yet")
    assert 3590 < (found.retry_at - found.started_at).total_seconds() < 3700
    busy_site.engine.cancel(started)
    assert busy_site.engine.wait(started, 60).tasks["t"].status is TaskStatus.CANCELLED


def test_retry_raised_by_the_handler_is_run_again_after_its_delay(busy_site: Site) -> None:
    found, before = ended(busy_site, "site.retry_after", params={"seconds": 0.3}, retry_policy=SOON)
    assert (found.status, found.result, found.retries) == (SUCCESS, 2, 1)
    assert (found.started_at - before[0].ended_at).total_seconds() >= 0.3


def test_retry_raised_by_the_handler_counts_against_the_policy(busy_site: Site) -> None:
    found, _ = ended(busy_site, "site.retry_after", params={"seconds": 0}, retry_policy=NO_RETRY)
    assert (found.status, found.error_type, found.error_message) == (FAILED, "Retry", "not yet")


def test_fail_is_never_retried(busy_site: Site) -> None:
    found, before = ended(busy_site, "site.give_up", retry_policy=SOON)
    assert (found.status, found.attempt, before) == (FAILED, 1, [])
    assert (found.error_type, found.error_message) == ("Fail", "hopeless")


def test_exception_that_the_handler_does_not_name_is_not_retried(busy_site: Site) -> None:
    found, before = ended(busy_site, "site.only_os_errors", retry_policy=SOON)
    assert (found.status, found.attempt, found.error_type, before) == (FAILED, 1, "KeyError", [])


def test_exception_that_the_handler_names_is_retried(busy_site: Site) -> None:
    found, before = ended(busy_site, "site.only_os_errors", params={"named": True}, retry_policy={**SOON, "max_retries": 1})
    assert (found.status, found.attempt, found.error_type, len(before)) == (FAILED, 2, "FileNotFoundError", 1)


def test_timeout_stops_the_handler_where_it_is_counts_as_failure_and_is_retried(busy_site: Site) -> None:
    found, before = ended(busy_site, "site.spin", timeout=0.2, retry_policy={**SOON, "max_retries": 1})
    assert (found.status, found.attempt, found.retries, len(before)) == (FAILED, 2, 1, 1)
    for attempt in (found, before[0]):
        assert (attempt.error_type, attempt.error_message) == ("TaskTimeout", "ran longer than its timeout of 0.2 s")
        assert "in spin" in attempt.error_traceback


def test_timeout_of_a_handler_bounds_that_of_the_definition(busy_site: Site) -> None:
    found, _ = ended(busy_site, "site.spin_shortly", timeout=300, retry_policy=NO_RETRY)
    assert (found.error_type, found.error_message) == ("TaskTimeout", "ran longer than its timeout of 0.1 s")


def test_timeout_stops_an_async_handler(busy_site: Site, tmp_path: Any) -> None:
    found, _ = ended(
        busy_site, "site.async_wait", params={"path": str(tmp_path / "x")}, timeout=0.5, retry_policy=NO_RETRY
    )
    assert (found.status, found.error_type) == (FAILED, "TaskTimeout")


def test_timeout_of_a_handler_that_looks_at_its_heartbeat_is_a_timeout(busy_site: Site, tmp_path: Any) -> None:
    found, _ = ended(
        busy_site, "site.wait_for_file", params={"path": str(tmp_path / "x")}, timeout=0.5, retry_policy=NO_RETRY
    )
    assert (found.status, found.error_type) == (FAILED, "TaskTimeout")


def test_timeout_of_a_handler_that_then_returns_or_raises_is_a_timeout(busy_site: Site, tmp_path: Any) -> None:
    for handler in ("site.cooperate", "site.clean_up_badly"):
        found, _ = ended(busy_site, handler, params={"path": str(tmp_path / handler)}, timeout=0.5, retry_policy=NO_RETRY)
        assert (found.status, found.error_type, found.result) == (FAILED, "TaskTimeout", None)
    assert "the clean-up failed" in found.error_traceback


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("cancelled", "the handler raised CancelledError('mine')"),
        ("interrupt", "the handler raised KeyboardInterrupt('mine')"),
        ("ignore", "the handler raised Ignore('mine')"),
        ("exit", "the handler raised SystemExit('mine')"),
        ("panic", "the handler raised Panic('mine')"),
    ],
)
def test_handler_that_raises_what_would_end_the_worker_only_fails(busy_site: Site, what: str, said: str) -> None:
    found, _ = ended(busy_site, "site.raise", params={"what": what}, retry_policy=NO_RETRY)
    assert (found.status, found.attempt, found.losses, found.error_type) == (FAILED, 1, 0, "RuntimeError")
    assert said in found.error_message


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("memory", "MemoryError", "mine"),
        ("odd text", "ValueError", "mine: nul  surrogate \\udcff"),
        ("unspeakable", "Unspeakable", "Unspeakable (its message cannot be read)"),
    ],
)
def test_exception_that_is_hard_to_keep_is_recorded(busy_site: Site, what: str, kind: str, said: str) -> None:
    found, before = ended(busy_site, "site.raise", params={"what": what}, retry_policy={**SOON, "max_retries": 1})
    assert (found.status, found.attempt, found.losses) == (FAILED, 2, 0)
    assert (found.error_type, found.error_message) == (before[0].error_type, before[0].error_message) == (kind, said)


def test_handler_that_calls_sys_exit_fails_and_is_retried(busy_site: Site) -> None:
    found, before = ended(busy_site, "site.exit", retry_policy={**SOON, "max_retries": 1})
    assert (found.status, found.attempt, found.losses, before[0].outcome) == (FAILED, 2, 0, "retry")


@pytest.mark.parametrize("what", ["nan", "circle", "surrogate"])
def test_result_that_is_not_json_fails_at_once_and_says_what_to_return(busy_site: Site, what: str) -> None:
    found, before = ended(busy_site, "site.odd_result", params={"what": what}, retry_policy=SOON)
    assert (found.status, found.attempt, found.error_type, before) == (FAILED, 1, "ResultError", [])
    assert "that is not JSON" in found.error_message
    assert "return dicts, lists, text, numbers" in found.error_message


def test_result_with_objects_fails_and_names_their_type(busy_site: Site) -> None:
    found, _ = ended(busy_site, "site.return_a_set_of_objects", retry_policy=SOON)
    assert (found.status, found.attempt, found.error_type) == (FAILED, 1, "ResultError")
    assert "the handler returned a dict that is not JSON" in found.error_message


def test_result_with_a_nul_character_fails_and_names_the_way_round(busy_site: Site) -> None:
    found, _ = ended(busy_site, "site.odd_result", params={"what": "nul"}, retry_policy=SOON)
    assert (found.attempt, found.error_type) == (1, "ResultError")
    assert "NUL character" in found.error_message
    assert "context.artifacts" in found.error_message


def test_result_above_the_limit_fails_and_names_setting_and_artifacts(busy_site: Site) -> None:
    found, _ = ended(busy_site, "site.return_bytes", params={"size": 4095}, retry_policy=SOON)
    assert (found.attempt, found.error_type) == (1, "ResultError")
    assert found.error_message == (
        "the handler returned 4,097 bytes, the limit is 4,096 (PIPELINE_MAX_RESULT_BYTES);"
        " write the data with context.artifacts and return the reference"
    )
    assert ended(busy_site, "site.return_bytes", params={"size": 4094})[0].result == "x" * 4094


@pytest.mark.parametrize(
    ("what", "result"),
    [("escaped nul", "a\\u0000b"), ("keys", {"1": "one"}), ("date", "2026-01-02"), ("big", 2**80)],
)
def test_result_that_json_can_hold_is_kept(busy_site: Site, what: str, result: Any) -> None:
    assert ended(busy_site, "site.odd_result", params={"what": what})[0].result == result


def test_secret_is_shown_in_no_result_error_log_or_table(busy_site: Site) -> None:
    params = {"token": "{{ secrets.TOKEN }}"}
    found, before = ended(busy_site, "site.secret", params=params, retry_policy=SOON)
    assert found.result == {"sent": "Bearer [secret]", "by": {"[secret]": ["[secret]"]}}
    assert [a.error_message for a in before] == ["rejected [secret]", "not with [secret]"]
    found, _ = ended(busy_site, "site.fail_with_secret", params=params)
    assert found.error_message == "refused [secret]"
    assert "KeyError: '[secret]'" in found.error_traceback

    expected = ("the token is [secret]", "token [secret]", "rejected [secret]", "refused [secret]")
    busy_site.until(lambda: all(said in busy_site.log("worker") for said in expected))
    log = busy_site.log("worker")
    assert "tweet" not in log
    with psycopg.connect(busy_site.settings.database_url) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'pipeline'").fetchall()
        assert len(tables) > 8
        for (table,) in tables:
            for (row,) in connection.execute(
                sql.SQL("SELECT row_to_json(t)::text FROM pipeline.{} t").format(sql.Identifier(table))
            ):
                assert "tweet" not in row, table


def test_number_that_reads_as_a_secret_is_not_shown_and_json_stays_whole() -> None:
    redactor = Redactor.of(["98765", '": "', "abc"])
    found = recordable({"pin": 98765, "text": "198765", "q": 'a": "b', "n": 198765, "short": "abc"}, redactor, 1000)
    assert found == {"pin": "[secret]", "text": "1[secret]", "q": "a[secret]b", "n": 198765, "short": "abc"}
