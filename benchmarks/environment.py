"""Environments for peers, outside of the repository: made once, made again when what is asked for changes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.field import Entry

_PINS = Path(__file__).parent / "environments"
#: seconds that an installation may take
_LIMIT = 900.0


class NotInstalled(Exception):  # noqa: N818
    """An environment could not be made; the message says why in a line."""


def cache() -> Path:
    """The folder of environments: `PIPELINE_BENCH_HOME`, or one under the user's cache."""
    found = os.environ.get("PIPELINE_BENCH_HOME")
    return Path(found).absolute() if found else Path.home() / ".cache" / "chordal-bench"


def python_of(entry: Entry) -> Path:
    """The interpreter that runs a contender, with everything installed.

    Raises:
        NotInstalled: the requirements cannot be installed here.
    """
    if not entry.environment:
        return Path(sys.executable)
    pins = _PINS / f"{entry.environment}.txt"
    wanted = hashlib.sha256(f"{sys.version} {entry.requirements} {pins.read_text()}".encode()).hexdigest()
    folder = cache() / entry.environment
    stamp, python = folder / "installed", folder / "bin" / "python"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing {', '.join(entry.requirements)} into {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run(sys.executable, "-m", "venv", str(folder))
    _run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "-c", str(pins),
         *entry.requirements)  # fmt: skip
    stamp.write_text(wanted)
    return python


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise NotInstalled(str(exc)) from exc
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise NotInstalled((lines or ["it says nothing"])[-1].removeprefix("ERROR: "))
