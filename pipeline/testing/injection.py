"""Faults at transitions inside a worker: name this module among its handlers, and the plan's file in its settings.

It wraps the methods through which a task passes; the engine knows nothing of it. The plan is read again whenever its
file is replaced. Occurrences are counted over all processes: each appends a byte to a file, and where the byte landed
is its number.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from celery.worker.request import Request

from pipeline.app import read_settings
from pipeline.dispatch import Dispatcher
from pipeline.errors import BrokerUnavailable, DatabaseUnavailable
from pipeline.execution import Attempt, Executor
from pipeline.result_store.store import ResultStore
from pipeline.testing.fault import Fault, read_plan
from pipeline.testing.ledger import Ledger

#: the worker's main process, which imports this module before it forks
_MAIN = os.getpid()
#: seconds that delayed messages come late
_LATE = 0.5


class Injector:
    """Looks the plan up at each transition."""

    def __init__(self, plan: Path) -> None:
        self.plan, self.folder = plan, plan.parent
        self.ledger = Ledger(self.folder / "ledger")
        self._stamp: tuple[int, int] | None = None
        self._planned: dict[str, dict[str, Fault]] = {}

    def at(self, point: str) -> str | None:
        """The action that is due at this passage, marked as done."""
        for name, fault in self._read().get(point, {}).items():
            if self._count(name) == fault.nth:
                action = fault.kind.partition(":")[2]
                marker = self.folder / f"{name}.firing"
                marker.write_text(f"{os.getpid()} {action}")
                marker.rename(self.folder / f"{name}.fired")
                return action
        return None

    def _read(self) -> dict[str, dict[str, Fault]]:
        try:
            found = self.plan.stat()
        except FileNotFoundError:
            return {}
        if self._stamp != (found.st_ino, found.st_mtime_ns):
            self._stamp = (found.st_ino, found.st_mtime_ns)
            self._planned = {}
            for name, fault in read_plan(self.plan).items():
                self._planned.setdefault(fault.kind.partition(":")[0], {})[name] = fault
        return self._planned

    def _count(self, name: str) -> int:
        counter = os.open(self.folder / f"{name}.count", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(counter, b".")
            return os.lseek(counter, 0, os.SEEK_CUR)
        finally:
            os.close(counter)


def do(action: str | None, error: type[Exception]) -> None:
    """What a process can do to itself."""
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill_parent":
            os.kill(_MAIN if os.getppid() == _MAIN else os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise error("injected: the connection broke")


class _Severed:
    """A cursor whose statement commits, and whose connection is gone before the answer is read."""

    def __init__(self, connection: Any, cursor: Any) -> None:
        self._connection, self._cursor = connection, cursor

    def execute(self, *statement: Any, **options: Any) -> Any:
        self._cursor.execute(*statement, **options)
        self._connection.close()
        return self._cursor.execute(*statement, **options)  # raises what a broken connection raises

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._cursor.close()


def sever(store: ResultStore) -> None:
    """Lose the answer of this thread's next statement."""
    connection: Any = getattr(store.link, "connection")  # noqa: B009 - only a link of its own has one
    make = connection.cursor

    def cursor(**options: Any) -> _Severed:
        del connection.cursor
        return _Severed(connection, make(**options))

    connection.cursor = cursor


def arm(injector: Injector) -> None:
    """Wrap the methods in this process and in what it forks."""

    def around(owner: type, name: str, point: str, error: type[Exception]) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(real)
        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            action = injector.at(f"{point}.before")
            if action == "sever":
                sever(self)
            do(action, error)
            returned = real(self, *args, **options)
            do(injector.at(f"{point}.after"), error)
            return returned

        setattr(owner, name, wrapped)

    around(ResultStore, "claim", "claim", DatabaseUnavailable)
    around(ResultStore, "complete", "complete", DatabaseUnavailable)
    around(ResultStore, "end", "end", DatabaseUnavailable)
    around(Request, "acknowledge", "ack", OSError)
    _around_handlers(injector)
    _around_publish(injector)


def _around_handlers(injector: Injector) -> None:
    call = Executor.call

    @functools.wraps(call)
    def wrapped(self: Executor, handler: Any, attempt: Attempt) -> Any:
        do(injector.at("handler.before"), ConnectionError)
        injector.ledger.write("start", attempt.fence)
        returned = call(self, handler, attempt)
        injector.ledger.write("end", attempt.fence)
        do(injector.at("handler.after"), ConnectionError)
        return returned

    setattr(Executor, "call", wrapped)  # noqa: B010 - mypy allows no assignment to a method


def _around_publish(injector: Injector) -> None:
    publish = Dispatcher.publish

    @functools.wraps(publish)
    def wrapped(self: Dispatcher, ready: Any) -> None:
        tasks = list(ready or ())
        action = injector.at("publish.before") if tasks else None
        do(action, BrokerUnavailable)
        if action == "drop":
            return
        if action == "delay":
            time.sleep(_LATE)
        if action == "shuffle":
            random.shuffle(tasks)
        for _ in range(2 if action == "double" else 1):
            publish(self, tuple(tasks))
        if tasks:
            do(injector.at("publish.after"), BrokerUnavailable)

    setattr(Dispatcher, "publish", wrapped)  # noqa: B010 - mypy allows no assignment to a method


# Work at import: a worker imports its modules of handlers once, before it forks, and this is the only door it has.
if (_plan := read_settings().fault_plan) is not None:
    arm(Injector(_plan))
