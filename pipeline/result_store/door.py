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
    #: of a success: what was claimed after it
    next: dict[str, Any] | None = None


def ended_of(found: Sequence[EndedRow]) -> rows.Ended:
    """The outcome with all tasks that it made ready."""
    first = found[0]
    return rows.Ended(
        outcome=first.outcome, changed=first.changed, ready=ready_of(found),
        next=None if first.next is None else rows.Claim(**first.next),
    )  # fmt: skip


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
