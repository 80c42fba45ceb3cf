"""OBSERVE, live: Celery's events of the tasks of a turn, for whoever watches (Flower).

Celery's main process speaks of messages: that one was received, started, failed. Tasks that had no message of their own
are spoken for here, by the process that runs them; and so is every success, which the main process would hear of only
when the turn is over.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from typing import Any

from celery import Celery, states

log = logging.getLogger(__name__)

#: seconds without events after one that could not be sent
_SILENCE = 10.0


class Reporter:
    """Sends events while somebody watches; one connection for each process.

    Args:
        celery: the app whose broker the events go to.
        errors: what is raised where that cannot be reached.
    """

    def __init__(self, celery: Celery, errors: tuple[type[BaseException], ...]) -> None:
        self.celery, self.errors = celery, errors
        #: of the worker, as Celery knows it
        self.node = "worker"
        # One byte of memory that a worker's main process shares with what it forks.
        self._watched = mmap.mmap(-1, 1)
        self._lock = threading.Lock()
        self._pid = 0
        self._dispatcher: Any = None
        self._silent_until = 0.0

    def heed(self, main: Any) -> None:
        """Take over from the main process's dispatcher whether anybody watches tasks."""
        wanted = main is not None and main.enabled and (not main.groups or "task" in main.groups)
        self._watched[0] = wanted

    @property
    def watched(self) -> bool:
        """Whether anybody watches."""
        return bool(self._watched[0])

    def started(self, uuid: str, name: str, request: dict[str, Any]) -> None:
        """A task without a message of its own begins."""
        if self.watched:
            self._send(
                "task-received", uuid=uuid, name=name, args=request.get("argsrepr"), kwargs=request.get("kwargsrepr"),
                root_id=request.get("root_id"), parent_id=None, retries=0, eta=None, expires=None,
            )  # fmt: skip
            self._send("task-started", uuid=uuid)

    def ended(self, uuid: str, answer: Any, *, alone: bool) -> None:
        """A task has ended as Celery's tracer says; `alone` where its failure is the main process's to tell."""
        if not self.watched:
            return
        info = answer.info
        if info is None:
            if answer.retstr is not None:
                self._send("task-succeeded", uuid=uuid, result=answer.retstr, runtime=answer.runtime)
        elif not alone and info.state in (states.FAILURE, states.RETRY):
            said = {"exception": repr(info.retval), "traceback": str(getattr(answer.retval, "traceback", ""))}
            self._send("task-failed" if info.state == states.FAILURE else "task-retried", uuid=uuid, **said)

    def stopped(self, uuid: str) -> None:
        """A task was cancelled while it ran."""
        if self.watched:
            self._send("task-revoked", uuid=uuid, terminated=True, signum=None, expired=False)

    def lost(self, uuid: str, exc: BaseException) -> None:
        """A task's process is gone."""
        if self.watched:
            self._send("task-failed", uuid=uuid, exception=repr(exc), traceback="")

    def _send(self, kind: str, **fields: Any) -> None:
        if time.monotonic() < self._silent_until:
            return
        try:
            self._own_dispatcher().send(kind, **fields)
        except self.errors as exc:  # an event is news: it holds up no task for long, and ends none
            log.warning("no events for %g s: %s", _SILENCE, exc)
            self._dispatcher, self._silent_until = None, time.monotonic() + _SILENCE

    def _own_dispatcher(self) -> Any:
        with self._lock:
            if self._dispatcher is None or self._pid != os.getpid():
                connection = self.celery.connection_for_write()
                self._pid = os.getpid()
                self._dispatcher = self.celery.events.Dispatcher(
                    connection, hostname=self.node, buffer_while_offline=False
                )
            return self._dispatcher
