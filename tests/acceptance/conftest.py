"""What people and scripts do: commands as processes, on the tests' servers or on nothing but an empty folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest

TESTS = Path(__file__).parents[1]
MODULE = ("-m", "pipeline")
#: imports the command once and forks for each call, which takes a tenth of the time of a fresh interpreter
FORKS = """
import json, os, sys, pipeline.app, pipeline.cli
pipeline.app.import_modules(pipeline.app.Settings().handler_modules)
for line in sys.stdin:
    order = json.loads(line)
    if (child := os.fork()) == 0:
        os.setsid()
        for number, path in enumerate((os.devnull, order["out"], order["err"])):
            os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.clear()
        os.environ.update(order["env"])
        os.chdir(order["folder"])
        sys.path[:0] = order["env"].get("PYTHONPATH", "").split(os.pathsep)
        sys.exit(pipeline.cli.main(order["arguments"]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Cli:
    """`pipeline` in an environment, from a folder."""

    env: Mapping[str, str]
    folder: Path
    forks: subprocess.Popen[str]

    def __call__(self, *arguments: str, program: tuple[str, ...] = (), **env: str) -> Done:
        """Run to the end: `pipeline`, or another program of a fresh interpreter."""
        if program:
            ran = subprocess.run(
                [sys.executable, *program, *arguments], env={**self.env, **env}, cwd=self.folder, check=False,
                capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            done = Done(code=ran.returncode, out=ran.stdout, err=ran.stderr)
        else:
            out, err = self.folder / ".stdout", self.folder / ".stderr"
            order = {
                "arguments": arguments, "env": {**self.env, **env}, "folder": str(self.folder), "out": str(out),
                "err": str(err),
            }  # fmt: skip
            assert self.forks.stdin is not None and self.forks.stdout is not None
            self.forks.stdin.write(json.dumps(order) + "\n")
            self.forks.stdin.flush()
            done = Done(code=int(self.forks.stdout.readline()), out=out.read_text(), err=err.read_text())
        assert "Traceback" not in done.err, done.err
        return done

    def json(self, *arguments: str, code: int = 0, **env: str) -> Any:
        """The one document on stdout."""
        done = self(*arguments, "--json", **env)
        assert done.code == code, done
        return json.loads(done.out)

    @contextmanager
    def start(
        self, *arguments: str, program: tuple[str, ...] = MODULE, **env: str
    ) -> Iterator[subprocess.Popen[str]]:
        """A process with pipes; killed with its session where the test left it running."""
        running = subprocess.Popen(
            [sys.executable, *program, *arguments], env={**self.env, **env}, cwd=self.folder, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        with running:
            try:
                yield running
            finally:
                if running.poll() is None:
                    running.send_signal(signal.SIGTERM)
                    try:
                        running.wait(30)
                    except subprocess.TimeoutExpired:
                        os.killpg(running.pid, signal.SIGKILL)

    def write(self, name: str, content: Any) -> str:
        """A file in the folder, as JSON where it is no text; returns its name."""
        text = content if isinstance(content, str) else json.dumps(content)
        (self.folder / name).write_text(text)
        return name


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def plain_env() -> dict[str, str]:
    """The environment without our variables."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PIPELINE_", "FLOWER_"))}


@pytest.fixture(scope="session")
def forks() -> Iterator[subprocess.Popen[str]]:
    """The process that commands are forked from."""
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, env=plain_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        yield running
        running.kill()


@pytest.fixture
def cli(site: Any, tmp_path: Path, forks: subprocess.Popen[str]) -> Cli:
    """`pipeline` on an installation for this test alone, without workers."""
    return Cli(env=site.env, folder=tmp_path, forks=forks)


@pytest.fixture(scope="session")
def worked_site(sites: Callable[..., Any]) -> Iterator[Any]:
    """An installation with one worker, shared by tests that add to it only."""
    made = sites()
    with made.worker(pool="threads", concurrency=4):
        yield made
    assert made.engine.installation.store.audit() == []


@pytest.fixture
def worked(worked_site: Any, tmp_path: Path, forks: subprocess.Popen[str]) -> Cli:
    """`pipeline` on an installation with a worker."""
    return Cli(env=worked_site.env, folder=tmp_path, forks=forks)


@dataclass(frozen=True, kw_only=True)
class Home(Cli):
    """`pipeline` with nothing set but its home."""

    home: Path

    def processes(self) -> list[str]:
        """What runs for this home."""
        found = []
        for process in psutil.process_iter():
            try:
                told = process.environ().get("PIPELINE_HOME") == str(self.home)
                if process.status() != psutil.STATUS_ZOMBIE and (told or str(self.home) in " ".join(process.cmdline())):
                    found.append(f"{process.pid} {' '.join(process.cmdline())}")
            except psutil.Error:
                continue
        return found

    def until_ready(self, up: subprocess.Popen[str]) -> list[str]:
        """The lines before `ready`."""
        lines: list[str] = []
        assert up.stdout is not None and up.stderr is not None
        for line in up.stdout:
            if line == "ready\n":
                return lines
            lines.append(line)
        pytest.fail(f"never ready: {lines} {up.stderr.read()}")

    def is_quiet(self) -> bool:
        """Whether nothing runs; processes that were told to end may take a moment to be gone."""
        return eventually(lambda: not self.processes(), 30)


@pytest.fixture
def home(tmp_path: Path, forks: subprocess.Popen[str]) -> Iterator[Home]:
    """An empty folder, and nothing set."""
    # not below pytest's folder, which another session of root's closes to the servers' user
    with TemporaryDirectory(prefix="pipeline-home-", ignore_cleanup_errors=True) as parent:
        made = _home(Path(parent) / "home", tmp_path, forks)
        yield made
        assert made.is_quiet(), made.processes()


def _home(folder: Path, tmp_path: Path, forks: subprocess.Popen[str]) -> Home:
    env = {
        **plain_env(), "PIPELINE_HOME": str(folder), "PIPELINE_FLOWER_PORT": "0", "PIPELINE_SWEEP": "0.2",
        "PIPELINE_DRAIN": "60",
        "PIPELINE_HANDLERS": "site_handlers", "PYTHONPATH": str(TESTS),
    }  # fmt: skip
    return Home(env=env, folder=tmp_path, forks=forks, home=folder)


def eventually(condition: Callable[[], Any], timeout: float = 60) -> bool:
    """Whether it became true in time."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., bool]:
    return eventually
