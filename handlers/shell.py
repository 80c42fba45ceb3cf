"""Programs, run without a shell."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from pipeline import AttemptLost, Context, Fail, ParamsError, Refused, handler

_PATH = "/usr/local/bin:/usr/bin:/bin"
#: seconds between two looks at whether the program ended or the task was cancelled
_LOOK = 0.1
_CHUNK = 65_536
#: reads after the program's end, enough to empty a pipe: a child that it left behind may write for ever
_LAST_ROUNDS = 32


@handler("shell.run")
def run(
    argv: Annotated[list[str], Field(min_length=1)],
    stdin: str | None = None,
    env: dict[str, str] | None = None,
    check: bool = True,
    max_output: Annotated[int, Field(ge=0)] = 65_536,
    *,
    context: Context,
) -> dict[str, Any]:
    """Run a program and wait for it; no shell ever reads the arguments.

    The program starts in a fresh empty folder that is removed afterwards, with PATH, HOME (that folder), LANG and
    `env` as its whole environment, and leads a process group of its own. When it ends, and when the task is cancelled,
    lost or times out, that whole group is killed. The task's timeout is the only limit on time.

    Params:
        argv: the program and its arguments.
        stdin: text for its standard input; nothing by default.
        env: further environment variables.
        check: false lets a non-zero exit code be a result.
        max_output: bytes kept of stdout and of stderr, each from its end.

    Result: `{"exit_code", "stdout", "stderr"}`; an exit code below 0 is the signal that ended the program.

    Errors: Refused where the site does not allow it; Fail where the program cannot be started; RuntimeError with the
    end of stderr where `check` holds and the exit code is not 0.

    Settings: PIPELINE_SHELL_ENABLED; off by default.
    """
    if not context.settings.get("shell_enabled", False):
        raise Refused("shell.run is off; PIPELINE_SHELL_ENABLED=true allows programs to be run")
    variables = env or {}
    if any("\0" in text for text in (*argv, *variables, *variables.values())) or any("=" in name for name in variables):
        raise ParamsError("argv and env hold no NUL characters, and the names in env no '='")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = {"PATH": _PATH, "HOME": folder, "LANG": "C.UTF-8", **variables}
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
        except OSError as exc:
            raise Fail(f"{argv[0]!r} cannot be started: {exc}") from exc
        with process:
            try:
                stdout, stderr = _talk(process, (stdin or "").encode(), max_output, context)
            finally:
                # the leader is still unreaped, so its group's number cannot have gone to anybody else
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
    if check and process.returncode != 0:
        raise RuntimeError(f"{argv[0]!r} ended with exit code {process.returncode}: {stderr[-2000:].strip()}")
    return {"exit_code": process.returncode, "stdout": stdout, "stderr": stderr}


@dataclass(kw_only=True)
class _Tail:
    """The end of a stream, in bounded memory."""

    limit: int
    kept: bytearray = field(default_factory=bytearray)
    dropped: int = 0

    def add(self, chunk: bytes) -> None:
        self.kept += chunk
        surplus = max(0, len(self.kept) - self.limit)
        self.dropped += surplus
        del self.kept[:surplus]

    def __str__(self) -> str:
        # NUL is legal in a stream and not in a Postgres text
        text = self.kept.decode("utf-8", "replace").replace("\0", "\ufffd")
        return f"[{self.dropped} bytes before this are left out]\n{text}" if self.dropped else text


def _talk(process: subprocess.Popen[bytes], given: bytes, limit: int, context: Context) -> tuple[str, str]:
    """Feed and read the program until it ends, or for as long as it is the task's."""
    assert process.stdin and process.stdout and process.stderr
    tails = {process.stdout.fileno(): _Tail(limit=limit), process.stderr.fileno(): _Tail(limit=limit)}
    pending = memoryview(given)
    with selectors.DefaultSelector() as selector:
        for descriptor in tails:
            selector.register(descriptor, selectors.EVENT_READ)
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin.fileno(), selectors.EVENT_WRITE)
        rounds = _LAST_ROUNDS
        while rounds:
            # asked before the look at the pipes: what it wrote before its end is then in them
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
            rounds -= ended
            if context.cancelled:
                raise AttemptLost(f"{process.args!r} was stopped: the task was cancelled or given to another worker")
            ready = selector.select(0 if ended else _LOOK if selector.get_map() else _LOOK / 20)
            for key, _ in ready:
                if key.fd in tails:
                    chunk = os.read(key.fd, _CHUNK)
                    tails[key.fd].add(chunk)
                    if not chunk:
                        selector.unregister(key.fd)
                    continue
                try:
                    pending = pending[os.write(key.fd, pending[:_CHUNK]) :] if pending else pending
                except BrokenPipeError:
                    pending = pending[:0]
                if not pending:
                    selector.unregister(key.fd)
                    process.stdin.close()
            if ended and not ready:
                break
    stdout, stderr = tails.values()
    return str(stdout), str(stderr)
