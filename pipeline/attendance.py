"""EXECUTE, beside the handlers: one thread in each process that runs tasks.

It keeps the process's incarnation alive in the store, notices what the store thinks this process runs, and stops
attempts that ran out of time, were cancelled or were given to another worker. It sleeps until the next thing to do:
a heartbeat, a deadline, a notification, or a call to wake.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from pipeline.errors import DatabaseUnavailable, TaskTimeout
from pipeline.handler import AttemptLost
from pipeline.result_store.connection import Listener
from pipeline.result_store.rows import Fence
from pipeline.result_store.store import ResultStore

log = logging.getLogger(__name__)

#: raises in the main thread; Celery's soft time limits, which use it too, are replaced by ours
_SIGNAL = signal.SIGUSR1
#: seconds between two writes of one attempt's progress
_PROGRESS_EVERY = 1.0


class Cancelled(Exception):  # noqa: N818 - it says what happened, as asyncio's does
    """The execution was cancelled while the handler ran."""


class _Interrupted(BaseException):
    """Raised inside a handler to stop it; no `except Exception` of the handler's holds it up."""


class Attendance:
    """One attempt that this process runs."""

    def __init__(self, attendant: Attendant, fence: Fence, timeout: float) -> None:
        self.fence, self.timeout = fence, timeout
        self.reason: Exception | None = None
        self.stopped_at = float("inf")
        self.given_up = False
        self.progress: tuple[float, str] | None = None
        self.progress_at = 0.0
        self._attendant = attendant
        self._thread = threading.get_ident()
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._lock = threading.Lock()
        self._open = self._sent = False
        self.deadline = float("inf")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """The handler's own region: from here on its time runs, and only in here is it stopped.

        Raises:
            TaskTimeout, Cancelled, AttemptLost: why it was stopped.
        """
        try:
            with self._lock:
                if self.reason is not None:
                    raise self.reason
                self._open = True
                self.deadline = time.monotonic() + self.timeout
            self._attendant.look_by(self.deadline)
            try:
                yield
            finally:
                self._open = False
                if not self._in_main_thread:
                    with self._lock:
                        if self._sent:  # perhaps not delivered yet: it must not hit what comes after
                            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), None)
        except _Interrupted:
            raise self.reason or AttemptLost("interrupted") from None
        finally:
            self.deadline = float("inf")

    def stop(self, reason: Exception) -> None:
        """Ask the handler to end; called by the attendant's thread."""
        with self._lock:
            if self.reason is not None:
                return
            self.reason, self.stopped_at = reason, time.monotonic()
            if not self._open:
                return
            self._sent = True
            if self._in_main_thread:
                signal.pthread_kill(self._thread, _SIGNAL)
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(_Interrupted)
                )  # fmt: skip

    def raise_in_main_thread(self) -> None:
        """What the signal's handler does: exact, for it runs in the thread that it stops."""
        if self._open and self._sent and self._in_main_thread:
            self._open = False
            raise _Interrupted

    def report(self, percent: float, message: str) -> None:
        """Take note of progress; the attendant writes it."""
        self.progress = (percent, message)
        self._attendant.look_by(self.progress_at + _PROGRESS_EVERY)

    def renew(self) -> None:
        """Raise where the attempt should stop."""
        if self.reason is not None:
            raise self.reason if isinstance(self.reason, AttemptLost) else AttemptLost(str(self.reason))

    def is_cancelled(self) -> bool:
        """True once the attempt should stop."""
        return self.reason is not None


