"""RECORD: how the methods of the store run their statements."""

from __future__ import annotations

import json
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
