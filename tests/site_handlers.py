"""Handlers as a user writes them, for the tests: named `site.*`."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

from pipeline import Context, Fail, Retry, Skip, handler


@handler("site.add")
def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


@handler("site.double")
async def double(value: int) -> dict[str, int]:
    """Double a number, asynchronously."""
    await asyncio.sleep(0)
    return {"value": value * 2}


@handler("site.context")
def show_context(*, context: Context) -> dict[str, Any]:
    """What a handler sees of its attempt."""
    context.logger.info("seen")
    return {
        "execution_id": context.execution_id, "task_id": context.task_id, "attempt": context.attempt,
        "epoch": context.epoch, "user_id": context.user_id, "key": context.idempotency_key,
    }  # fmt: skip


@handler("site.fail_until")
def fail_until(attempt: int, *, context: Context) -> int:
    """Fail until an attempt."""
    if context.attempt < attempt:
        raise RuntimeError(f"attempt {context.attempt} is too early")
    return context.attempt


@handler("site.retry_after")
def retry_after(seconds: float, *, context: Context) -> int:
    """Ask once to be run again."""
    if context.attempt == 1:
        raise Retry("not yet", after=seconds)
    return context.attempt


@handler("site.skip")
def skip(reason: str = "nothing to do") -> None:
    """Skip."""
    raise Skip(reason)


@handler("site.give_up")
def give_up() -> None:
    """Fail and never retry."""
    raise Fail("hopeless")


@handler("site.only_os_errors", retry_on=(OSError,))
def only_os_errors() -> None:
    """Raise what is not among the exceptions to retry on."""
    raise KeyError("not an OSError")


@handler("site.return_a_set_of_objects")
def return_objects() -> Any:
    """Return what is not JSON."""
    return {"thing": object()}


@handler("site.return_bytes")
def return_many(size: int) -> str:
    """Return a long text."""
    return "x" * size


@handler("site.leave_a_mark")
def leave_a_mark(folder: str, *, context: Context) -> int:
    """Write a file for each run, so that tests can count runs from outside."""
    Path(folder, f"{context.task_id}.{context.epoch}.{os.getpid()}.{time.time_ns()}").touch()
    return os.getpid()


@handler("site.wait_for_file")
def wait_for_file(path: str, seconds: float = 60, *, context: Context) -> str:
    """Work until a file appears."""
    Path(path + ".started").touch()
    end = time.monotonic() + seconds
    while not Path(path).exists():
        context.heartbeat()
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.02)
    return "seen"


@handler("site.die")
def die(attempts: int = 1, *, context: Context) -> int:
    """Kill its own process in the first attempts."""
    if context.attempt <= attempts:
        os.kill(os.getpid(), signal.SIGKILL)
    return context.attempt


@handler("site.exit")
def leave() -> None:
    """Call sys.exit, as scripts do."""
    raise SystemExit(3)


@handler("site.stubborn")
def stubborn(seconds: float) -> str:
    """Catch what would stop it and go on."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            time.sleep(0.05)
        except BaseException:  # noqa: BLE001, S112 - what this handler is for
            continue
    return "done"


@handler("site.progress")
def progress(path: str, *, context: Context) -> None:
    """Report progress and wait for a file."""
    context.progress(42, "half way")
    while not Path(path).exists():
        time.sleep(0.02)


@handler("site.secret")
def use_secret(token: str, *, context: Context) -> dict[str, str]:
    """Show a secret everywhere it could leak."""
    context.logger.warning("the token is %s", token)
    if context.attempt == 1:
        raise RuntimeError(f"rejected {token}")
    return {"sent": f"Bearer {token}"}
