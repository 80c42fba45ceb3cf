"""Processes that a contender starts, their CPU time and their memory."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

#: seconds that a process may take to end
_END = 30.0


def spawn(command: Sequence[str], env: Mapping[str, str] | None, log: Path) -> subprocess.Popen[bytes]:
    """Start a program in the driver's session, with its output in a log."""
    with log.open("ab") as out:
        return subprocess.Popen(
            list(command),
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=log.parent,
        )


def end(process: subprocess.Popen[bytes] | None) -> None:
    """SIGTERM, and SIGKILL where that is not enough."""
    if process is None or process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def cpu_share(root: int, seconds: float) -> float:
    """CPU seconds for each second that a process and all below it use."""
    import psutil  # noqa: PLC0415 - not in every contender's environment

    def used() -> dict[tuple[int, float], float]:
        top = psutil.Process(root)
        found = {}
        for process in (top, *top.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                found[process.pid, process.create_time()] = times.user + times.system
        return found

    before, began = used(), time.monotonic()
    time.sleep(seconds)
    after, took = used(), time.monotonic() - began
    return sum(total - before.get(process, 0.0) for process, total in after.items()) / took


class PeakMemory:
    """The most memory that a process and all below it held at once, in MB, looked at twice a second; a context manager.

    What processes share counts once (PSS) where the system tells that.
    """

    def __init__(self, root: int) -> None:
        self.peak = 0.0
        self._root, self._done = root, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil  # noqa: PLC0415 - not in every contender's environment

        top = psutil.Process(self._root)
        while True:
            held = 0
            with suppress(psutil.NoSuchProcess):
                for process in (top, *top.children(recursive=True)):
                    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                        memory = process.memory_full_info()
                        held += getattr(memory, "pss", memory.uss)
            self.peak = max(self.peak, held / 1e6)
            if self._done.wait(0.5):
                return
