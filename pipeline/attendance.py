"""EXECUTE, beside the handlers: one thread in each process that runs tasks.

It keeps the process's incarnation alive in the store, notices what the store thinks this process runs, and stops
attempts that ran out of time, were cancelled or were given to another worker. It sleeps until the next thing to do:
a heartbeat, a deadline, a notification, or a call to wake.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

from pipeline.errors import DatabaseUnavailable, TaskTimeout
from pipeline.handler import AttemptLost
from pipeline.result_store.connection import Listener
from pipeline.result_store.rows import Fence
from pipeline.result_store.store import ResultStore

T = TypeVar("T")
log = logging.getLogger(__name__)

#: raises in the main thread; Celery's soft time limits, which use it too, are replaced by ours
_SIGNAL = signal.SIGUSR1
#: seconds between two writes of one attempt's progress
_PROGRESS_EVERY = 1.0
#: how many notices to stop are remembered
_TOLD = 256


class Cancelled(Exception):  # noqa: N818 - it says what happened, as asyncio's does
    """The execution was cancelled while the handler ran."""


class HandedBack(Exception):  # noqa: N818 - as above
    """The worker is shutting down: the task goes back for another worker."""


class _Interrupted(BaseException):
    """Raised inside a handler to stop it; no `except Exception` of the handler's holds it up."""


class Attendance:
    """One attempt that this process runs."""

    def __init__(self, attendant: Attendant, fence: Fence, timeout: float) -> None:
        self.fence, self.timeout = fence, timeout
        #: why the handler is to end; once there is one, it is what is recorded
        self.reason: Exception | None = None
        self.deadline = self.stopped_at = float("inf")
        #: records the end of an attempt that does not stop; set by the executor
        self.give_up: Callable[[Exception], None] = lambda reason: None
        self.given_up = False
        self.progress: tuple[float, str] | None = None
        self.written: tuple[float, str] | None = None
        self.written_at = 0.0
        self._attendant = attendant
        self._thread = threading.get_ident()
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._lock = threading.RLock()  # a signal's handler may stop its own thread while that holds it
        self._open = self._sent = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, call: Callable[[], T]) -> T:
        """Make a call that is the handler's own: in here its time runs, and only in here is it stopped.

        Raises:
            TaskTimeout, Cancelled, AttemptLost: why it was stopped, whatever the handler made of that.
        """
        # Not a context manager: a stop comes between any two instructions, and must always find this `try` around it.
        cause: BaseException | None = None
        try:
            try:
                with self._lock:
                    self._open, self.deadline = True, time.monotonic() + self.timeout
                if self.reason is None:
                    self._attendant.look_by(self.deadline)
                    result = call()
            finally:
                self._close()
        except BaseException as exc:
            if self.reason is None:
                raise
            cause = exc
        if self.given_up:
            raise AttemptLost("it did not stop in time and was given up") from cause
        if self.reason is not None:
            raise self.reason from cause
        return result

    def _close(self) -> None:
        self._open = False
        with self._lock:
            self.deadline = self.stopped_at = float("inf")
            if self._sent and not self._in_main_thread:  # perhaps not delivered yet: it must not hit what comes after
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), None)

    def stop(self, reason: Exception) -> None:
        """Ask the handler to end; called by the attendant's thread."""
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
            if not self._open:
                return
            self.stopped_at = time.monotonic()
            self._sent = True
            if self._in_main_thread:
                signal.pthread_kill(self._thread, _SIGNAL)
            elif self._loop is not None:
                with suppress(RuntimeError):  # it was closed just now
                    self._loop.call_soon_threadsafe(_cancel_all, self._loop)
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(_Interrupted)
                )  # fmt: skip

    def take_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """The handler is asynchronous: where no signal can stop it, its tasks are cancelled in its loop."""
        self._loop = loop

    def raise_in_main_thread(self) -> None:
        """What the signal's handler does: exact, for it runs in the thread that it stops."""
        if self._open and self._sent and self._in_main_thread:
            self._open = False
            raise _Interrupted

    def report(self, percent: float, message: str) -> None:
        """Take note of progress; the attendant writes it."""
        self.progress = (percent, message)
        self._attendant.look_by(self.written_at + _PROGRESS_EVERY)

    def renew(self) -> None:
        """Raise where the attempt should stop."""
        if self.reason is not None:
            raise AttemptLost(str(self.reason))

    def is_cancelled(self) -> bool:
        """True once the attempt should stop."""
        return self.reason is not None


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()


