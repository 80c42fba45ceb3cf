"""OBSERVE, in a terminal: tables of executions and tasks, live where there is a terminal, plain lines where not."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.engine import WorkflowEngine
from pipeline.errors import DatabaseUnavailable, SchemaMismatch, WaitTimeout
from pipeline.observe import Execution, duration
from pipeline.result_store.rows import ExecutionSummary, TaskExecution
from pipeline.states import ExecutionStatus, TaskStatus

_COLOURS = {
    "pending": "dim", "running": "cyan", "retry": "yellow", "success": "green", "failed": "bold red",
    "skipped": "dim yellow", "cancelled": "magenta",
}  # fmt: skip
#: tasks that a live table shows at a time
_ROWS = 30
#: seconds between two pictures of a live table
_REFRESH = 0.5
#: a picture of a large execution takes its time: no more than this part of ours goes into pictures
_SHARE = 0.25
#: how much of an error a table shows
_ERROR_LENGTH = 200


def task_table(tasks: Iterable[TaskExecution], *, limit: int | None = None) -> Table:
    """One row for each task: state, attempts, how long, and what there is to say."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("task", "left"), ("handler", "left"), ("status", "left"), ("attempt", "right"), ("seconds", "right"), ("", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    rows = list(tasks)
    shown = rows if limit is None or len(rows) <= limit else _most_telling(rows, limit)
    for task in shown:
        seconds = duration(task)
        table.add_row(
            task.task_id, Text(task.handler, style="dim"), _status(task.status), str(task.attempt or ""),
            "" if seconds is None else f"{seconds:.2f}", Text(_remark(task), style="dim"),
        )  # fmt: skip
    if len(shown) < len(rows):
        table.add_row(Text(f"and {len(rows) - len(shown)} more", style="dim"))
    return table


def execution_view(execution: Execution, *, limit: int | None = None) -> RenderableType:
    """An execution with its tasks."""
    return Group(Text(headline(execution), style="bold"), task_table(execution.tasks.values(), limit=limit))


def headline(execution: Execution) -> str:
    """One line on an execution."""
    counts = ", ".join(f"{count} {status}" for status, count in sorted(execution.counts.items()))
    paused = ", paused" if execution.paused else ""
    error = f": {execution.error_message}" if execution.error_message else ""
    return f"{execution.execution_id} {execution.workflow_id}@{execution.version} {execution.status}{paused} ({counts}){error}"


def execution_table(executions: Iterable[ExecutionSummary]) -> Table:
    """One row for each execution."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("execution", "workflow", "status", "tasks", "user", "created", "error"):
        table.add_column(name, overflow="fold")
    for row in executions:
        table.add_row(
            row.execution_id, f"{row.workflow_id}@{row.version}", _status(row.status, paused=row.paused),
            f"{row.ended}/{row.tasks}", row.created_by or "", f"{row.created_at:%Y-%m-%d %H:%M:%S}Z",
            Text(_first_line(row.error_message), style="dim"),
        )  # fmt: skip
    return table


def watch(engine: WorkflowEngine, execution_id: str, console: Console, timeout: float | None = None) -> Execution:
    """Show an execution until it ended; its end is left to the caller to show.

    Raises:
        WaitTimeout: it had not ended after `timeout` seconds.
    """
    pictures = _pictures(engine, execution_id, timeout)
    return _watch_live(pictures, console) if console.is_terminal else _watch_plain(pictures, console)


def _watch_live(pictures: Iterator[Execution], console: Console) -> Execution:
    with Live(console=console, auto_refresh=False, transient=True, redirect_stderr=False) as live:
        for execution in pictures:
            rows = max(5, min(_ROWS, console.size.height - 4))
            live.update(execution_view(execution, limit=rows), refresh=True)
    return execution


def _watch_plain(pictures: Iterator[Execution], console: Console) -> Execution:
    seen: dict[str, tuple[TaskStatus, int, bool]] = {}
    for execution in pictures:
        for task in execution.tasks.values():
            state = (task.status, task.attempt, task.unserved)
            if seen.get(task.task_id, (TaskStatus.PENDING, 0, False)) != state:
                seconds = duration(task)
                took = f" in {seconds:.2f} s" if seconds is not None else ""
                remark = _remark(task)
                line = f"{task.task_id}: {task.status}{took}{f' ({remark})' if remark else ''}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            seen[task.task_id] = state
    return execution


def _pictures(engine: WorkflowEngine, execution_id: str, timeout: float | None) -> Iterator[Execution]:
    """An execution, again and again until it ended; an outage of the database after the first one is waited out."""
    end = float("inf") if timeout is None else time.monotonic() + timeout
    started = time.monotonic()
    execution = engine.get_execution(execution_id)
    while True:
        yield execution
        if execution.ended:
            return
        now = time.monotonic()
        left = end - now
        if left <= 0:
            raise WaitTimeout(execution_id, timeout or 0.0)
        pause = min(max(_REFRESH, (now - started) / _SHARE), left)
        try:
            with suppress(WaitTimeout):
                engine.wait(execution_id, timeout=pause)
            started = time.monotonic()
            execution = engine.get_execution(execution_id)
        except DatabaseUnavailable as exc:
            if isinstance(exc, SchemaMismatch):
                raise
            time.sleep(pause)


def _status(status: TaskStatus | ExecutionStatus, *, paused: bool = False) -> Text:
    return Text(f"{status}{' (paused)' if paused else ''}", style=_COLOURS[status.value])


def _remark(task: TaskExecution) -> str:
    """The one thing to say of a task: its error, or how far it is."""
    if task.unserved:
        return f"no running worker has the handler {task.handler}: start one with PIPELINE_HANDLERS naming its module"
    if task.error_message:  # of a success: who marked it so
        lost = f", lost its worker {task.losses} times" if task.losses else ""
        return _first_line(task.error_message) + lost
    if task.status is TaskStatus.RUNNING and task.progress is not None:
        return f"{task.progress:.0f} % {task.progress_message or ''}".strip()
    return ""


def _first_line(text: str | None) -> str:
    return next(iter((text or "").splitlines()), "")[:_ERROR_LENGTH]


def _most_telling(tasks: list[TaskExecution], limit: int) -> list[TaskExecution]:
    """What runs or went wrong comes before what ended well, and that before what waits; order is kept."""
    rank = {TaskStatus.RUNNING: 0, TaskStatus.FAILED: 0, TaskStatus.RETRY: 1, TaskStatus.SUCCESS: 2}
    chosen = sorted(range(len(tasks)), key=lambda i: (rank.get(tasks[i].status, 3), i))[:limit]
    return [tasks[i] for i in sorted(chosen)]


def say(text: str) -> None:
    """A line for the person at the terminal, beside what standard output is for."""
    print(text, file=sys.stderr, flush=True)
