"""Prefect with a local server on SQLite and its default task runner, a pool of threads in the flow's process.

A flow returns before its server has recorded the tasks, and what is not recorded is lost with the process: time is until
the server counts all task runs as completed. `returned` is when the flow itself was done.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from benchmarks.contenders.processes import spawn
from benchmarks.driver import Contender, Place, poll
from benchmarks.shapes import Graph


class Prefect(Contender):
    """A server, and flows in this process."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        os.environ |= {
            "PREFECT_HOME": str(self.folder / "home"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }
        self.server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(self.port)]
        self.server = spawn(command, None, self.folder / "server.log")
        poll(self._healthy, 0.1)
        prefect: Any = importlib.import_module("prefect")
        noop = prefect.task(name="noop")(_nothing)

        @prefect.flow(name="bench")
        def flow(needs: list[list[int]]) -> str:
            futures: list[Any] = []
            for before in needs:
                futures.append(noop.submit(wait_for=[futures[need] for need in before]))
            for future in futures:
                future.wait()
            return str(importlib.import_module("prefect.runtime.flow_run").id)

        self.flow = flow

    def _healthy(self) -> bool:
        if self.server is None or self.server.poll() is not None:
            raise RuntimeError("the server has ended")
        with suppress(OSError), urllib.request.urlopen(f"{self.api}/health", timeout=2) as answer:  # noqa: S310
            return bool(answer.status == 200)
        return False

    def prepare(self, graph: Graph) -> list[list[int]]:
        return [list(needs) for needs in graph.needs]

    def run(self, prepared: list[list[int]]) -> dict[str, float]:
        began = self.begin()
        flow_run = self.flow(prepared)
        returned = time.time()
        poll(lambda: self._recorded([flow_run]) == len(prepared), 0.1)
        return {"seconds": time.time() - began, "returned": returned - began}

    def run_many(self, graph: Graph, executions: int, clients: int) -> dict[str, float]:
        prepared = self.prepare(graph)
        with ThreadPoolExecutor(clients) as pool:
            began = self.begin()
            flow_runs = list(pool.map(self.flow, [prepared] * executions))
        poll(lambda: self._recorded(flow_runs) == len(prepared) * executions, 0.1)
        return {"seconds": time.time() - began}

    def _recorded(self, flow_runs: list[str]) -> int:
        wanted = {"flow_runs": {"id": {"any_": flow_runs}}, "task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
        request = urllib.request.Request(  # noqa: S310
            f"{self.api}/task_runs/count", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return int(answer.read())

    def stop(self) -> None:
        if self.server is not None:
            self.server.kill()  # it would wait for this process to hang up
            self.server.wait()


def _nothing() -> None:
    """Do nothing."""
