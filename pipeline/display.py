"""OBSERVE, in a terminal: tables of executions and tasks, live where there is a terminal, plain lines where not."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.engine import WorkflowEngine
from pipeline.errors import WaitTimeout
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
            Text(row.error_message or "", style="dim"),
        )  # fmt: skip
    return table


def watch(engine: WorkflowEngine, execution_id: str, console: Console, timeout: float | None = None) -> Execution:
    """Show an execution until it ended.

    Raises:
        WaitTimeout: it had not ended after `timeout` seconds.
    """
    end = float("inf") if timeout is None else time.monotonic() + timeout
    if console.is_terminal:
        return _watch_live(engine, execution_id, console, end, timeout)
    return _watch_plain(engine, execution_id, console, end, timeout)


def _watch_live(
    engine: WorkflowEngine, execution_id: str, console: Console, end: float, timeout: float | None
) -> Execution:
    with Live(console=console, auto_refresh=False, transient=True, redirect_stderr=False) as live:
        while True:
            execution = engine.get_execution(execution_id)
            live.update(execution_view(execution, limit=_ROWS), refresh=True)
            if _over(engine, execution, end, timeout):
                return engine.get_execution(execution_id)


def _watch_plain(
    engine: WorkflowEngine, execution_id: str, console: Console, end: float, timeout: float | None
) -> Execution:
    seen: dict[str, tuple[TaskStatus, int]] = {}
    while True:
        execution = engine.get_execution(execution_id)
        for task in execution.tasks.values():
            state = (task.status, task.attempt)
            if seen.get(task.task_id, (TaskStatus.PENDING, 0)) != state:
                seconds = duration(task)
                took = f" in {seconds:.2f} s" if seconds is not None else ""
                remark = _remark(task)
                console.print(f"{task.task_id}: {task.status}{took}{f' ({remark})' if remark else ''}", markup=False, highlight=False)
            seen[task.task_id] = state
        if execution.ended:
            console.print(headline(execution), markup=False, highlight=False)
        if _over(engine, execution, end, timeout):
            return execution


def _over(engine: WorkflowEngine, execution: Execution, end: float, timeout: float | None) -> bool:
    """Whether it ended; waits until it did or the next picture is due."""
    if execution.ended:
        return True
    left = end - time.monotonic()
    if left <= 0:
        raise WaitTimeout(execution.execution_id, timeout or 0.0)
    try:
        engine.wait(execution.execution_id, timeout=min(_REFRESH, left))
    except WaitTimeout:
        pass
    return False


def _status(status: TaskStatus | ExecutionStatus, *, paused: bool = False) -> Text:
    return Text(f"{status}{' (paused)' if paused else ''}", style=_COLOURS[status.value])


def _remark(task: TaskExecution) -> str:
    """The one thing to say of a task: its error, or how far it is."""
    if task.error_message and task.status is not TaskStatus.SUCCESS:
        lost = f", lost its worker {task.losses} times" if task.losses else ""
        return task.error_message.splitlines()[0][:200] + lost
    if task.status is TaskStatus.RUNNING and task.progress is not None:
        return f"{task.progress:.0f} % {task.progress_message or ''}".strip()
    return ""


def _most_telling(tasks: list[TaskExecution], limit: int) -> list[TaskExecution]:
    """What runs or went wrong comes before what ended well, and that before what waits; order is kept."""
    rank = {TaskStatus.RUNNING: 0, TaskStatus.FAILED: 0, TaskStatus.RETRY: 1, TaskStatus.SUCCESS: 2}
    chosen = sorted(range(len(tasks)), key=lambda i: (rank.get(tasks[i].status, 3), i))[:limit]
    return [tasks[i] for i in sorted(chosen)]
