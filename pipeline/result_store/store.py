"""RECORD: the store as one thing."""

from __future__ import annotations

from typing import Any, Self

import psycopg

from pipeline.errors import InputError, Problem
from pipeline.result_store import rows
from pipeline.result_store.attempts import Attempts
from pipeline.result_store.connection import Borrowed, Connection, Database, Listener
from pipeline.result_store.definitions import Definitions
from pipeline.result_store.executions import Executions
from pipeline.result_store.fleet import Fleet


class ResultStore(Definitions, Executions, Attempts, Fleet):
    """What the engine asks of Postgres, one method per statement."""

    @classmethod
    def open(
        cls, url: str, *, patience: float = 0.0, keep_plans: bool = False, name: str = "chordal", **options: Any
    ) -> Self:  # fmt: skip
        """A store with connections of its own; see `Database` for `patience` and `keep_plans`, `Door` for the options."""
        return cls(Database(url, patience=patience, keep_plans=keep_plans, name=name), url=url, **options)

    def within(self, connection: Connection) -> ResultStore:
        """The same store inside a caller's transaction.

        Raises:
            InputError: it is no connection of psycopg 3.
        """
        if not isinstance(connection, psycopg.Connection):
            what, how = f"is a {type(connection).__name__}, not a connection of psycopg 3", "give what psycopg.connect returns"
            raise InputError((Problem(path="connection", what=what, how=how),))
        return ResultStore(
            Borrowed(connection), url=self.url,
            grace=0.0,  # nobody publishes after the caller's commit: recovery does, at its next look
            hard_limit=self.hard_limit.total_seconds(), loss_budget=self.loss_budget,
        )  # fmt: skip

    def impatient(self) -> ResultStore:
        """The same store with connections of its own, for callers who would rather hear of an outage than wait."""
        return ResultStore(
            Database(self.url), url=self.url, grace=self.grace.total_seconds(),
            hard_limit=self.hard_limit.total_seconds(), loss_budget=self.loss_budget,
        )  # fmt: skip

    def close(self) -> None:
        """Close the store's own connections."""
        if isinstance(self.link, Database):
            self.link.close()

    def listen(self, channel: str) -> Listener:
        """Hear `pipeline_finished` or `pipeline_stop`: payloads are execution ids."""
        return Listener(self.url, channel)

    def audit(self) -> list[rows.Violation]:
        """Every violated invariant; empty where all is well."""
        return self._all("audit", rows.Violation)
