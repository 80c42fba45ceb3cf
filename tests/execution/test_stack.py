"""The supervisor: real child processes, started, killed and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline.errors import ServiceUnavailable
from pipeline.stack import Process, Stack

#: tells its process and that of a child of its own, then sleeps
SLEEPER = 'sleep 600 & echo "$$ $!" >>"$TOLD"; wait'
STUBBORN = "trap '' TERM; " + SLEEPER
#: a supervisor of one process whose first argument is the script, the second the folder
SUPERVISOR = """
import sys
from pathlib import Path
from pipeline.stack import Process, Stack
script, folder = sys.argv[1], Path(sys.argv[2])
process = Process(name="child", command=("/bin/sh", "-c", script), env={"TOLD": str(folder / "child.told")})
stack = Stack([process], log_folder=folder)
stack.catch_signals()
with stack:
    came = stack.run_until_signal()
    print("stopping", flush=True)
print(came.name, flush=True)
"""


def sleeper(folder: Path, name: str = "child", script: str = SLEEPER) -> Process:
    """A process that tells its number in a pipe, so that a test can wait for it."""
    os.mkfifo(folder / f"{name}.told")
    return Process(name=name, command=("/bin/sh", "-c", script), env={"TOLD": str(folder / f"{name}.told")})


def told(folder: Path, name: str = "child") -> list[int]:
    """The process and its child, once it has started."""
    return [int(number) for number in (folder / f"{name}.told").read_text().split()]


def runs(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(numbers: list[int]) -> None:
    while any(map(runs, numbers)):  # pytest's timeout ends this
        os.sched_yield()


@contextmanager
def watching(stack: Stack) -> Iterator[None]:
    watcher = threading.Thread(target=stack.watch)
    watcher.start()
    try:
        yield
    finally:
        stack.ask_to_stop()
        watcher.join()


def test_stop_ends_all_processes_and_the_children_they_left(tmp_path: Path) -> None:
    stack = Stack([sleeper(tmp_path, "one"), sleeper(tmp_path, "two")], log_folder=tmp_path / "logs")
    stack.start()
    numbers = told(tmp_path, "one") + told(tmp_path, "two")
    assert all(map(runs, numbers))
    assert os.getsid(0) not in map(os.getsid, numbers)
    stack.stop()
    wait_until_gone(numbers)
    stack.stop()


def test_stop_of_a_process_that_ignores_sigterm_kills_it_after_the_timeout(tmp_path: Path) -> None:
    with Stack([sleeper(tmp_path, script=STUBBORN)], log_folder=tmp_path, stop_timeout=0.1):
        numbers = told(tmp_path)
    wait_until_gone(numbers)


def test_stop_while_another_thread_watches_ends_the_watch(tmp_path: Path) -> None:
    stack = Stack([sleeper(tmp_path)], log_folder=tmp_path)
    stack.start()
    watcher = threading.Thread(target=stack.watch)
    watcher.start()
    numbers = told(tmp_path)
    stack.stop()
    watcher.join()
    wait_until_gone(numbers)


def test_killed_process_is_started_again_and_its_orphans_are_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stack([sleeper(tmp_path)], log_folder=tmp_path) as stack, watching(stack):
        first = told(tmp_path)
        os.kill(first[0], signal.SIGKILL)
        second = told(tmp_path)
        assert all(map(runs, second))
        wait_until_gone(first)
    wait_until_gone(second)
    assert "child was killed by SIGKILL; starting it again in 0.1 s" in capsys.readouterr().err


def test_process_that_dies_at_once_again_and_again_is_given_up_with_its_last_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dying = Process(name="dying", command=("/bin/sh", "-c", 'echo "no $WHAT"; exit 3'), env={"WHAT": "luck"})
    with Stack([dying, sleeper(tmp_path)], log_folder=tmp_path) as stack:
        numbers = told(tmp_path)
        with pytest.raises(
            ServiceUnavailable, match=r"dying exited with code 3, 5 times in a row; .*dying.log"
        ) as raised:
            stack.watch()
        assert str(raised.value).endswith("no luck")
    wait_until_gone(numbers)
    assert capsys.readouterr().err.count("starting it again") == 4


def test_process_that_ends_where_nothing_is_restarted_is_an_error(tmp_path: Path) -> None:
    ending = Process(name="ending", command=("/bin/sh", "-c", "echo bye"))
    with (
        Stack([ending], log_folder=tmp_path, restart=False) as stack,
        pytest.raises(ServiceUnavailable, match=r"ending exited with code 0; .*\n  bye$"),
    ):
        stack.watch()


def test_program_that_is_not_there_is_an_error_and_the_others_are_ended(tmp_path: Path) -> None:
    missing = Process(name="missing", command=(str(tmp_path / "nothing"),))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(ServiceUnavailable, match=r"missing cannot be started: there is no .*nothing"):
        Stack([Process(name="child", command=("sleep", "600")), missing], log_folder=tmp_path).start()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@contextmanager
def supervisor(folder: Path, script: str) -> Iterator[subprocess.Popen[str]]:
    os.mkfifo(folder / "child.told")
    command = [sys.executable, "-c", SUPERVISOR, script, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_all_and_is_named(tmp_path: Path, number: signal.Signals) -> None:
    with supervisor(tmp_path, SLEEPER) as process:
        numbers = told(tmp_path)
        process.send_signal(number)
        assert process.communicate()[0].split() == ["stopping", number.name]
        assert process.returncode == 0
    wait_until_gone(numbers)


def test_second_signal_while_stopping_kills_at_once(tmp_path: Path) -> None:
    with supervisor(tmp_path, STUBBORN) as process:
        numbers = told(tmp_path)
        process.send_signal(signal.SIGTERM)
        assert process.stdout
        assert process.stdout.readline() == "stopping\n"
        assert runs(numbers[0]), "it ignores SIGTERM, and the timeout is far"
        process.send_signal(signal.SIGINT)
        assert process.communicate()[0] == "SIGTERM\n"
    wait_until_gone(numbers)


def test_killed_supervisor_takes_its_processes_with_it(tmp_path: Path) -> None:
    with supervisor(tmp_path, STUBBORN) as process:
        numbers = told(tmp_path)
        process.kill()
        process.wait()
        wait_until_gone(numbers)
