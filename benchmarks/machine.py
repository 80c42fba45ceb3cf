"""What the figures were taken on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.field import FIELD

#: libraries that the sentence leaves out
_PARTS = ("kombu", "redis", "psycopg", "fastapi")


def describe(servers: dict[str, str], contenders: Iterable[str]) -> dict[str, Any]:
    """Machine, versions and date, for the file of results."""
    entered = [FIELD[name] for name in contenders]
    ours = {name: version(name) for name in ("chordal", "celery", "kombu", "redis", "psycopg")}
    theirs = {
        name.partition("[")[0]: number
        for entry in entered
        for name, _, number in (text.partition("==") for text in entry.requirements)
    }
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "system": f"{platform.system()} {platform.release()}",
            "load": [round(load, 2) for load in os.getloadavg()],
        },
        "versions": {"python": platform.python_version(), **servers, **theirs, **ours},
    }


def place(found: dict[str, Any]) -> str:
    """When and on what, in words."""
    machine = found["machine"]
    return (
        f"{found['date']}, {machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB, "
        f"{machine['system']}"
    )


def line(found: dict[str, Any]) -> str:
    """The same with the versions."""
    names = (f"{name} {text}" for name, text in found["versions"].items() if name not in _PARTS)
    return f"{place(found)}; {', '.join(names)}."


def pace() -> float:
    """Milliseconds that a fixed loop of Python takes: what the machine's neighbours leave of it at the moment."""
    began = time.perf_counter()
    for _ in range(1_000_000):
        pass
    return 1000 * (time.perf_counter() - began)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (text.partition(":")[2].strip() for text in lines if text.startswith("model name"))
    return next(names, platform.machine())
