from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from handlers.shell import run
from pipeline import ArtifactStore, AttemptLost, Context, Fail, ParamsError, Refused


def context(folder: Path, *, enabled: bool = True, is_cancelled: Callable[[], bool] = lambda: False) -> Context:
    return Context(
        execution_id="exec-1",
        task_id="task",
        workflow_id="w",
        attempt=1,
        artifacts=ArtifactStore(root=str(folder), folder="f"),
        settings={"shell_enabled": enabled},
        is_cancelled=is_cancelled,
    )


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def wait_until_nobody_holds(fifo: int) -> None:
    """Returns at the end of file: once every process that has the other end open is gone."""
    os.set_blocking(fifo, True)
    while os.read(fifo, 1024):
        pass


@pytest.fixture
def fifo(tmp_path: Path) -> Any:
    """A named pipe that started programs hold open: its end of file is the proof that they are gone."""
    path = tmp_path / "alive"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield path, descriptor
    os.close(descriptor)


def test_run_by_default_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="PIPELINE_SHELL_ENABLED"):
        run(["/bin/true"], context=context(tmp_path, enabled=False))


def test_run_returns_exit_code_and_both_streams(tmp_path: Path) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    assert run(python(code), context=context(tmp_path)) == {"exit_code": 0, "stdout": "out\n", "stderr": "err\n"}


@pytest.mark.parametrize("argument", ["; touch hacked", "$(touch hacked)", "`touch hacked`", "a && b", "*", "' \" \\"])
def test_run_arguments_are_never_read_by_a_shell(tmp_path: Path, argument: str) -> None:
    code = "import os, sys; print(sys.argv[1], os.listdir())"
    assert run(python(code, argument), context=context(tmp_path))["stdout"] == f"{argument} []\n"


def test_run_environment_and_folder_are_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE_PASSWORD", "canary")
    code = "import os; print(os.getcwd()); print(os.environ['HOME']); print(*sorted(os.environ))"
    home, folder, names = run(python(code), env={"MORE": "1"}, context=context(tmp_path))["stdout"].splitlines()
    assert os.path.realpath(home) == os.path.realpath(folder) != str(tmp_path)
    assert set(names.split()) - {"LC_CTYPE"} == {"HOME", "LANG", "MORE", "PATH"}
    assert not Path(folder).exists()


def test_run_stdin_larger_than_a_pipe_is_echoed_whole(tmp_path: Path) -> None:
    text = "0123456789abcdef" * 40_000
    result = run(["cat"], stdin=text, max_output=1_000_000, context=context(tmp_path))
    assert result["stdout"] == text


def test_run_stdin_that_nobody_reads_is_no_error(tmp_path: Path) -> None:
    assert run(["true"], stdin="x" * 1_000_000, context=context(tmp_path))["exit_code"] == 0


def test_run_without_stdin_sees_its_end(tmp_path: Path) -> None:
    assert run(["cat"], context=context(tmp_path))["stdout"] == ""


def test_run_large_output_on_both_streams_is_cut_to_its_end(tmp_path: Path) -> None:
    code = "import sys\nfor s in (sys.stderr, sys.stdout):\n s.write('x' * 3_000_000 + 'end')"
    result = run(python(code), max_output=10, context=context(tmp_path))
    for stream in ("stdout", "stderr"):
        assert result[stream] == "[2999993 bytes before this are left out]\nxxxxxxxend"


def test_run_output_that_is_no_text_is_replaced(tmp_path: Path) -> None:
    code = "import sys; sys.stdout.buffer.write(b'a\\xff\\0b')"
    assert run(python(code), context=context(tmp_path))["stdout"] == "a\ufffd\ufffdb"


def test_run_exit_code_checked_raises_with_the_end_of_stderr(tmp_path: Path) -> None:
    code = "import sys; sys.exit('the reason')"
    with pytest.raises(RuntimeError, match="exit code 1: the reason"):
        run(python(code), context=context(tmp_path))


def test_run_exit_code_unchecked_is_a_result(tmp_path: Path) -> None:
    assert run(python("raise SystemExit(7)"), check=False, context=context(tmp_path))["exit_code"] == 7


def test_run_killed_by_a_signal_has_its_negative_number(tmp_path: Path) -> None:
    code = "import os; os.kill(os.getpid(), 9)"
    assert run(python(code), check=False, context=context(tmp_path))["exit_code"] == -9


def test_run_program_that_is_not_there_fails(tmp_path: Path) -> None:
    with pytest.raises(Fail, match="no-such-program"):
        run(["no-such-program"], context=context(tmp_path))


@pytest.mark.parametrize(("argv", "env"), [(["a\0b"], {}), (["true"], {"A=B": "c"}), (["true"], {"A": "b\0"})])
def test_run_what_no_process_can_take_is_a_params_error(tmp_path: Path, argv: list[str], env: dict[str, str]) -> None:
    with pytest.raises(ParamsError):
        run(argv, env=env, context=context(tmp_path))


#: a program and its child both hold the pipe open, and say so
HOLDERS = (
    "import subprocess, sys, time; f = open(sys.argv[1], 'w');"
    "c = subprocess.Popen(['sleep', '600'], pass_fds=[f.fileno()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
    "f.write('up'); f.flush();"
)


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("interruption", [Interrupted, KeyboardInterrupt])
def test_run_interrupted_kills_the_whole_group(tmp_path: Path, fifo: Any, interruption: type[BaseException]) -> None:
    path, descriptor = fifo

    def interrupt_once_up() -> bool:
        try:
            if os.read(descriptor, 2):
                raise interruption
        except BlockingIOError:
            pass
        return False

    with pytest.raises(interruption):
        run(python(HOLDERS + "time.sleep(600)", str(path)), context=context(tmp_path, is_cancelled=interrupt_once_up))
    wait_until_nobody_holds(descriptor)


def test_run_cancelled_kills_the_whole_group(tmp_path: Path, fifo: Any) -> None:
    path, descriptor = fifo
    cancelled = threading.Event()

    def is_cancelled() -> bool:
        try:
            if os.read(descriptor, 2):
                cancelled.set()
        except BlockingIOError:
            pass
        return cancelled.is_set()

    with pytest.raises(AttemptLost):
        run(python(HOLDERS + "time.sleep(600)", str(path)), context=context(tmp_path, is_cancelled=is_cancelled))
    wait_until_nobody_holds(descriptor)


def test_run_ended_kills_the_children_that_it_left(tmp_path: Path, fifo: Any) -> None:
    path, descriptor = fifo
    assert run(python(HOLDERS, str(path)), context=context(tmp_path))["exit_code"] == 0
    wait_until_nobody_holds(descriptor)


def test_run_ended_does_not_wait_for_a_child_that_writes_for_ever(tmp_path: Path) -> None:
    code = "import subprocess; subprocess.Popen(['yes']); print('done')"
    assert run(python(code), context=context(tmp_path))["exit_code"] == 0
