from __future__ import annotations

from pathlib import Path

import pytest

from handlers.debug import echo, fail, noop, sleep
from pipeline import ArtifactStore, Context


def context(folder: Path, attempt: int) -> Context:
    store = ArtifactStore(root=str(folder), folder="exec-1/task/1")
    return Context(execution_id="exec-1", task_id="task", workflow_id="w", attempt=attempt, artifacts=store)


def test_noop_takes_anything_and_returns_nothing() -> None:
    assert noop(a=1, b=[2]) is None


def test_echo_returns_its_merged_input() -> None:
    assert echo(a=1, b={"c": [2]}) == {"a": 1, "b": {"c": [2]}}


def test_sleep_returns_its_seconds() -> None:
    assert sleep(0.001) == {"seconds": 0.001}


def test_fail_without_times_raises_in_every_attempt(tmp_path: Path) -> None:
    for attempt in (1, 2, 50):
        with pytest.raises(RuntimeError, match=r"^out of coffee$"):
            fail("out of coffee", context=context(tmp_path, attempt))


def test_fail_with_times_gets_through_afterwards(tmp_path: Path) -> None:
    for attempt in (1, 2):
        with pytest.raises(RuntimeError, match=r"^failed$"):
            fail(times=2, context=context(tmp_path, attempt))
    assert fail(times=2, context=context(tmp_path, 3)) == {"attempt": 3}
