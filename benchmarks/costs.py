"""`python -m benchmarks.costs`: CPU seconds that one task takes, by kind of process, written as JSON.

A worker with two processes runs 1,000 no-ops and a join, several times: as it comes, where many tasks share a message, and
with a message for each task. CPU is read before and after from all processes of the worker and of the servers.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import psycopg
import redis

from benchmarks.contenders.processes import end, spawn
from benchmarks.driver import poll
from benchmarks.machine import describe
from benchmarks.services import Ground
from benchmarks.shapes import Graph, Shape
from config.settings import Settings
from pipeline import WorkflowEngine
from pipeline.result_store.connection import Database
from pipeline.result_store.migrations import upgrade
from pipeline.servers import Postgres

FILE = Path(__file__).with_name("costs.json")
#: what is run: as many tasks as the table of ratios compares first
SHAPE = Shape.named("W1000")
#: calls from which the cost of a heartbeat and of a look of recovery is taken
_CALLS = 1000
#: completions from which it is taken how long they hold their join
_COMPLETIONS = 300
#: seconds without work
_IDLE = 6.0

#: says when the counter was locked; BEFORE triggers run when it is
_WATCH = """
CREATE FUNCTION bench_watch() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM set_config('bench.locked', clock_timestamp()::text, true); RETURN NEW; END $$;
CREATE TRIGGER watch BEFORE UPDATE ON pipeline.join_counters FOR EACH ROW EXECUTE FUNCTION bench_watch();
"""
_UNWATCH = "DROP TRIGGER watch ON pipeline.join_counters; DROP FUNCTION bench_watch()"
_COMPLETE = """
SELECT c.outcome, extract(epoch FROM clock_timestamp() - current_setting('bench.locked')::timestamptz)::float8
  FROM pipeline.complete_task(%(execution)s, %(task)s, 1, %(worker)s, NULL, '10 s', 300, %(execution)s, %(next)s, 0, 'debug.noop', '10 s', false, false, '{}') c
"""


@dataclass(frozen=True, kw_only=True)
class TaskCost:
    """CPU seconds of one task."""

    #: the process of the pool that runs it
    pool: float
    #: the worker's main process, which fetches messages and hands them to the pool
    main: float
    #: Postgres, with all its processes, without what creating the execution took
    database: float
    broker: float
    #: seconds that the completion holds the counter of its join, without its commit
    join: float
    tasks_per_message: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What was measured."""

    #: a message for each task, as tasks have it whose runs take longer than 20 ms
    single: TaskCost
    #: tasks that are ready together share messages
    shared: TaskCost
    #: CPU seconds of Postgres for one heartbeat of one process, and for one look of one recovery that finds nothing
    heartbeat: float
    look: float
    #: seconds of one call to Postgres in which neither side works: until the other is awake, and has the answer
    wait: float
    #: CPU seconds of Postgres, and of who submits, to create one task of an execution of 1,000
    create: float
    submit: float
    #: shares of a core that a worker takes without work, by kind of process
    idle: Mapping[str, float]
    #: megabytes by kind of process; what processes share counts once
    memory: Mapping[str, float]
    #: machine, versions and date
    about: Mapping[str, Any]

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """What was written."""
        return cls(**{**found, "single": TaskCost(**found["single"]), "shared": TaskCost(**found["shared"])})

    @classmethod
    def read(cls, path: Path = FILE) -> Self:
        """What a file says."""
        return cls.from_json(json.loads(path.read_text("utf-8")))


