"""Everything on one machine, from an empty folder: what is started is ended, and data stays."""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

#: many processes start, and the machine may be busy
pytestmark = pytest.mark.timeout(300)

EMPTY = {"id": "empty", "tasks": [{"id": "a", "handler": "debug.noop"}]}


def ended(process: Any, number: signal.Signals) -> tuple[int, str, str]:
    """Exit code and what was printed after the signal."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def workers(home: Any) -> list[psutil.Process]:
    """Main processes of workers."""
    found = [psutil.Process(int(line.split()[0])) for line in home.processes() if " worker --name " in line]
    return [process for process in found if "pipeline" not in " ".join(process.parent().cmdline())
            or "up" in process.parent().cmdline()]  # fmt: skip


def test_up_runs_workflows_replaces_a_killed_worker_and_ends_all_of_it_by_sigterm(home: Any, eventually: Any) -> None:
    file = home.write("empty.yaml", EMPTY)
    with home.start("up", "--workers", "2", "--concurrency", "1") as up:
        told = "".join(home.until_ready(up))
        assert "postgres postgresql://postgres@127.0.0.1:" in told and "broker   redis://127.0.0.1:" in told
        first = home("run", file, "--json")
        assert first.code == 0 and "starting one" not in first.err
        before = workers(home)
        assert len(before) == 2
        before[0].send_signal(signal.SIGKILL)
        assert eventually(lambda: len({p.pid for p in workers(home)} - {p.pid for p in before}) == 1)
        assert home("run", file, "--json").code == 0
        code, out, err = ended(up, signal.SIGTERM)
        assert (code, out) == (0, "")
        assert err.count("was killed by SIGKILL; starting it again") == 1
    assert home.is_quiet(), home.processes()
    lock = os.open(home.home / "services.lock", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds the servers
    os.close(lock)


def test_up_ended_while_it_starts_leaves_nothing(home: Any, eventually: Any) -> None:
    with home.start("up") as up:
        assert eventually((home.home / "services.turn").exists)
        code, out, err = ended(up, signal.SIGTERM)
        assert code in (0, 130), err
        assert "ready" not in out.split() and "Traceback" not in err
    assert home.is_quiet(), home.processes()


def test_run_with_nothing_running_starts_a_worker_and_ends_all_of_it_and_data_stays(home: Any) -> None:
    done = home("run", home.write("empty.yaml", EMPTY), program=("-m", "pipeline"))
    assert done.code == 0
    assert "no worker is running: starting one" in done.err
    assert "empty@1 success" in done.out
    assert home.is_quiet(), home.processes()
    execution = done.err.split()[0]
    for _ in range(2):
        assert [row["execution_id"] for row in home.json("list")] == [execution]
        assert home.is_quiet(), home.processes()


def test_run_interrupted_says_that_the_execution_goes_on_and_up_on_the_same_home_ends_it(
    home: Any, tmp_path: Path, eventually: Any
) -> None:
    go = tmp_path / "go"
    definition = {
        "id": "waits",
        "tasks": [
            {"id": "a", "handler": "site.wait_for_file", "params": {"path": str(go)}},
            {"id": "b", "handler": "debug.noop", "dependencies": ["a"]},
        ],
    }
    with home.start("run", home.write("waits.yaml", definition)) as run:
        execution = run.stderr.readline().strip()
        assert eventually(Path(f"{go}.started").exists)
        run.send_signal(signal.SIGINT)
        told = run.stderr.readline() + run.stderr.readline()
        assert f"{execution} is recorded and goes on as soon as a worker runs" in told, (told, run.poll(), run.stderr.read())
        assert f"`pipeline cancel {execution}` ends it" in told
        go.touch()  # the first Ctrl-C lets the task end
        _, err = run.communicate(timeout=60)
        assert run.returncode == 130, err
        assert err == "interrupted\n"
    assert home.is_quiet(), home.processes()
    assert home.json("status", execution)["tasks"]["a"]["status"] == "success"
    with home.start("up") as up:
        home.until_ready(up)
        assert home("status", execution, "--watch").code == 0
        code, _, err = ended(up, signal.SIGINT)
        assert (code, err) == (0, "")


def test_up_without_the_right_to_its_folder_says_so(home: Any) -> None:
    home.home.write_text("a file")
    done = home("up")
    assert done.code == 4
    assert str(home.home) in done.err
