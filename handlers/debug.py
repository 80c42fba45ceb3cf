"""Handlers that do nothing of use: for tests, benchmarks and first steps."""

from __future__ import annotations

import time
from typing import Annotated, Any

from pydantic import Field

from pipeline import Context, handler


@handler("debug.noop")
def noop(**_merged: Any) -> None:
    """Do nothing: takes any input and returns no result."""


@handler("debug.echo")
def echo(**merged: Any) -> dict[str, Any]:
    """Return the merged input: params, the execution's input, and each dependency's result under its id."""
    return merged


@handler("debug.sleep")
def sleep(seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]) -> dict[str, float]:
    """Wait `seconds`, then return `{"seconds": seconds}`; the task's timeout and a cancellation end it sooner."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))  # a thread is stopped between two naps only
    return {"seconds": seconds}


@handler("debug.fail")
def fail(message: str = "failed", times: int | None = None, *, context: Context) -> dict[str, int]:
    """Raise RuntimeError(message): in every attempt, or in the first `times` attempts only.

    Result: `{"attempt": n}` of the attempt that got through.
    """
    if times is None or context.attempt <= times:
        raise RuntimeError(message)
    return {"attempt": context.attempt}