class Bench:
    """One worker with so many processes, alone on servers of its own; a context manager."""

    def __init__(self, ground: Ground, processes: int, broker_url: str | None = None) -> None:
        self._ground, self._processes = ground, processes
        place = ground.place("costs")
        self._values = {
            "database_url": place.database_url, "broker_url": broker_url or place.redis_url, "home": place.folder,
            "queue": f"costs-{secrets.token_hex(4)}",
        }  # fmt: skip
        self._place, self._settings = place, Settings.model_validate(self._values)
        self.worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        upgrade(self._place.database_url)
        self.engine = WorkflowEngine(settings=self._settings)
        self.store = self.engine.installation.store
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PIPELINE_")}
        log = Path(self._place.folder) / "worker.log"
        self.worker = worker = spawn(
            [sys.executable, "-m", "pipeline", "worker", "--concurrency", str(self._processes)],
            {**kept, **{f"PIPELINE_{name.upper()}": value for name, value in self._values.items()}}, log,
        )  # fmt: skip
        poll(lambda: worker.poll() is not None or self.store.live_workers(after=0) >= self._processes, 0.05)
        if worker.poll() is not None:
            raise RuntimeError(log.read_text("utf-8", "replace")[-800:])
        return self

    def __exit__(self, *_: object) -> None:
        end(self.worker)
        if not self._on_redis:
            with self.engine.installation.celery.connection_for_write() as connection:
                connection.default_channel.queue_delete(self._values["queue"])
        self.engine.close()

    def run(self, graph: Graph, seconds: float = 0.0) -> float:
        """Seconds from the first claim to the end of an execution whose tasks take so long, all but a join."""
        return self.run_timed(graph, seconds)[0]

    def run_timed(self, graph: Graph, seconds: float = 0.0) -> tuple[float, float]:
        """The same, and the CPU seconds of ours that submitting took."""
        definition = self.engine.register(definition_of(graph, seconds))
        began = time.process_time()
        execution_id = self.engine.execute_workflow(definition)
        submitted = time.process_time() - began
        execution = self.engine.wait(execution_id, 300)
        if execution.status.value != "success" or execution.started_at is None or execution.finished_at is None:
            raise RuntimeError(f"{graph.name}: {execution.status.value}: {execution.error_message}")
        return (execution.finished_at - execution.started_at).total_seconds(), submitted

    def cpu(self) -> dict[str, float]:
        """CPU seconds since their start of all processes, by kind."""
        found = dict.fromkeys(("pool", "main", "recovery", "database", "create"), 0.0)
        for kind, process in self._all():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                # a server's processes that have ended are in what it says of its children
                ended = times.children_user + times.children_system if kind == "database" else 0.0
                found[kind] += times.user + times.system + ended
        return found | {"broker": self._broker()}

    def memory(self) -> dict[str, float]:
        """Megabytes of one process, by kind."""
        held: dict[str, list[float]] = {}
        for kind, process in self._all():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if kind in ("pool", "main", "recovery"):
                    full = process.memory_full_info()
                    held.setdefault(kind, []).append(getattr(full, "pss", full.uss) / 1e6)
        return {kind: round(statistics.mean(values), 1) for kind, values in held.items()}

    @contextmanager
    def messages_of_their_own(self) -> Iterator[None]:
        """No two no-ops share a message: an incarnation that runs nothing says that theirs are long runs."""
        worker_id = self.store.start_worker(name="witness", pid=os.getpid(), lease=3600)
        self.store.renew_worker(worker_id, 3600, ["debug.noop"])
        try:
            yield
        finally:
            self.store.end_worker(worker_id)

    def messages(self, graph: Graph) -> int:
        """How many messages the tasks of a graph have that are ready at its start."""
        definition_id = self.engine.installation.dispatcher.register(self.engine.register(definition_of(graph)))
        with psycopg.connect(self._place.database_url) as connection:
            row = connection.execute(
                """SELECT (SELECT count(*) FROM pipeline.share(%(id)s, e.tasks, true) s WHERE s.led_by IS NULL)
                     FROM (SELECT ARRAY(SELECT task_id FROM pipeline.workflow_tasks
                                         WHERE definition_id = %(id)s AND waits_for = '{}') AS tasks) e""",
                {"id": definition_id},
            ).fetchone()
        assert row is not None
        return int(row[0])

    def hold(self, graph: Graph, *, goes_on: bool) -> float:
        """Seconds that a completion holds the counter of its join: with the claim of what comes next, or without."""
        dispatcher = self.engine.installation.dispatcher
        execution_id = dispatcher.create(self.engine.register(definition_of(graph)), {}).execution_id
        worker_id = self.store.start_worker(name="witness", pid=os.getpid(), lease=3600, handlers=["debug.noop"])
        held = []
        with psycopg.connect(self._place.database_url, autocommit=True) as connection:
            connection.execute(_WATCH)
            for number in range(_COMPLETIONS):
                if not goes_on or number == 0:
                    self.store.claim(execution_id=execution_id, task_id=f"t{number}", epoch=0, worker_id=worker_id,
                                     handler="debug.noop")  # fmt: skip
                values = {"execution": execution_id, "task": f"t{number}", "worker": worker_id,
                          "next": f"t{number + 1}" if goes_on else None}  # fmt: skip
                row = connection.execute(_COMPLETE, values).fetchone()
                if row is None or row[0] != "done":
                    raise RuntimeError(f"a completion was answered with {row}")
                held.append(float(row[1]))
            connection.execute(_UNWATCH)
        self.store.cancel_execution(execution_id, None)
        self.store.end_worker(worker_id)
        return statistics.median(held)

    def cost_of_calls(self) -> tuple[float, float, float]:
        """CPU seconds of Postgres for one heartbeat, and for one look of recovery; and how long this waits for nothing."""
        worker_id = self.store.start_worker(name="witness", pid=os.getpid(), lease=3600)
        backend, taken = psutil.Process(self._backend), []
        for call in ("heartbeat", "look"):
            before, ours, began = backend.cpu_times(), time.process_time(), time.monotonic()
            for _ in range(_CALLS):
                if call == "heartbeat":
                    self.store.renew_worker(worker_id, 3600)
                    self.store.running_on(worker_id, age=5)
                else:
                    self.store.recovery_work()
            seconds, ours, after = time.monotonic() - began, time.process_time() - ours, backend.cpu_times()
            taken.append((after.user + after.system - before.user - before.system) / _CALLS)
        self.store.end_worker(worker_id)
        return taken[0], taken[1], max(0.0, (seconds - ours) / _CALLS - taken[1])

    @property
    def _backend(self) -> int:
        """The server's process behind our own connection, which creates executions."""
        assert isinstance(self.store.link, Database)
        return int(self.store.link.connection.info.backend_pid)

    def _all(self) -> Iterator[tuple[str, psutil.Process]]:
        assert self.worker is not None
        main = psutil.Process(self.worker.pid)
        yield "main", main
        for child in main.children():
            yield "recovery" if "scheduler" in child.cmdline() else "pool", child
        server = Postgres(self._ground.home).find()
        assert server is not None
        for process in (server, *server.children(recursive=True)):
            yield "create" if process.pid == self._backend else "database", process

    @property
    def _on_redis(self) -> bool:
        return self._values["broker_url"].startswith("redis")

    def _broker(self) -> float:
        """As Redis says itself, to the microsecond: it takes less than the system's clock ticks; RabbitMQ as the system does."""
        if not self._on_redis:
            times = [process.cpu_times() for process in psutil.process_iter() if process.name().startswith("beam")]
            return sum(taken.user + taken.system for taken in times)
        client = redis.Redis.from_url(self._place.redis_url)
        found = client.info("cpu")
        client.close()
        return float(found["used_cpu_user"]) + float(found["used_cpu_sys"])


