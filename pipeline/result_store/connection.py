"""The door to Postgres: connections, made after the fork and mended when they break, and errors in our words."""

from __future__ import annotations

import logging
import os
import random
import select
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.rows import class_row, tuple_row

from pipeline.errors import DatabaseUnavailable, SchemaMismatch

T = TypeVar("T")
log = logging.getLogger(__name__)

#: a caller's own connection, of psycopg 3
Connection = psycopg.Connection[Any]

#: set by a statement, for PgBouncer passes no `options` on. Without sequential scans, as all statements ask by keys: a plan
#: that was made while a table was small would read it from end to end for each row, and be kept until the next ANALYZE.
_SESSION = (
    "SET timezone = 'UTC'; SET jit = off; SET statement_timeout = 60000; SET idle_in_transaction_session_timeout = 60000;"
    " SET enable_seqscan = off"
)
#: of partitioned tables Postgres would else make a new plan for each call of a function, at the price of all the rest of it
_KEEP_PLANS = "; SET plan_cache_mode = force_generic_plan"
_TRIES_ON_CONFLICT = 10
#: what a server says that is there and well
_GIVEN_UP = (
    psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure, psycopg.errors.QueryCanceled,
    psycopg.errors.ProgramLimitExceeded,
)  # fmt: skip


class Link(Protocol):
    """Something that runs a statement and gives its rows."""

    def fetch(self, statement: str, row: type[T], parameters: Mapping[str, Any]) -> list[T]:
        """Run one statement; each row becomes a `row`."""
        ...

    def transaction(self) -> AbstractContextManager[None]:
        """Statements inside are one transaction."""
        ...


@contextmanager
def translated() -> Iterator[None]:
    """What psycopg raises inside comes out as an error of ours.

    Raises:
        SchemaMismatch: a table or function is missing.
        DatabaseUnavailable: the server cannot be reached, or went away.
    """
    try:
        yield
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedFunction, psycopg.errors.InvalidSchemaName) as exc:
        first = str(exc).splitlines()[0]
        how = "where the database is the older (`pipeline db status`), run `pipeline db upgrade`"
        raise SchemaMismatch(f"the database has another schema than this version of chordal ({first}); {how}") from exc
    except (psycopg.OperationalError, psycopg.InterfaceError) as exc:
        first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        if isinstance(exc, _GIVEN_UP):
            raise DatabaseUnavailable(f"Postgres gave up a statement: {first}") from exc
        raise DatabaseUnavailable(f"Postgres cannot be reached: {first}; look at PIPELINE_DATABASE_URL") from exc


def connect(url: str, name: str, further: str = "") -> psycopg.Connection[Any]:
    """A connection in autocommit mode, with our session settings and further ones.

    Raises:
        DatabaseUnavailable: the server cannot be reached, or the URL cannot be read.
    """
    try:
        with translated():
            connection: psycopg.Connection[Any] = psycopg.connect(
                url, autocommit=True, application_name=name, connect_timeout=5,
                keepalives_idle=10, keepalives_interval=5, keepalives_count=3, tcp_user_timeout=20_000,
            )  # fmt: skip
            try:
                connection.execute((_SESSION + further).encode())
            except psycopg.Error:  # it went away again
                connection.close()
                raise
            return connection
    except psycopg.ProgrammingError:  # its message may hold the password
        raise DatabaseUnavailable(
            "PIPELINE_DATABASE_URL cannot be read: write postgresql://user:password@host:port/database"
        ) from None


