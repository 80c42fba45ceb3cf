"""The processes that `pipeline up` and `pipeline run` start: kept running, and ended together.

Every process gets a session of its own, so Ctrl-C reaches only us and we end the others in order; whatever is left of a
session is killed when its first process has ended. Should we be killed ourselves, a watchman (a shell that reads the
list of sessions from a pipe, which the kernel closes with us) kills them all. Processes are waited for by threads that
sleep in `wait`, and signals come in by the same queue as deaths do.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType, TracebackType
from typing import Any, Self

from pipeline.errors import ServiceUnavailable

#: seconds that a process must live to count as started well
_STEADY = 5.0
#: deaths in a row, each before that time, after which we give up
_DEATHS = 5
#: seconds before the first restart; doubled for each further death in a row
_FIRST_PAUSE = 0.1

#: a process waits for its word, so that none runs that the watchman does not know of
_STARTER = 'read -r word && exec "$@" </dev/null'
_WATCHMAN = """
while read -r line; do sessions=$line; done
for session in $sessions; do kill -s KILL -- "-$session"; done
"""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A program to keep running."""

    #: unique in the stack; its log is `<name>.log`
    name: str
    command: tuple[str, ...]
    #: its whole environment; None: ours
    env: Mapping[str, str] | None = None


class Stack:
    """Child processes that live and end with us; a context manager that starts and stops them, once."""

    def __init__(
        self, processes: Sequence[Process], *, log_folder: Path, restart: bool = True, stop_timeout: float = 20.0
    ) -> None:
        self._children = [_Child(process, log_folder / f"{process.name}.log") for process in processes]
        self._log_folder = log_folder
        self._restart = restart
        self._stop_timeout = stop_timeout
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._handlers: dict[int, Any] = {}
        self._watchman: subprocess.Popen[str] | None = None
        #: held while processes are started or buried, and to say that from now on none is
        self._turn = threading.RLock()
        self._stopping = False

    def start(self) -> None:
        """Start all processes.

        Raises:
            ServiceUnavailable: a program cannot be run at all; those before it have been stopped again.
        """
        self._log_folder.mkdir(parents=True, exist_ok=True)
        self._watchman = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHMAN],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            for child in self._children:
                self._spawn(child)
        except BaseException:
            self.stop()
            raise

    def catch_signals(self) -> None:
        """Let SIGINT and SIGTERM end `watch` from now until `stop` is done, and a second one make `stop` kill.

        From the main thread only, and before `start`: a signal that comes between the two is not lost.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            if number not in self._handlers:
                self._handlers[number] = signal.signal(number, self._on_signal)

    def run_until_signal(self) -> signal.Signals | None:
        """Catch signals and watch: which signal came, or None where `ask_to_stop` was first.

        Raises:
            ServiceUnavailable: as `watch`.
        """
        self.catch_signals()
        return self.watch()

    def watch(self) -> signal.Signals | None:
        """Start again whatever dies, until `ask_to_stop` is called or a signal was caught.

        Raises:
            ServiceUnavailable: a process died at once several times in a row, or at all where nothing is restarted.
        """
        while True:
            due = [child.restart_at for child in self._children if child.restart_at is not None]
            event = self._next_event(min(due, default=None))
            if isinstance(event, _Asked):
                return event.signal
            with self._turn:
                if self._stopping:  # by another thread, which waits for this event
                    if event is not None:
                        self._events.put(event)
                    return None
                if event is not None:
                    self._bury(event)
                for child in self._children:
                    if child.restart_at is not None and child.restart_at <= time.monotonic():
                        self._spawn(child)

    def ask_to_stop(self) -> None:
        """Make `watch` return; from any thread."""
        self._events.put(_Asked(signal=None))

    def stop(self) -> None:
        """End all processes: SIGTERM, and after the timeout or by a second signal SIGKILL. May be called again."""
        with self._turn:
            self._stopping = True
            for child in self._children:
                child.restart_at = None
                child.send(signal.SIGTERM)
        deadline = time.monotonic() + self._stop_timeout
        try:
            while any(child.lives for child in self._children):
                event = self._next_event(deadline)
                if event is None or (isinstance(event, _Asked) and event.signal is not None):
                    break
        finally:
            for child in self._children:
                child.end()
            if self._watchman is not None:
                self._tell_watchman()
                self._watchman.communicate()
                self._watchman = None
            while self._handlers:
                signal.signal(*self._handlers.popitem())
            self.ask_to_stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._events.put(_Asked(signal=signal.Signals(number)))

    def _next_event(self, until: float | None) -> _Event | None:
        try:
            return self._events.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
        except Empty:
            return None

    def _spawn(self, child: _Child) -> None:
        child.spawn(self._events)
        self._tell_watchman()
        child.give_word()

    def _tell_watchman(self) -> None:
        if self._watchman is not None and self._watchman.stdin is not None:
            with suppress(BrokenPipeError):  # somebody killed it: nothing that we could not do without
                self._watchman.stdin.write(" ".join(str(c.session) for c in self._children if c.session) + "\n")
                self._watchman.stdin.flush()

    def _bury(self, death: _Died) -> None:
        child = death.child
        child.end()
        self._tell_watchman()
        child.deaths = child.deaths + 1 if time.monotonic() - child.started_at < _STEADY else 1
        what = f"{child.process.name} {_ending(death.code)}"
        if not self._restart or child.deaths >= _DEATHS:
            times = f", {child.deaths} times in a row" if self._restart else ""
            raise ServiceUnavailable("\n  ".join([f"{what}{times}; {child.log} ends with:", *child.last_lines()]))
        pause = _FIRST_PAUSE * 2 ** (child.deaths - 1)
        child.restart_at = time.monotonic() + pause
        print(f"{what}; starting it again in {pause:g} s, its log is {child.log}", file=sys.stderr, flush=True)


class _Child:
    """One process of the stack and what became of it."""

    def __init__(self, process: Process, log: Path) -> None:
        self.process, self.log = process, log
        self.started_at = 0.0
        #: deaths in a row, each soon after its start
        self.deaths = 0
        self.restart_at: float | None = None
        self._running: subprocess.Popen[bytes] | None = None

    @property
    def lives(self) -> bool:
        return self._running is not None and self._running.returncode is None

    @property
    def session(self) -> int | None:
        return self._running.pid if self._running else None

    def spawn(self, events: SimpleQueue[_Event]) -> None:
        self.restart_at = None
        self.started_at = time.monotonic()
        if shutil.which(self.process.command[0]) is None:
            raise ServiceUnavailable(f"{self.process.name} cannot be started: there is no {self.process.command[0]!r}")
        with self.log.open("ab") as log:
            self._running = running = subprocess.Popen(
                ["/bin/sh", "-c", _STARTER, "sh", *self.process.command],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env=self.process.env,
            )  # fmt: skip
        threading.Thread(target=self._await, args=(running, events), name=self.process.name, daemon=True).start()

    def give_word(self) -> None:
        """Let the program begin."""
        if self._running is not None and self._running.stdin is not None:
            with suppress(BrokenPipeError), self._running.stdin as line:
                line.write(b"\n")

    def send(self, number: signal.Signals) -> None:
        if self._running is not None:
            self._running.send_signal(number)

    def end(self) -> None:
        """Kill what is left of its session, as the children of a killed worker."""
        if self._running is not None:
            with suppress(ProcessLookupError, PermissionError):  # macOS refuses where only zombies are left
                os.killpg(self._running.pid, signal.SIGKILL)
            self._running.wait()
            self._running = None

    def last_lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()[-8:]

    def _await(self, running: subprocess.Popen[bytes], events: SimpleQueue[_Event]) -> None:
        events.put(_Died(child=self, code=running.wait()))


@dataclass(frozen=True, kw_only=True)
class _Died:
    child: _Child
    code: int


@dataclass(frozen=True, kw_only=True)
class _Asked:
    signal: signal.Signals | None


_Event = _Died | _Asked


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
