"""The faults that come from outside, each a function of the arena and the fleet."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
from redis import Redis

from pipeline.result_store.rows import ReadyTask
from pipeline.testing.arena import Arena
from pipeline.testing.fault import Fault
from pipeline.testing.fleet import Fleet, Worker
from pipeline.testing.proxy import Mode, Proxy

#: what undoes a fault, and how many seconds later
Undo = tuple[float, Callable[[], None]]

#: messages that are published again at a time
_MANY = 200


class Outside:
    """Does what a fault says, and tells how it is undone."""

    def __init__(self, arena: Arena, fleet: Fleet) -> None:
        self.arena, self.fleet = arena, fleet
        #: longer than a lease, for whoever is to be taken for dead
        self.long = arena.settings.lease + 0.5
        self.short = 1.0

    def do(self, fault: Fault) -> Undo | None:
        """Do it; returns what undoes it.

        Raises:
            ProcessLookupError: the victim is dead already.
        """
        worker = self.fleet.workers[fault.target % len(self.fleet.workers)]
        subject, _, verb = fault.kind.rpartition("-")
        match subject:
            case "child" | "main" | "session" | "recovery":
                return self._signal(worker, subject, fault.target, signal.SIGKILL if verb == "kill" else signal.SIGSTOP)
            case "broker" if verb in ("refuse", "stall", "blackhole"):
                return self._line(self.arena.broker, verb, self.short)
            case "database" if verb in ("refuse", "stall", "blackhole"):
                return self._line(self.arena.database, verb, self.long if verb == "blackhole" else self.short)
        match fault.kind:
            case "deploy":
                worker.process.send_signal(signal.SIGTERM)
            case "broker-cut":
                self.arena.broker.cut()
            case "database-cut":
                self.arena.database.cut()
            case "broker-flush":
                self._flush()
            case "broker-kill":
                self.arena.kill_broker()
            case "database-kill":
                self.arena.kill_database()
            case "database-terminate":
                self.arena.query(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            case "messages-replayed":
                self._publish(over=True, epochs=(-1, 0), times=1)
            case "messages-doubled":
                self._publish(over=False, epochs=(0,), times=5)
            case "messages-forged":
                self._forge()
            case _:
                raise ValueError(f"nobody knows the fault {fault.kind!r}")
        return None

    def _signal(self, worker: Worker, subject: str, target: int, number: signal.Signals) -> Undo | None:
        pid = worker.process.pid
        if subject == "session":
            os.killpg(pid, number)
            return None if number == signal.SIGKILL else (self.long, lambda: go_on(pid, all_of_it=True))
        if subject != "main":
            found = worker.children if subject == "child" else [p for p in (worker.recovery,) if p]
            if not found:
                raise ProcessLookupError(f"{worker.name} has no {subject}")
            pid = found[target // 8 % len(found)].pid
        os.kill(pid, number)
        return None if number == signal.SIGKILL else (self.long, lambda: go_on(pid))

    def _line(self, proxy: Proxy, mode: str, seconds: float) -> Undo:
        modes: dict[str, Mode] = {"refuse": "refuse", "stall": "stall", "blackhole": "blackhole"}
        proxy.set(modes[mode])
        return seconds, lambda: proxy.set("pass")

    def _flush(self) -> None:
        """All messages: the whole database of a Redis that is the kit's own, else only the kit's queue."""
        if self.arena.own_broker:
            with Redis.from_url(self.arena.engine.installation.broker_url) as client:
                client.flushdb()
            return
        installation = self.arena.engine.installation
        with installation.celery.connection_or_acquire() as connection:
            installation.celery.amqp.queues[self.arena.settings.queue].bind(connection.default_channel).purge()

    def _publish(self, *, over: bool, epochs: tuple[int, ...], times: int) -> None:
        rows = self.arena.query(
            "SELECT t.execution_id, t.task_id, t.epoch, t.handler FROM pipeline.task_executions t WHERE"
            " CASE WHEN %s THEN t.finished_at IS NOT NULL ELSE t.finished_at IS NULL AND t.due_at IS NOT NULL END"
            " ORDER BY coalesce(t.finished_at, t.ready_at) DESC LIMIT %s", over, _MANY,
        )  # fmt: skip
        self.arena.engine.installation.dispatcher.publish([
            ReadyTask(execution_id=row[0], task_id=row[1], epoch=max(0, row[2] + epoch), handler=row[3], timeout=20)
            for row in rows
            for epoch in epochs
            for _ in range(times)
        ])

    def _forge(self) -> None:
        """Messages that nobody of ours would write."""
        installation = self.arena.engine.installation
        known = self.arena.query(
            "SELECT execution_id, task_id, epoch FROM pipeline.task_executions WHERE finished_at IS NULL LIMIT 20"
        )
        handler = "debug.noop"
        arguments: list[tuple[Any, ...]] = [
            ("exec-000000000000", "t00", 0), ("'; DROP SCHEMA pipeline; --", "t00", 0), (), ("x",), (1, 2, 3), (None, None, None),
            ("exec-000000000000", "t00", 2**70), ("a\0b", "t00", 0), *((x, t, e + 7) for x, t, e in known),
            *((x, t + "x", e) for x, t, e in known), *((x, t, -1) for x, t, _ in known),
            *((x, t, str(e)) for x, t, e in known),
        ]  # fmt: skip
        with installation.celery.producer_or_acquire() as producer:
            for number, args in enumerate(arguments):
                headers, properties, body, _ = installation.celery.amqp.create_task_message(
                    f"forged-{number}", handler if number % 5 else "nobody.knows", args, {"more": "x"} if number % 7 == 0 else {}
                )
                producer.publish(
                    body, routing_key=self.arena.settings.queue, exchange="", serializer="json", headers=headers, **properties
                )
            producer.publish("no task at all", routing_key=self.arena.settings.queue, exchange="", serializer="json")


def go_on(pid: int, *, all_of_it: bool = False) -> None:
    """SIGCONT to a process that may be gone."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        (os.killpg if all_of_it else os.kill)(pid, signal.SIGCONT)
