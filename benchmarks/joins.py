"""`python -m benchmarks.joins`: many connections complete tasks at once, of one wide join and of a join for each of them.

A join's counter is one row, which every completion of its tasks locks. What that costs is the ratio of the two, and no way
of cutting the counter into slots could gain more. Connections call `complete_task` from within the server, one transaction
each, so that nothing but Postgres is measured; each completion claims the next task besides, as workers have it do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import psycopg

from benchmarks.machine import describe, line
from benchmarks.race import Ratio
from benchmarks.services import Ground
from benchmarks.table import markdown, times
from config.settings import Settings
from pipeline import WorkflowDefinition
from pipeline.app import Installation
from pipeline.result_store.migrations import upgrade

#: connections that complete at the same time
CONNECTIONS = (1, 8, 32)
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
            '{execution}', 't' || number_, 1, {worker}, NULL, '10 s', 300, next_, 0, 'debug.noop', '10 s') c;
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

    def seconds(self, connections: int, *, one_join: bool) -> float:
        """How long so many connections take for all completions: of one execution, or of one for each."""
        each = COMPLETIONS // connections
        executions = (
            [self._execution(COMPLETIONS)] * connections
            if one_join
            else [self._execution(each) for _ in range(connections)]
        )
        work = []
        for number, execution in enumerate(executions):
            first = number * each if one_join else 0
            claimed = self._installation.store.claim(
                execution_id=execution, task_id=f"t{first}", epoch=0, worker_id=self._worker, handler="debug.noop"
            )
            if claimed is None:
                raise RuntimeError(f"task t{first} of {execution} cannot be claimed")
            work.append(_DRIVE.format(first=first, last=first + each - 1, execution=execution, worker=self._worker))
        links = [psycopg.connect(self._url, autocommit=True) for _ in work]
        with ThreadPoolExecutor(connections) as pool:
            began = time.monotonic()
            for _ in pool.map(lambda link, text: link.execute(text.encode()), links, work):
                pass
            taken = time.monotonic() - began
        for link in links:
            link.close()
        return taken

    def _execution(self, width: int) -> str:
        tasks = [{"id": f"t{number}", "handler": "debug.noop"} for number in range(width)]
        join = {"id": "join", "handler": "debug.noop", "dependencies": [task["id"] for task in tasks]}
        definition = WorkflowDefinition.model_validate({"id": f"fan{width}", "version": "1", "tasks": [*tasks, join]})
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
        fan.seconds(8, one_join=True)
        for connections in CONNECTIONS:
            pairs = [
                (fan.seconds(connections, one_join=True), fan.seconds(connections, one_join=False))
                for _ in range(options.repeats)
            ]
            together, apart = (statistics.median(taken) for taken in zip(*pairs, strict=True))
            ratios = [one / many for one, many in pairs]
            ratio = Ratio(median=together / apart, least=min(ratios), greatest=max(ratios))
            rows.append(
                [f"{connections}", *(f"{COMPLETIONS / taken:,.0f}" for taken in (together, apart)), times(ratio)]
            )
        fan.close()
        about = describe(ground.server_versions(), ["ours"])
    print(
        markdown(
            ["connections", "one join, tasks/s", "a join for each, tasks/s", "time, one join / a join for each"], rows
        )
    )
    print(f"\n{line(about)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
