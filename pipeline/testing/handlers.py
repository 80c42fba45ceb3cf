"""Handlers of the kit's own workflows."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pipeline.errors import Retry, Skip
from pipeline.handler import Context, handler
from pipeline.testing.ledger import Ledger


@handler("testing.effect")
def effect(ledger: str, seconds: float = 0.0, *, context: Context) -> dict[str, int]:
    """Do something to the world that a repeat does not do again."""
    time.sleep(seconds)
    Ledger(Path(ledger)).effect(context.idempotency_key)
    return {"pid": os.getpid()}


@handler("testing.note")
def note(ledger: str, *, context: Context) -> dict[str, int]:
    """The same as quick as can be, so that executions join each other's messages."""
    return effect(ledger, context=context)


@handler("testing.again")
def again(times: int = 1, *, context: Context) -> int:
    """Ask to be run again soon, in the first `times` attempts."""
    if context.attempt <= times:
        raise Retry("not yet", after=0.05)
    return context.attempt


@handler("testing.skip")
def skip() -> None:
    """Skip, and with it all that depends on it."""
    raise Skip("nothing to do")


@handler("testing.sleep")
def sleep(seconds: float) -> float:
    """Take some time."""
    time.sleep(seconds)
    return seconds
