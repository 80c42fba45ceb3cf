"""Handlers as a user writes them, for the tests: named `site.*`."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import time
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from celery.exceptions import Ignore
from celery.utils.log import get_task_logger

from pipeline import AttemptLost, Context, Fail, Retry, Skip, handler


@handler("site.add")
def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


@handler("site.named")
def named(the_value: int) -> int:
    """Take the result of a task whose id has a dash."""
    return the_value + 1


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
def only_os_errors(named: bool = False) -> None:
    """Raise what is, or is not, among the exceptions to retry on."""
    raise FileNotFoundError("an OSError") if named else KeyError("not an OSError")


@handler("site.spin")
def spin() -> None:
    """Work for longer than any test."""
    while True:
        time.sleep(0.01)


@handler("site.spin_shortly", timeout=0.1)
def spin_shortly() -> None:
    """The same, with a timeout of its own."""
    spin()


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


@handler("site.watch")
def watch(folder: str, *, context: Context) -> int:
    """Mark its start, work until a file for this attempt or for the task appears, and write down how it is stopped."""
    name = f"{context.task_id}.{context.epoch}"
    leave_a_mark(folder, context=context)
    while not (Path(folder, f"go-{name}").exists() or Path(folder, f"go-{context.task_id}").exists()):
        try:
            context.heartbeat()
            time.sleep(0.02)
        except BaseException:
            try:
                context.heartbeat()
            except AttemptLost as exc:
                Path(folder, f"lost-{name}.new").write_text(str(exc))
                Path(folder, f"lost-{name}.new").rename(Path(folder, f"lost-{name}"))
            raise
    return os.getpid()


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
        except BaseException:
            continue
    return "done"


@handler("site.deaf")
def deaf(path: str) -> str:
    """Hear nothing until a file appears, then take it away."""
    while True:
        try:
            while not Path(path).exists():
                time.sleep(0.02)
            Path(path).unlink()
            return "done all the same"
        except BaseException:
            continue


@handler("site.churn")
def churn() -> dict[str, int]:
    """Run through many small steps, so that a stop may come at any of them."""
    total = 0
    for number in range(2_000):
        total += len(f"{number}" + json.dumps({"n": number}))
    return {"total": total}


@handler("site.progress")
def progress(path: str, *, context: Context) -> None:
    """Report progress and wait for a file."""
    context.progress(42, "half way")
    while not Path(path).exists():
        time.sleep(0.02)


@handler("site.secret")
def use_secret(token: str, *, context: Context) -> dict[str, Any]:
    """Show a secret everywhere it could leak."""
    context.progress(1, f"with {token}")
    context.logger.warning("the token is %s", token)
    logging.getLogger("elsewhere").error("token %r", {"token": token})
    get_task_logger(__name__).error("token " + token)
    if context.attempt == 1:
        raise RuntimeError(f"rejected {token}")
    if context.attempt == 2:
        raise Retry(f"not with {token}", after=0)
    return {"sent": f"Bearer {token}", "by": {token: [token]}}


@handler("site.fail_with_secret")
def fail_with_secret(token: str) -> None:
    """Fail for good, with a secret in the exception and in its cause."""
    try:
        raise KeyError(token)
    except KeyError as exc:
        raise Fail(f"refused {token}") from exc


@handler("site.mutate")
def mutate(given: dict[str, Any], param: Any, variable: Any, added: Any = None, **others: Any) -> list[int]:
    """Change everything that it was given; returns how much of each there was."""
    found = [len(given["list"]), len(param["list"]), len(variable["list"]), len(others["rest"]["list"])]
    for value in (given, param, variable, others["rest"]):
        value["list"].append("more")
    return found


@handler("site.typed")
def typed(day: date, amount: Decimal, tags: set[str], flag: bool = False) -> dict[str, Any]:
    """Take typed parameters."""
    return {"day": day.isoformat(), "amount": amount + 1, "tags": sorted(tags), "flag": flag}


@handler("site.raise")
def raise_something(what: str) -> None:
    """Raise what a handler should not, or what is hard to record."""
    raise {
        "cancelled": asyncio.CancelledError("mine"),
        "interrupt": KeyboardInterrupt("mine"),
        "ignore": Ignore("mine"),
        "memory": MemoryError("mine"),
        "exit": SystemExit("mine"),
        "panic": Panic("mine"),
        "odd text": ValueError("mine: nul \0 surrogate \udcff"),
        "unspeakable": Unspeakable("mine"),
    }[what]


class Panic(BaseException):
    """As extensions written in Rust raise."""


class Unspeakable(Exception):
    """Cannot be shown, and not be pickled."""

    def __init__(self, first: str) -> None:
        super().__init__(lambda: first)

    def __str__(self) -> str:
        raise RuntimeError("no text")


@handler("site.odd_result")
def odd_result(what: str) -> Any:
    """Return what Postgres or JSON cannot hold, or only just."""
    circle: list[Any] = []
    circle.append(circle)
    return {
        "nul": "a\0b", "escaped nul": "a\\u0000b", "nan": float("nan"), "circle": circle, "surrogate": "\udcff",
        "keys": {1: "one"}, "date": date(2026, 1, 2), "big": 2**80,
    }[what]  # fmt: skip


@handler("site.cooperate")
def cooperate(path: str, *, context: Context) -> str:
    """Work until told to stop, then return as if all were well."""
    Path(path + ".started").touch()
    while not context.cancelled:
        time.sleep(0.02)
    Path(path + ".stopped").touch()
    return "half done"


@handler("site.clean_up_badly")
def clean_up_badly(path: str) -> None:
    """Fail while it cleans up after having been stopped."""
    try:
        Path(path + ".started").touch()
        while True:
            time.sleep(0.02)
    finally:
        raise OSError("the clean-up failed")


@handler("site.async_wait")
async def async_wait(path: str) -> None:
    """Wait asynchronously, longer than any test."""
    Path(path + ".started").touch()
    while True:  # noqa: ASYNC110 - there is no event
        await asyncio.sleep(0.02)


@handler("site.hold_gil")
def hold_gil(seconds: int) -> None:
    """Block in C without letting go of the interpreter."""
    ctypes.PyDLL(None).sleep(seconds)


@handler("site.write")
def write(*, context: Context) -> str:
    """Write a file in the first attempt, fail, and write it again."""
    with context.artifacts.write("out.txt") as out:
        out.path.write_text(f"attempt {context.attempt}")
    if context.attempt == 1:
        raise RuntimeError("after the file was written")
    assert out.artifact
    return out.artifact.uri
