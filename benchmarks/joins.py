"""`python -m benchmarks.joins`: many connections complete tasks at once, and what the counting of a join costs them.

Three ways: all tasks of one join that one counter counts, which is one row that every completion locks; of one join that
slots count, as the compiler has it for wide headers; and a join for each connection, which is the most that slots could
gain. Connections call `complete_task` from within the server, one transaction each, so that nothing but Postgres is
measured; each completion claims the next task besides, as workers have it do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import psycopg

from benchmarks.machine import describe, line
from benchmarks.race import Ratio
from benchmarks.services import Ground
from benchmarks.table import markdown, times
from config.settings import Settings
from pipeline import WorkflowDefinition, compiler
from pipeline.app import Installation
from pipeline.result_store.migrations import upgrade

#: connections that complete at the same time
CONNECTIONS = (1, 8, 32)
WAYS = ("one counter", "slots", "a join each")
#: completions of a run, by all connections together
COMPLETIONS = 9_600

#: completes its share of the tasks, one after the other
_DRIVE = """
DO $$ DECLARE
    next_ text;
    done text;
BEGIN
    FOR number_ IN {first} .. {last} LOOP
        next_ := CASE WHEN number_ < {last} THEN 't' || number_ + 1 END;
        SELECT c.outcome INTO done FROM pipeline.complete_task(
            '{execution}', 't' || number_, 1, {worker}, NULL, '10 s', 300, '{execution}', next_, 0, 'debug.noop', '10 s',
            false, false, '{}') c;
        IF done <> 'done' THEN
            RAISE EXCEPTION 'a completion was answered with %', done;
        END IF;
        COMMIT;
    END LOOP;
END $$
"""


class Fan:
    """Completes the tasks of executions of one wide join.

    Args:
        ground: the servers.
    """

    def __init__(self, ground: Ground) -> None:
        place = ground.place("joins")
        self._url = place.database_url
        upgrade(self._url)
        settings = {"database_url": self._url, "broker_url": place.redis_url, "home": place.folder}
        self._installation = Installation.open(Settings.model_validate(settings))
        self._worker = self._installation.store.start_worker(name="fan", pid=1, lease=3600, handlers=["debug.noop"])

    def make_partitions(self, number: int) -> None:
        """Have so many partitions, the last but one of today; only once."""
        with psycopg.connect(self._url, autocommit=True) as connection:
            for ago in range(number - 1, -1, -1):
                connection.execute(
                    "SELECT set_config('pipeline.fake_now', (now() - %s * interval '1 day')::text, false)", (ago,)
                )
                connection.execute("SELECT pipeline.make_partitions(1, 1073741824)")

    def seconds(self, connections: int, way: str, *, keep_plans: bool = True) -> float:
        """How long so many connections take for all completions."""
        one_join = way != WAYS[2]
        each = COMPLETIONS // connections
        widths = [COMPLETIONS] if one_join else [each] * connections
        executions = [self._execution(width, slots=way != WAYS[0]) for width in widths]
        work = []
        for number in range(connections):
            execution = executions[number % len(executions)]
            first = number * each if one_join else 0
            claimed = self._installation.store.claim(
                execution_id=execution, task_id=f"t{first}", epoch=0, worker_id=self._worker, handler="debug.noop"
            )
            if claimed is None:
                raise RuntimeError(f"task t{first} of {execution} cannot be claimed")
            work.append(_DRIVE.format(first=first, last=first + each - 1, execution=execution, worker=self._worker))
        links = [psycopg.connect(self._url, autocommit=True) for _ in work]
        for link in links:
            link.execute(
                "SELECT set_config('plan_cache_mode', %s, false)", ("force_generic_plan" if keep_plans else "auto",)
            )
        with ThreadPoolExecutor(connections) as pool:
            began = time.monotonic()
            for _ in pool.map(lambda link, text: link.execute(text.encode()), links, work):
                pass
            taken = time.monotonic() - began
        for link in links:
            link.close()
        return taken

    def _execution(self, width: int, *, slots: bool) -> str:
        tasks = [{"id": f"t{number}", "handler": "debug.noop"} for number in range(width)]
        join = {"id": "join", "handler": "debug.noop", "dependencies": [task["id"] for task in tasks]}
        definition = WorkflowDefinition.model_validate(
            {"id": f"fan{width}{slots}", "version": "1", "tasks": [*tasks, join]}
        )
        with patch.object(compiler, "WIDE", compiler.WIDE if slots else sys.maxsize):
            return self._installation.dispatcher.create(definition, {}).execution_id

    def close(self) -> None:
        """Let go of the connections."""
        self._installation.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.joins", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each (default 5)")
    options = parser.parse_args(argv)
    rows = []
    with Ground() as ground:
        fan = Fan(ground)
        for way in WAYS:
            fan.seconds(8, way)
        for connections in CONNECTIONS:
            runs = [[fan.seconds(connections, way) for way in WAYS] for _ in range(options.repeats)]
            medians = [statistics.median(taken) for taken in zip(*runs, strict=True)]
            ratio = [one / slots for one, slots, _ in runs]
            gain = Ratio(median=medians[0] / medians[1], least=min(ratio), greatest=max(ratio))
            rows.append([f"{connections}", *(f"{COMPLETIONS / taken:,.0f}" for taken in medians), times(gain)])
        fan.close()
        about = describe(ground.server_versions(), ["ours"])
    print(markdown(["connections", *(f"{way}, tasks/s" for way in WAYS), "slots / one counter"], rows))
    print(f"\n{line(about)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
