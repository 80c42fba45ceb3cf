"""EXECUTE, around one run of a handler: its time, its progress, and how it is stopped wherever it stands.

The attendant's thread stops it: by a signal where it runs in the main thread, else by an exception that Python raises in
its thread or by cancelling what its event loop runs.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from pipeline.handler import AttemptLost
from pipeline.result_store.rows import Fence

T = TypeVar("T")

#: raises in the main thread; Celery's soft time limits, which use it too, are replaced by ours
STOP_SIGNAL = signal.SIGUSR1
#: seconds between two writes of one attempt's progress
PROGRESS_EVERY = 1.0


class Cancelled(Exception):  # noqa: N818 - it says what happened, as asyncio's does
    """The execution was cancelled while the handler ran."""


class HandedBack(Exception):  # noqa: N818 - as above
    """The worker is shutting down: the task goes back for another worker."""


class _Interrupted(BaseException):
    """Raised inside a handler to stop it; no `except Exception` of the handler's holds it up."""


class Attendance:
    """One attempt that this process runs.

    Args:
        fence: what the attempt holds.
        timeout: seconds that its handler may run.
        look_by: sees to it that the attendant's thread looks again by a moment of the monotonic clock.
    """

    def __init__(self, fence: Fence, timeout: float, look_by: Callable[[float], None]) -> None:
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
        self._look_by = look_by
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
                    self._look_by(self.deadline)
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
                signal.pthread_kill(self._thread, STOP_SIGNAL)
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
        self._look_by(self.written_at + PROGRESS_EVERY)

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