def definition_of(graph: Graph, seconds: float = 0.0) -> dict[str, Any]:
    """Tasks that do nothing, or nothing for so long; what waits for others is a no-op either way."""
    tasks = list[dict[str, Any]]()
    for number, needs in enumerate(graph.needs):
        task: dict[str, Any] = {"id": f"t{number}", "handler": "debug.noop", "dependencies": [f"t{need}" for need in needs]}
        if seconds and not needs:
            task |= {"handler": "debug.sleep", "params": {"seconds": seconds}}
        tasks.append(task)
    return {"id": f"{graph.name}-{seconds:g}".replace(".", "_"), "version": "1", "tasks": tasks}


def per_task(before: Mapping[str, float], after: Mapping[str, float], tasks: int) -> dict[str, float]:
    """What was used between two readings, for each of so many tasks."""
    return {kind: max(0.0, after[kind] - before[kind]) / tasks for kind in after}


def measure(ground: Ground, *, repeats: int, broker_url: str | None = None) -> Costs:
    """Run the worker and read the clocks; half a minute."""
    graph, warm = SHAPE.graph(), Shape.named("W100").graph()
    tasks = repeats * len(graph)
    used: list[TaskCost] = []
    with Bench(ground, 2, broker_url) as bench:
        for shared in (False, True):
            with nullcontext() if shared else bench.messages_of_their_own():
                bench.run(warm)
                messages = bench.messages(graph)
                before, submitted = bench.cpu(), 0.0
                for _ in range(repeats):
                    submitted += bench.run_timed(graph)[1]
                found = per_task(before, bench.cpu(), tasks)
            used.append(
                TaskCost(
                    pool=found["pool"], main=found["main"], database=found["database"], broker=found["broker"],
                    join=bench.hold(graph, goes_on=shared), tasks_per_message=(len(graph) - 1) / messages,
                )
            )  # fmt: skip
        memory = bench.memory()
        heartbeat, look, wait = bench.cost_of_calls()
        before, began = bench.cpu(), time.monotonic()
        time.sleep(_IDLE)
        taken = time.monotonic() - began
        idle = {kind: round((value - before[kind]) / taken, 5) for kind, value in bench.cpu().items() if kind != "create"}
    return Costs(
        single=used[0], shared=used[1], heartbeat=heartbeat, look=look, wait=wait, create=found["create"],
        submit=submitted / tasks, idle=idle, memory=memory, about=describe(ground.server_versions(), ["ours"]),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="executions of each kind (default 5)")
    parser.add_argument("--broker-url", metavar="URL", help="of a RabbitMQ on this machine that does nothing else; default: a Redis")
    parser.add_argument("--output", type=Path, default=FILE, metavar="FILE", help=f"default {FILE}")
    options = parser.parse_args(argv)
    with Ground() as ground:
        costs = measure(ground, repeats=options.repeats, broker_url=options.broker_url)
    text = json.dumps(asdict(costs), indent=2, ensure_ascii=False)
    options.output.write_text(text + "\n", "utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
