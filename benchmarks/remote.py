"""A contender as the race sees it: a driver in a session of its own, asked with a time limit, replaced after a cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from benchmarks.field import Entry
from benchmarks.services import Ground

#: seconds that a contender may take to start, and to end
_START, _STOP = 120.0, 40.0
#: seconds that it may take before the time of a run begins
_PREPARE = 300.0
_ROOT = Path(__file__).parents[1]


class Remote:
    """One contender of a heat."""

    def __init__(self, entry: Entry, python: Path, ground: Ground) -> None:
        self.entry = entry
        self._python, self._ground = python, ground
        self._process: subprocess.Popen[str] | None = None
        self._answers: SimpleQueue[str | None] = SimpleQueue()
        self._log: Path | None = None

    def ask(self, shape: str, limit: float) -> dict[str, Any]:
        """What a run measured; or `cannot`, `error` or `cut` with what is known of it. Never an exception."""
        if self._process is None:
            answer = self._start()
            if "started" not in answer:
                self._kill()
                return answer
        process = self._process
        assert process is not None
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(f"{shape}\n")
            process.stdin.flush()
        answer = self._answer(_PREPARE)
        if "cut" in answer:
            answer = {"error": f"not prepared within {_PREPARE:g} s"}
        until = time.monotonic() + limit
        while "began" in answer:  # once for each graph of the shape
            answer = self._answer(max(0.0, until - time.monotonic()))
        if "cut" in answer:
            answer = {"cut": limit}
        if "cut" in answer or "error" in answer:
            self._kill()  # what it left behind would be in the way of the next run
        return answer

    def stop(self) -> None:
        """End it."""
        process = self._process
        if process is not None and process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.write("stop\n")
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP)
        self._kill()

    def _start(self) -> dict[str, Any]:
        place = self._ground.place(self.entry.name)
        self._log = Path(place.folder) / "driver.log"
        self._answers = SimpleQueue()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIPELINE_", "PYTHON"))}
        folder = str(self._python.parent)
        env = {**kept, "PYTHONPATH": str(_ROOT), "PATH": f"{folder}{os.pathsep}{kept.get('PATH', os.defpath)}"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(self._python), "-m", "benchmarks.driver", self.entry.runs, json.dumps(asdict(place))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env, cwd=place.folder,
                start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=_read, args=(self._process, self._answers), daemon=True).start()
        return self._answer(_START)

    def _answer(self, limit: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=limit)
        except Empty:
            return {"cut": limit}
        if line is None:
            text = self._log.read_text("utf-8", "replace") if self._log else ""
            return {"error": (text.strip().splitlines() or ["its process has ended"])[-1][:300]}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()


class Absent:
    """A contender that could not be installed."""

    def __init__(self, why: str) -> None:
        self._why = why

    def ask(self, shape: str, limit: float) -> dict[str, Any]:
        """Why not."""
        return {"cannot": self._why}


def _read(process: subprocess.Popen[str], answers: SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    with suppress(ValueError):  # closed after a kill
        for line in process.stdout:
            answers.put(line)
    answers.put(None)
