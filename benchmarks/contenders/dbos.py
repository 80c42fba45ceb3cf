"""DBOS on Postgres, with no-op steps gathered level by level, as its documents show parallel steps.

`Steps` is one workflow in one process, where its steps run; time is until the workflow has returned, all being recorded.
`Queues` has each task as a child workflow on a queue that two worker processes listen to, polled once a second as is the
default; time is until the last task's body ran, for the parent learns of its end by a poll.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from dbos import DBOS

from benchmarks.contenders.processes import end, spawn
from benchmarks.driver import Contender, Place, poll
from benchmarks.shapes import Graph

_QUEUE = "bench"


@DBOS.step()
async def step() -> None:
    """Do nothing."""


@DBOS.workflow()
async def in_steps(levels: list[int]) -> None:
    """Run so many steps, level by level."""
    for width in levels:
        await asyncio.gather(*(step() for _ in range(width)))


@DBOS.workflow()
async def child() -> float:
    """Do nothing, and say when."""
    return time.time()


@DBOS.workflow()
async def on_queue(levels: list[int]) -> float:
    """Run so many children, level by level; when the last of them ran."""
    last = 0.0
    for width in levels:
        handles = await asyncio.gather(*(DBOS.enqueue_workflow_async(_QUEUE, child) for _ in range(width)))
        last = max(await asyncio.gather(*(handle.get_result() for handle in handles)))
    return last


async def _many(workflow: Any, levels: list[int], executions: int, clients: int) -> list[Any]:
    """What so many of a workflow return, started by clients at once."""

    async def client(count: int) -> list[Any]:
        handles = [await DBOS.start_workflow_async(workflow, levels) for _ in range(count)]
        return [await handle.get_result() for handle in handles]

    counts = [executions // clients + (n < executions % clients) for n in range(clients)]
    return [answer for answers in await asyncio.gather(*map(client, counts)) for answer in answers]


def launch(database_url: str) -> None:
    """Start DBOS in this process."""
    url = database_url.replace("postgresql://", "postgresql+psycopg://")
    DBOS(config={"name": "bench", "system_database_url": url, "application_version": "1", "log_level": "WARNING"})


class Steps(Contender):
    """One process."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.loop = asyncio.new_event_loop()

    def start(self) -> None:
        launch(self.place.database_url)
        DBOS.launch()

    def prepare(self, graph: Graph) -> list[int]:
        return [len(level) for level in graph.levels]

    def run(self, prepared: list[int]) -> dict[str, float]:
        began = self.begin()
        self.loop.run_until_complete(in_steps(prepared))
        return {"seconds": time.time() - began}

    def run_many(self, graph: Graph, executions: int, clients: int) -> dict[str, float]:
        began = self.begin()
        self.loop.run_until_complete(_many(in_steps, self.prepare(graph), executions, clients))
        return {"seconds": time.time() - began}

    def stop(self) -> None:
        DBOS.destroy()


class Queues(Steps):
    """Two worker processes beside the one that submits."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.workers: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        launch(self.place.database_url)
        DBOS.listen_queues([])
        DBOS.launch()
        DBOS.register_queue(_QUEUE)
        command = [sys.executable, "-m", "benchmarks.contenders.dbos", self.place.database_url]
        for number in range(2):
            log = self.folder / f"worker-{number}.log"
            self.workers.append(spawn(command, None, log))
            poll(partial(_is_ready, log), 0.05)

    def run(self, prepared: list[int]) -> dict[str, float]:
        began = self.begin()
        return {"seconds": self.loop.run_until_complete(on_queue(prepared)) - began}

    def run_many(self, graph: Graph, executions: int, clients: int) -> dict[str, float]:
        began = self.begin()
        ends = self.loop.run_until_complete(_many(on_queue, self.prepare(graph), executions, clients))
        return {"seconds": max(ends) - began}

    def stop(self) -> None:
        for worker in self.workers:
            end(worker)
        super().stop()


def _is_ready(log: Path) -> bool:
    return b"ready" in log.read_bytes()


def work(database_url: str) -> None:
    """A worker: runs what is on the queue until it is ended."""
    launch(database_url)
    DBOS.listen_queues([_QUEUE])
    DBOS.launch()
    print("ready", flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    work(sys.argv[1])
