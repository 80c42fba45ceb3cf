"""RECORD: how the methods of the store run their statements."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from psycopg.types.json import Jsonb

from pipeline.result_store import rows
from pipeline.result_store.connection import Link
from pipeline.result_store.statements import statements

T = TypeVar("T")


class Door:
    """Statements by name over a link to Postgres.

    Args:
        link: where they run.
        url: of the database, for listeners.
        grace: seconds that a published task may wait before it is looked at again.
        hard_limit: seconds between a task's timeout and its being given up.
        loss_budget: times that a task may lose its worker before it fails.
    """

    def __init__(
        self, link: Link, *, url: str = "", grace: float = 10.0, hard_limit: float = 10.0, loss_budget: int = 5
    ) -> None:
        self.link, self.url = link, url
        self.grace = timedelta(seconds=grace)
        self.hard_limit = timedelta(seconds=hard_limit)
        self.loss_budget = loss_budget

    def _all(self, name: str, row: type[T], /, **parameters: Any) -> list[T]:
        return self.link.fetch(statements()[name], row, parameters)

    def _one(self, name: str, row: type[T], /, **parameters: Any) -> T | None:
        found = self._all(name, row, **parameters)
        return found[0] if found else None


@dataclass(frozen=True, kw_only=True)
class Count:
    """A statement's only number."""

    count: int


@dataclass(frozen=True, kw_only=True)
class ReadyRow:
    """One of the tasks that a statement made ready; empty where it made none."""

    execution_id: str | None
    task_id: str | None
    epoch: int | None
    handler: str | None
    timeout: float | None
    led_by: str | None


@dataclass(frozen=True, kw_only=True)
class EndedRow(ReadyRow):
    """An outcome beside one of the tasks that it made ready."""

    outcome: str
    changed: bool = True


@dataclass(frozen=True, kw_only=True)
class CompletedRow(EndedRow):
    """The same of a success, and what was claimed after it."""

    next_definition: int | None
    next_task: str | None
    next_handler: str | None
    next_epoch: int | None
    next_attempt: int | None
    next_retries: int | None
    next_params: dict[str, Any] | None
    next_results: dict[str, Any] | None


def ended_of(found: Sequence[EndedRow], claimed: rows.Claim | None = None) -> rows.Ended:
    """The outcome with all tasks that it made ready."""
    return rows.Ended(outcome=found[0].outcome, changed=found[0].changed, ready=ready_of(found), next=claimed)


def ready_of(found: Sequence[ReadyRow]) -> tuple[rows.ReadyTask, ...]:
    """The tasks that a statement made ready."""
    return tuple(
        rows.ReadyTask(
            execution_id=r.execution_id, task_id=r.task_id, epoch=r.epoch, handler=r.handler, timeout=r.timeout,
            led_by=r.led_by,
        )
        for r in found
        if r.execution_id is not None and r.task_id is not None and r.epoch is not None
        and r.handler is not None and r.timeout is not None
    )  # fmt: skip


def claimed_of(row: CompletedRow) -> rows.Claim | None:
    """What was claimed after a success."""
    if (
        row.next_definition is None or row.next_task is None or row.next_handler is None or row.next_epoch is None
        or row.next_attempt is None or row.next_retries is None
    ):  # fmt: skip
        return None
    return rows.Claim(
        definition_id=row.next_definition, task_id=row.next_task, handler=row.next_handler, epoch=row.next_epoch,
        attempt=row.next_attempt, retries=row.next_retries, params=row.next_params, results=row.next_results,
    )  # fmt: skip


def fence_of(fence: rows.Fence) -> dict[str, Any]:
    """A fence as parameters."""
    return {
        "execution_id": fence.execution_id,
        "task_id": fence.task_id,
        "epoch": fence.epoch,
        "worker_id": fence.worker_id,
    }


def jsonb(value: Any) -> Jsonb:
    """A JSON value as a parameter."""
    return Jsonb(value, dumps=lambda data: json.dumps(data, ensure_ascii=False, allow_nan=False))
