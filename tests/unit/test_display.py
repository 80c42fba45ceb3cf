"""How executions look: tables for people, lines for pipes."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import pytest
from rich.console import Console, RenderableType

from pipeline.display import execution_table, execution_view, headline, task_table, watch
from pipeline.errors import DatabaseUnavailable, SchemaMismatch, WaitTimeout
from pipeline.observe import Execution
from pipeline.result_store.rows import ExecutionSummary, TaskExecution
from pipeline.states import ExecutionStatus, TaskStatus

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def task(name: str, status: str = "pending", **more: Any) -> TaskExecution:
    done = status in ("success", "failed")
    values = {
        "handler": "debug.noop", "epoch": 1, "attempt": 0 if status == "pending" else 1, "retries": 0, "losses": 0,
        "ready_at": None, "started_at": NOW, "finished_at": NOW + timedelta(seconds=1.234) if done else None,
        "progress": None, "progress_message": None, "result": None, "error_type": None, "error_message": None,
        "error_traceback": None, "retry_at": None, "worker": None, "unserved": False,
    }  # fmt: skip
    return TaskExecution(task_id=name, status=TaskStatus(status), **{**values, **more})


def execution(*tasks: TaskExecution, status: str = "running", **more: Any) -> Execution:
    values = {
        "workflow_id": "w", "version": "1", "digest": "", "verdict": None, "paused": False, "run": 1, "created_by": None,
        "idempotency_key": None, "error_message": None, "created_at": NOW, "started_at": None, "finished_at": None,
        "input_data": {}, "variables": {},
    }  # fmt: skip
    found = MappingProxyType({t.task_id: t for t in tasks})
    return Execution(execution_id="exec-1", status=ExecutionStatus(status), tasks=found, **{**values, **more})


def shown(view: RenderableType, width: int = 200) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(view)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


class Engine:
    """Gives one picture after the other; an exception is raised in place of one."""

    def __init__(self, *pictures: Execution | Exception) -> None:
        self.pictures = list(pictures)
        self.waits: list[float] = []

    def get_execution(self, execution_id: str) -> Execution:
        picture = self.pictures.pop(0)
        if isinstance(picture, Exception):
            raise picture
        return picture

    def wait(self, execution_id: str, timeout: float) -> None:
        self.waits.append(timeout)
        raise WaitTimeout(execution_id, timeout)


def watched(engine: Any, *, terminal: bool = False, timeout: float | None = None) -> tuple[Execution, str]:
    stream = io.StringIO()
    console = Console(file=stream, width=100, height=40, force_terminal=terminal)
    return watch(engine, "exec-1", console, timeout), stream.getvalue()


@pytest.fixture(autouse=True)
def _no_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.display.time.sleep", lambda seconds: None)


def test_table_of_tasks_has_state_attempt_seconds_and_the_first_line_of_the_error() -> None:
    lines = shown(task_table([
        task("a", "success"), task("b", "failed", attempt=3, error_message="boom\nat length", losses=2),
        task("c", "running", progress=41.6, progress_message="half way"), task("d"),
    ]))  # fmt: skip
    assert [line.split() for line in lines] == [
        ["task", "handler", "status", "attempt", "seconds"],
        ["a", "debug.noop", "success", "1", "1.23"],
        ["b", "debug.noop", "failed", "3", "1.23", "boom,", "lost", "its", "worker", "2", "times"],
        ["c", "debug.noop", "running", "1", "42", "%", "half", "way"],
        ["d", "debug.noop", "pending"],
    ]


def test_table_of_many_tasks_shows_what_tells_most_in_order() -> None:
    tasks = [task(f"t{n}", "success") for n in range(8)] + [task("ran", "running"), task("fell", "failed"), task("waits")]
    names = [line.split()[0] for line in shown(task_table(tasks, limit=4))[1:]]
    assert names == ["t0", "t1", "ran", "fell", "and"]


def test_text_of_tasks_is_never_taken_for_markup() -> None:
    assert "[red]boom[/red] [/]" in "\n".join(shown(task_table([task("a", "failed", error_message="[red]boom[/red] [/]")])))
    assert "[/]" in "\n".join(shown(execution_view(execution(error_message="[/]"))))


def test_headline_counts_tasks_and_tells_pause_and_error() -> None:
    seen = execution(task("a", "success"), task("b", "failed"), task("c", "success"), status="failed", error_message="boom")
    assert headline(seen) == "exec-1 w@1 failed (1 failed, 2 success): boom"
    assert headline(execution(task("a"), paused=True)) == "exec-1 w@1 running, paused (1 pending)"


def test_list_has_a_line_for_each_execution_with_the_first_line_of_its_error() -> None:
    row = ExecutionSummary(
        execution_id="exec-1", workflow_id="w", version="1", status=ExecutionStatus.FAILED, paused=True, created_by="ana",
        error_message="boom [x]\nat length", created_at=NOW, started_at=None, finished_at=None, tasks=5, ended=2,
    )  # fmt: skip
    assert shown(execution_table([row]))[1:] == [
        "exec-1     w@1       failed (paused)  2/5    ana   2026-01-02 03:04:05Z  boom [x]"
    ]


def test_watch_in_a_pipe_has_a_line_for_each_change_and_ends_with_the_execution() -> None:
    engine = Engine(
        execution(task("a"), task("b")),
        execution(task("a", "running"), task("b")),
        execution(task("a", "running"), task("b")),
        execution(task("a", "success"), task("b", "failed", error_message="y" * 150), status="failed"),
    )
    seen, text = watched(engine)
    assert seen.status is ExecutionStatus.FAILED
    assert text.splitlines() == ["a: running", "a: success in 1.23 s", f"b: failed in 1.23 s ({'y' * 150})"]


def test_watch_on_a_terminal_draws_pictures_and_leaves_none() -> None:
    engine = Engine(execution(task("a", "running")), execution(task("a", "success"), status="success"))
    seen, text = watched(engine, terminal=True)
    assert seen.ended
    assert "exec-1 w@1 running" in text and "success" in text
    assert "\x1b[2K" in text.rpartition("success")[2]  # wiped: the caller shows the end
    assert text.rpartition("\x1b[?25")[2].startswith("h")  # the cursor is back


def test_watch_gives_up_when_its_time_is_over_but_looks_once() -> None:
    with pytest.raises(WaitTimeout, match="had not ended after 0 s"):
        watched(Engine(execution(task("a"))), timeout=0)
    assert watched(Engine(execution(status="success")), timeout=0)[0].ended


def test_watch_waits_out_an_outage_of_the_database_after_the_first_look() -> None:
    gone = DatabaseUnavailable("gone")
    engine = Engine(execution(task("a")), gone, gone, execution(task("a", "success"), status="success"))
    assert watched(engine)[0].ended
    with pytest.raises(DatabaseUnavailable):
        watched(Engine(gone))
    with pytest.raises(SchemaMismatch):
        watched(Engine(execution(task("a")), SchemaMismatch("another")))