class Attendant:
    """The process's presence in the store.

    Args:
        store: with patience; its connections are per thread.
        lease: seconds without heartbeat after which the process counts as lost.
        hard_limit: seconds between asking a handler to stop and giving it up.
        name: of the worker, as people know it.
        give_up: records the end of an attempt that does not stop, with the reason.
        killable: whether the process may be killed for an attempt that does not stop (a prefork child).
    """

    def __init__(
        self, store: ResultStore, *, lease: float, hard_limit: float, name: str,
        give_up: Callable[[Attendance, Exception], None], killable: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.store, self.lease, self.hard_limit, self.name = store, lease, hard_limit, name
        self._give_up, self._killable = give_up, killable
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._worker_id: int | None = None
        self._attempts: dict[int, Attendance] = {}
        self._thread: threading.Thread | None = None
        self._listener: Listener | None = None
        self._next_beat = self._next_look = float("inf")
        self._closing = False
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
                self._worker_id = self.store.start_worker(name=self.name, pid=os.getpid(), lease=self.lease)
                self._next_beat = time.monotonic() + self.lease / 3
            if self._thread is None:
                with suppress(ValueError):  # not the main thread: attempts are stopped another way there
                    signal.signal(_SIGNAL, self._on_signal)
                self._thread = threading.Thread(target=self._run, name="pipeline-attendant", daemon=True)
                # Inherits a mask without our signal, so that the kernel never wakes this thread for it.
                previous = signal.pthread_sigmask(signal.SIG_BLOCK, {_SIGNAL})
                self._thread.start()
                signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            return self._worker_id

    @contextmanager
    def attending(self, fence: Fence, timeout: float) -> Iterator[Attendance]:
        """Watch over an attempt until its end is recorded."""
        attendance = Attendance(self, fence, timeout)
        self._attempts[id(attendance)] = attendance
        try:
            yield attendance
        finally:
            self._attempts.pop(id(attendance), None)

    def look_by(self, moment: float) -> None:
        """See to it that the thread wakes at a moment of the monotonic clock, or at once where it is past."""
        if moment < self._next_look:
            with suppress(BlockingIOError):
                self._wake_in.send(b"\0")

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
            except DatabaseUnavailable as exc:
                log.warning("heartbeat: %s", exc)
                self._next_beat = time.monotonic() + 1
            except Exception:
                log.exception("heartbeat")
                self._next_beat = time.monotonic() + 1
        if self._listener is not None:
            self._listener.close()

    def _look(self) -> None:
        now = time.monotonic()
        if now >= self._next_beat:
            self._beat()
        for attendance in list(self._attempts.values()):
            self._enforce(attendance, time.monotonic())
        self._next_look = min(
            [self._next_beat]
            + [a.deadline for a in self._attempts.values() if a.reason is None]
            + [a.stopped_at + self.hard_limit for a in self._attempts.values() if not a.given_up]
            + [a.progress_at + _PROGRESS_EVERY for a in self._attempts.values() if a.progress is not None]
        )
        self._sleep(max(0.0, self._next_look - time.monotonic()))

    def _sleep(self, seconds: float) -> None:
        if self._listener is None:
            with contextlib.suppress(DatabaseUnavailable):
                self._listener = self.store.listen("pipeline_stop")
        heard: list[str] = []
        try:
            if self._listener is not None:
                heard = self._listener.wait(min(seconds, self.lease), self._wake_out.fileno())
        except DatabaseUnavailable:
            self._listener = None
        else:
            if self._listener is None:
                self._wake_out.settimeout(max(0.01, min(seconds, 1.0)))
                with suppress(OSError):
                    self._wake_out.recv(1)
                self._wake_out.setblocking(False)
        with suppress(BlockingIOError):
            self._wake_out.recv(4096)
        if heard:
            self._reconcile()

    def _beat(self) -> None:
        assert self._worker_id is not None
        self._next_beat = time.monotonic() + self.lease / 3
        if not self.store.renew_worker(self._worker_id, self.lease):
            self._worker_id = None
            for attendance in list(self._attempts.values()):
                attendance.stop(AttemptLost("this worker's lease is gone"))
            return
        self._reconcile()

    def _reconcile(self) -> None:
        """Hold what the store says that this process runs against what it does run."""
        assert self._worker_id is not None
        mine = {(a.fence.execution_id, a.fence.task_id, a.fence.epoch): a for a in list(self._attempts.values())}
        rows = {
            (row.execution_id, row.task_id, row.epoch): row
            for row in self.store.running_on(self._worker_id, age=self.lease / 3)
        }
        for key, attendance in mine.items():
            row = rows.get(key)
            if row is None:
                if id(attendance) in self._attempts:  # else it was recorded while we looked
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
        if attendance.reason is not None and not attendance.given_up and now >= attendance.stopped_at + self.hard_limit:
            attendance.given_up = True
            log.error("task %s does not stop: giving it up", attendance.fence.task_id)
            if not isinstance(attendance.reason, AttemptLost):
                self._give_up(attendance, attendance.reason)
            if self._killable():
                os.kill(os.getpid(), signal.SIGKILL)
        if attendance.progress is not None and now >= attendance.progress_at + _PROGRESS_EVERY:
            percent, message = attendance.progress
            attendance.progress, attendance.progress_at = None, now
            self.store.set_progress(attendance.fence, percent, message)
