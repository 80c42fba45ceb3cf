"""Everything on one machine: workers and Flower as processes of a stack, over the services of an installation."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from celery.utils.nodenames import gethostname, nodename

from pipeline.app import Installation
from pipeline.errors import BrokerUnavailable, ServiceUnavailable
from pipeline.stack import Process, Stack

#: seconds that a worker may take to start
_START = 60.0
#: seconds that a worker may take to end once its tasks have
_END = 5.0
#: seconds that a worker may take to answer before another is started beside it
_ANSWER = 3.0


def processes(installation: Installation, *, workers: int, concurrency: int, flower: bool) -> list[Process]:
    """The workers, and Flower where its port is free."""
    env = installation.settings.child_environment({
        "PIPELINE_DATABASE_URL": installation.database_url,
        "PIPELINE_BROKER_URL": installation.broker_url,
        "PIPELINE_ARTIFACTS_URL": installation.settings.artifacts_root,
    })
    program = (sys.executable, "-m", "pipeline")
    found = [
        Process(
            name=f"worker-{number}",
            command=(*program, "worker", "--name", _node(number), "--concurrency", str(concurrency)),
            env=env,
        )
        for number in range(1, workers + 1)
    ]
    if flower:
        found.append(Process(name="flower", command=(*program, "flower"), env=env))
    return found


def _node(number: int) -> str:
    """Node name of a worker, before the @: no other on this machine has it."""
    return f"worker-{number}-{os.getpid()}"


def flower_port_is_free(installation: Installation) -> bool:
    """Whether Flower is wanted and can have its port."""
    settings = installation.settings
    if settings.flower_port == 0:
        return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.flower_address, settings.flower_port))
        except OSError:
            return False
    return True


class Workers:
    """Workers (and Flower) of this machine, looked after by a thread: a context manager.

    Args:
        catch_signals: let SIGINT and SIGTERM end `join` instead of interrupting the main thread.
    """

    def __init__(
        self, installation: Installation, *, workers: int, concurrency: int, flower: bool, catch_signals: bool
    ) -> None:
        self._installation, self._workers, self._catch_signals = installation, workers, catch_signals
        self._stack = Stack(
            processes(installation, workers=workers, concurrency=concurrency, flower=flower),
            log_folder=installation.settings.home.absolute() / "logs",
            stop_timeout=installation.settings.drain + _END,
        )
        self._failure: ServiceUnavailable | None = None
        self._thread = threading.Thread(target=self._look_after, name="pipeline-stack", daemon=True)

    def __enter__(self) -> Self:
        before = self._installation.store.newest_worker()
        if self._catch_signals:
            self._stack.catch_signals()
        self._stack.start()
        try:
            self._thread.start()
            self._await_workers(before)
        except BaseException:
            self._stack.stop()
            raise
        return self

    def _await_workers(self, before: int) -> None:
        until = time.monotonic() + _START
        while self._thread.is_alive() and self._installation.store.live_workers(after=before) < self._workers:
            if time.monotonic() > until:
                raise ServiceUnavailable(f"the workers did not start within {_START:g} s; see {self.log_folder}")
            self._thread.join(0.1)
        if self._failure is not None:
            raise self._failure

    def await_answers(self) -> None:
        """Wait until each worker takes messages, or they are no longer looked after.

        Raises:
            BrokerUnavailable: the broker went away.
            ServiceUnavailable: they do not answer.
        """
        nodes = [nodename(_node(number), gethostname()) for number in range(1, self._workers + 1)]
        until, patience = time.monotonic() + _START, 0.25
        while self.alive and len(self._installation.dispatcher.ask_workers(nodes, timeout=patience)) < self._workers:
            if time.monotonic() > until:
                raise ServiceUnavailable(f"the workers do not answer within {_START:g} s; see {self.log_folder}")
            patience = min(patience * 2, 2.0)  # one that had not begun to listen never answers: ask again soon

    @property
    def log_folder(self) -> Path:
        """Where the processes' logs are."""
        return self._installation.settings.home.absolute() / "logs"

    @property
    def alive(self) -> bool:
        """Whether they are still looked after."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait until a signal was caught.

        Raises:
            ServiceUnavailable: a process died at once, again and again.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _look_after(self) -> None:
        try:
            self._stack.watch()
        except ServiceUnavailable as exc:
            self._failure = exc

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.stop()


def somebody_works(installation: Installation) -> bool:
    """Whether a worker of this installation is there: one with a lease, that answers."""
    if installation.store.live_workers(after=0) == 0:
        return False
    try:
        return bool(installation.dispatcher.ask_workers(timeout=_ANSWER, limit=1))
    except BrokerUnavailable:
        return False
