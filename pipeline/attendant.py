"""EXECUTE, beside the handlers: one thread in each process that runs tasks.

It keeps the process's incarnation alive in the store, notices what the store thinks this process runs, and stops
attempts that ran out of time, were cancelled or were given to another worker. It sleeps until the next thing to do:
a heartbeat, a deadline, a reminder, a notification, or a call to wake.
"""

from __future__ import annotations

import logging
import mmap
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from pipeline.attendance import PROGRESS_EVERY, STOP_SIGNAL, Attendance, Cancelled, HandedBack
from pipeline.errors import DatabaseUnavailable, TaskTimeout
from pipeline.handler import AttemptLost
from pipeline.result_store.connection import Listener
from pipeline.result_store.rows import Fence
from pipeline.result_store.store import ResultStore

log = logging.getLogger(__name__)

#: how many notices to stop are remembered
_TOLD = 256
#: seconds that a handler's runs take on the average of the last few: slow from the second on, until below the first
_SLOW = (0.01, 0.03)
#: quick below the first, until above the second
_QUICK = (0.005, 0.015)
#: weight of the newest run in that average
_NEWEST = 0.3


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
        # One byte of memory that a worker's main process shares with what it forks.
        self._worker_leaves = mmap.mmap(-1, 1)
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
        self._reminders: dict[Callable[[], float | None], float] = {}
        #: mean seconds of a run, by handler
        self._means: dict[str, float] = {}
        self._slow: set[str] = set()
        self._quick: set[str] = set()
        self._told_at = 0.0
        self._closing = self._has_signals = self._leaves = False
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
                previous = signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_SIGNAL})
                self._thread.start()
                signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            return self._worker_id

    @contextmanager
    def attending(self, fence: Fence, timeout: float) -> Iterator[Attendance | None]:
        """Watch over an attempt until its end is recorded; None where another thread runs it already."""
        attendance, key = Attendance(fence, timeout, self.look_by), (fence.execution_id, fence.task_id, fence.epoch)
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

    def remind(self, moment: float, call: Callable[[], float | None]) -> None:
        """Have something called from the attendant's thread at a moment of the monotonic clock, and as often as it names another.

        What is to be called already is left at its moment.
        """
        self._reminders.setdefault(call, moment)
        self.look_by(moment)

    def note_run(self, handler: str, seconds: float) -> None:
        """Take note of how long a handler ran; whether it counts as slow is told with the heartbeat."""
        mean = self._means.get(handler)
        self._means[handler] = mean = seconds if mean is None else mean + _NEWEST * (seconds - mean)
        before = (handler in self._slow, handler in self._quick)
        if mean > _SLOW[1] or mean < _SLOW[0]:
            (self._slow.add if mean > _SLOW[1] else self._slow.discard)(handler)
        if mean < _QUICK[0] or mean > _QUICK[1]:
            (self._quick.add if mean < _QUICK[0] else self._quick.discard)(handler)
        if before != (handler in self._slow, handler in self._quick):
            self._next_beat = min(self._next_beat, max(time.monotonic(), self._told_at + 1.0))
            self.look_by(self._next_beat)

    @property
    def leaving(self) -> bool:
        """Whether nothing may start here any more."""
        return self._leaves or bool(self._worker_leaves[0])

    def leave(self) -> None:
        """Let nothing start any more in this process and those that it forked."""
        self._worker_leaves[0] = 1

    def hand_back(self) -> int:
        """Stop what runs here, so that it goes back for another worker; returns how many attempts that are."""
        self._leaves = True
        attempts = list(self._attempts.values())
        for attendance in attempts:
            attendance.stop(HandedBack("its worker is shutting down"))
        return len(attempts)

    def _take_signals(self) -> None:
        """At the first attempt and not before: billiard sets its own once a child has been initialised."""
        self._has_signals = True
        signal.signal(STOP_SIGNAL, self._on_signal)
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
        for call, moment in list(self._reminders.items()):
            if moment <= time.monotonic():
                del self._reminders[call]  # first, so that whoever adds to what it looks after is not overlooked
                again = call()
                if again is not None:
                    self._reminders.setdefault(call, again)
        self._next_look = float("inf")  # whoever sets a moment while the next is found wakes us
        moments = [self._next_beat, *list(self._reminders.values())]
        for a in list(self._attempts.values()):
            moments.append(a.deadline if a.reason is None else a.stopped_at + self.hard_limit)
            if a.progress is not a.written:
                moments.append(a.written_at + PROGRESS_EVERY)
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
        self._told_at = time.monotonic()
        if self.store.renew_worker(self._worker_id, self.lease, set(self._slow), set(self._quick)):
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
        if progress is not None and progress is not attendance.written and now >= attendance.written_at + PROGRESS_EVERY:
            attendance.written, attendance.written_at = progress, now
            self.store.set_progress(attendance.fence, *progress)