class Database:
    """One connection for each thread of each process; a broken one is replaced.

    With `patience`, a statement that finds the server gone is tried again for so many seconds: only for callers whose
    every statement may be repeated. With `keep_plans`, Postgres plans each statement once: only for callers who ask for
    single rows by their keys.
    """

    def __init__(self, url: str, *, patience: float = 0.0, keep_plans: bool = False, name: str = "chordal") -> None:
        self.url, self.patience, self.name = url, patience, name
        self._further = _KEEP_PLANS if keep_plans else ""
        self._local = threading.local()
        self._names: dict[str, tuple[str, ...]] = {}
        self._open: list[tuple[int, psycopg.Connection[Any]]] = []

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """This thread's connection."""
        held: tuple[int, psycopg.Connection[Any]] | None = getattr(self._local, "held", None)
        if held is not None and held[0] == os.getpid() and not held[1].closed:
            return held[1]
        fresh = connect(self.url, self.name, self._further)
        self._local.held = (os.getpid(), fresh)
        # A parent's connections are kept after a fork, so that no destructor of ours touches them.
        self._open = [(pid, c) for pid, c in self._open if pid != os.getpid() or not c.closed]
        self._open.append(self._local.held)
        return fresh

    def fetch(self, statement: str, row: type[T], parameters: Mapping[str, Any]) -> list[T]:
        """Run one statement; conflicts with rivals and, with patience, outages are ridden out."""
        give_up = time.monotonic() + self.patience
        conflicts, pause = 0, 0.05
        while True:
            try:
                with translated():
                    connection = self.connection
                    with connection.cursor(row_factory=tuple_row) as cursor:
                        cursor.execute(statement, parameters, prepare=True)
                        return self._rows(statement, row, cursor)
            except DatabaseUnavailable as exc:
                cause = exc.__cause__
                if isinstance(cause, (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)):
                    conflicts += 1
                    if self._in_transaction or conflicts > _TRIES_ON_CONFLICT:
                        raise
                    time.sleep(random.uniform(0, 0.01 * 2**conflicts))  # noqa: S311 - spreads rivals, guards nothing
                    continue
                self._drop()
                if isinstance(exc, SchemaMismatch) or self._in_transaction or time.monotonic() + pause > give_up:
                    raise
                log.warning("%s; trying again", exc)
                time.sleep(pause)
                pause = min(pause * 2, 2.0)

    def _rows(self, statement: str, row: type[T], cursor: psycopg.Cursor[tuple[Any, ...]]) -> list[T]:
        """What psycopg's `class_row` gives; a statement's column names are read once, which is half of the work."""
        if cursor.pgresult is None or not cursor.pgresult.nfields:
            return []
        names = self._names.get(statement)
        if names is None:
            names = self._names[statement] = tuple(column.name for column in cursor.description or ())
        return [row(**dict(zip(names, values, strict=True))) for values in cursor]

    @property
    def _in_transaction(self) -> bool:
        return bool(getattr(self._local, "in_transaction", False))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Statements inside are one transaction of this thread's connection; none of them is tried again."""
        with translated(), self.connection.transaction():
            self._local.in_transaction = True
            try:
                yield
            finally:
                self._local.in_transaction = False

    def _drop(self) -> None:
        held: tuple[int, psycopg.Connection[Any]] | None = getattr(self._local, "held", None)
        if held is not None and held[0] == os.getpid():
            held[1].close()
        self._local.held = None

    def close(self) -> None:
        """Close the connections of all threads of this process."""
        for pid, connection in self._open:
            if pid == os.getpid():
                connection.close()


class Borrowed:
    """A caller's own connection: what is recorded through it is part of the caller's transaction."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.borrowed = connection

    def fetch(self, statement: str, row: type[T], parameters: Mapping[str, Any]) -> list[T]:
        """Run one statement in the caller's transaction."""
        with translated(), self.borrowed.cursor(row_factory=class_row(row)) as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A savepoint of the caller's transaction, which psycopg would end with ours where nothing has begun it yet."""
        with translated():
            if not self.borrowed.autocommit and self.borrowed.info.transaction_status == TransactionStatus.IDLE:
                self.borrowed.execute("SELECT 1")
        with translated(), self.borrowed.transaction():
            yield


class Listener:
    """A connection of its own that hears notifications."""

    def __init__(self, url: str, *channels: str) -> None:
        self._connection = connect(url, "chordal listener")
        with translated():
            for channel in channels:
                self._connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))

    def wait(self, timeout: float, wake: int | None = None) -> list[str]:
        """Payloads that arrived; returns early when one does, or when file descriptor `wake` is readable.

        Raises:
            DatabaseUnavailable: the connection broke.
        """
        watched = [self._connection.fileno(), *([wake] if wake is not None else [])]
        with translated():
            heard = [n.payload for n in self._connection.notifies(timeout=0)]
            if heard:
                return heard
            readable, _, _ = select.select(watched, [], [], max(0.0, timeout))
            if self._connection.fileno() in readable:
                return [n.payload for n in self._connection.notifies(timeout=0.05, stop_after=1)]
            return []

    def close(self) -> None:
        """Stop listening."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