class Attendant:
    """The process's presence in the store.

    Args:
        store: its connections are per thread.
        lease: seconds without heartbeat after which the process counts as lost.
        hard_limit: seconds between asking a handler to stop and giving it up.
        name: of the worker, as people know it.
        killable: whether the process may be killed for an attempt that does not stop (a prefork child).
    """

    def __init__(
        self, store: ResultStore, *, lease: float, hard_limit: float, name: str, killable: Callable[[], bool]
    ) -> None:
        # An outage of the store must not hold up the stopping of handlers.
        self.store = store.impatient()
        self.lease, self.hard_limit, self.name = lease, hard_limit, name
        #: that this process knows; set once they are registered
        self.handlers: tuple[str, ...] = ()
        self._killable = killable
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._worker_id: int | None = None
        self._attempts: dict[tuple[str, str, int], Attendance] = {}
        #: executions that were told to stop a short while ago
        self._told: dict[str, None] = {}
        self._thread: threading.Thread | None = None
        self._listener: Listener | None = None
        self._next_beat = self._next_look = float("inf")
        self._closing = self._has_signals = False
        #: set where nothing may start here any more
        self.leaving = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)

    def worker_id(self) -> int:
        """This process's incarnation; the first call in a process makes it.

        Raises:
            DatabaseUnavailable: it cannot be recorded.
        """
        if self._pid != os.getpid():  # after a fork everything here is the parent's
            self._lock = threading.Lock()
            self._reset()
        with self._lock:
            if self._worker_id is None:
                self._worker_id = self.store.start_worker(
                    name=self.name, pid=os.getpid(), lease=self.lease, handlers=self.handlers
                )
                self._next_beat = time.monotonic() + self.lease / 3
                self.look_by(self._next_beat)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pipeline-attendant", daemon=True)
                # Inherits a mask without our signal, so that the kernel never wakes this thread for it.
                previous = signal.pthread_sigmask(signal.SIG_BLOCK, {_SIGNAL})
                self._thread.start()
                signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            return self._worker_id

    @contextmanager
    def attending(self, fence: Fence, timeout: float) -> Iterator[Attendance | None]:
        """Watch over an attempt until its end is recorded; None where another thread runs it already."""
        attendance, key = Attendance(self, fence, timeout), (fence.execution_id, fence.task_id, fence.epoch)
        if self._attempts.setdefault(key, attendance) is not attendance:
            yield None
            return
        if not self._has_signals and threading.current_thread() is threading.main_thread():
            self._take_signals()
        if fence.execution_id in self._told:  # perhaps between the claim and here
            self._next_beat = 0.0
            self.look_by(0.0)
        try:
            yield attendance
        finally:
            self._attempts.pop(key, None)

    def look_by(self, moment: float) -> None:
        """See to it that the thread wakes at a moment of the monotonic clock, or at once where it is past."""
        if moment < self._next_look:
            with suppress(BlockingIOError):
                self._wake_in.send(b"\0")

    def hand_back(self) -> int:
        """Stop what runs here, so that it goes back for another worker; returns how many attempts that are."""
        self.leaving = True
        attempts = list(self._attempts.values())
        for attendance in attempts:
            attendance.stop(HandedBack("its worker is shutting down"))
        return len(attempts)

    def _take_signals(self) -> None:
        """At the first attempt and not before: billiard sets its own once a child has been initialised."""
        self._has_signals = True
        signal.signal(_SIGNAL, self._on_signal)
        if self._killable():
            before = signal.getsignal(signal.SIGTERM)

            def on_term(number: int, frame: FrameType | None) -> None:
                if self.hand_back() == 0 and callable(before):
                    before(number, frame)

            signal.signal(signal.SIGTERM, on_term)

    def close(self) -> None:
        """Give the incarnation back."""
        if self._pid != os.getpid() or self._worker_id is None:
            return
        self._closing = True
        self.look_by(0.0)
        if self._thread is not None:
            self._thread.join(5)
        with suppress(DatabaseUnavailable):
            self.store.end_worker(self._worker_id)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        for attendance in list(self._attempts.values()):
            attendance.raise_in_main_thread()

    def _run(self) -> None:
        while not self._closing:
            try:
                self._look()
            except Exception as exc:
                log.warning("heartbeat: %s", exc, exc_info=not isinstance(exc, DatabaseUnavailable))
                self._next_beat = self._next_look = time.monotonic() + 1
            self._sleep(max(0.0, self._next_look - time.monotonic()))
        if self._listener is not None:
            self._listener.close()

    def _look(self) -> None:
        for attendance in list(self._attempts.values()):
            self._enforce(attendance, time.monotonic())
        if time.monotonic() >= self._next_beat:
            self._beat()
        for attendance in list(self._attempts.values()):
            self._write_progress(attendance, time.monotonic())
        self._next_look = float("inf")  # whoever sets a moment while the next is found wakes us
        moments = [self._next_beat]
        for a in list(self._attempts.values()):
            moments.append(a.deadline if a.reason is None else a.stopped_at + self.hard_limit)
            if a.progress is not a.written:
                moments.append(a.written_at + _PROGRESS_EVERY)
        self._next_look = min(moments)

    def _sleep(self, seconds: float) -> None:
        heard: list[str] = []
        try:
            if self._listener is None:
                self._listener = self.store.listen("pipeline_stop")
                self._next_beat = seconds = 0.0  # it looks for what was said while nobody listened
            heard = self._listener.wait(min(seconds, self.lease), self._wake_out.fileno())
        except DatabaseUnavailable:
            self._listener = None
            select.select([self._wake_out], [], [], min(seconds, 1.0))
        with suppress(BlockingIOError):
            self._wake_out.recv(4096)
        for execution_id in heard:
            self._told[execution_id] = None
            if len(self._told) > _TOLD:
                del self._told[next(iter(self._told))]
        if any(a.fence.execution_id in heard for a in list(self._attempts.values())):
            self._next_beat = 0.0

    def _beat(self) -> None:
        if self._worker_id is None:  # the next claim makes a new one
            self._next_beat = float("inf")
            return
        self._next_beat = time.monotonic() + self.lease / 3
        if self.store.renew_worker(self._worker_id, self.lease):
            self._reconcile(self._worker_id)
            return
        self._worker_id = None
        for attendance in list(self._attempts.values()):
            attendance.stop(AttemptLost("this worker's lease is gone"))

    def _reconcile(self, worker_id: int) -> None:
        """Hold what the store says that this process runs against what it does run."""
        mine = dict(self._attempts)
        rows = {
            (row.execution_id, row.task_id, row.epoch): row
            for row in self.store.running_on(worker_id, age=self.lease / 3)
        }
        for key, attendance in mine.items():
            row = rows.get(key)
            if row is None:
                attendance.stop(AttemptLost("the task was given to another worker"))
            elif row.stop:
                attendance.stop(Cancelled("the execution was cancelled"))
        for key, row in rows.items():
            if key not in mine and row.settled:
                log.warning("task %s of %s is recorded as running here and is not", row.task_id, row.execution_id)
                self.store.end(row, "lost", error_type="WorkerLost", error_message="its worker does not know of it")

    def _enforce(self, attendance: Attendance, now: float) -> None:
        if now >= attendance.deadline and attendance.reason is None:
            attendance.stop(TaskTimeout(f"ran longer than its timeout of {attendance.timeout:g} s"))
        reason = attendance.reason
        if reason is None or now < attendance.stopped_at + self.hard_limit:
            return
        log.error("task %s of %s does not stop: giving it up", attendance.fence.task_id, attendance.fence.execution_id)
        attendance.given_up, attendance.stopped_at = True, float("inf")
        try:
            if not isinstance(reason, AttemptLost):
                attendance.give_up(reason)
        finally:
            if self._killable():
                os.kill(os.getpid(), signal.SIGKILL)

    def _write_progress(self, attendance: Attendance, now: float) -> None:
        progress = attendance.progress
        if progress is not None and progress is not attendance.written and now >= attendance.written_at + _PROGRESS_EVERY:
            attendance.written, attendance.written_at = progress, now
            self.store.set_progress(attendance.fence, *progress)
