"""The pause of garbage collection while a definition is recorded: it ends, whoever else pauses."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from pipeline.engine import _garbage_left


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    """Garbage is collected before and after each test."""
    gc.enable()
    yield
    gc.enable()


def test_pause_stops_collection_and_ends_also_with_an_error() -> None:
    with pytest.raises(KeyError), _garbage_left():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_pause_leaves_collection_off_where_the_program_has_turned_it_off() -> None:
    gc.disable()
    with _garbage_left():
        assert not gc.isenabled()
    assert not gc.isenabled()


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_pauses_that_overlap_leave_collection_on(*, first_ends_first: bool) -> None:
    entered, leave = threading.Event(), threading.Event()

    def second() -> None:
        with _garbage_left():
            entered.set()
            assert leave.wait(30)

    rival = threading.Thread(target=second)
    with _garbage_left():
        rival.start()
        assert entered.wait(30)
        if not first_ends_first:
            leave.set()
            rival.join(30)
    assert gc.isenabled()
    leave.set()
    rival.join(30)
    assert gc.isenabled()
