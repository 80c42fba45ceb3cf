"""`python -m benchmarks.calls`: what a claim and a completion take, in bare round trips to the same Postgres.

One connection, as a worker's process has it: the time of a call is that of the store's method, with all that Python does for
it. A bare round trip is psycopg's `SELECT 1`, measured in the same repeat.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from benchmarks.costs import definition_of
from benchmarks.machine import describe, line
from benchmarks.race import Ratio
from benchmarks.services import Ground
from benchmarks.shapes import Shape
from benchmarks.table import markdown, times
from config.settings import Settings
from pipeline import WorkflowEngine
from pipeline.result_store.connection import Database
from pipeline.result_store.migrations import upgrade
from pipeline.result_store.rows import NOTHING, Fence, Follow
from pipeline.result_store.store import ResultStore

HANDLER = "debug.noop"
#: calls of each kind in one repeat; the first of them are not counted
CALLS, WARM = 1_000, 100


class Calls:
    """Executions whose tasks nobody else runs; each method is one repeat of one kind of call.

    Args:
        ground: the servers.
    """

    def __init__(self, ground: Ground) -> None:
        place = ground.place("calls")
        upgrade(place.database_url)
        settings = {"database_url": place.database_url, "broker_url": place.redis_url, "home": place.folder}
        self._engine = WorkflowEngine(settings=Settings.model_validate(settings))
        self._store = ResultStore.open(place.database_url, keep_plans=True)
        self._worker = self._store.start_worker(name="calls", pid=1, lease=3600, handlers=[HANDLER])

    def bare(self) -> float:
        """Seconds of `SELECT 1`."""
        assert isinstance(self._store.link, Database)
        connection = self._store.link.connection
        return median_of(lambda _: connection.execute("SELECT 1").fetchone(), range(CALLS))

    def claim(self) -> float:
        """Seconds of a claim."""
        execution = self._start("W")
        return median_of(lambda n: self._claim(execution, n), range(CALLS))

    def complete(self) -> float:
        """Seconds of a completion that releases nothing."""
        execution = self._start("W")
        for n in range(CALLS):
            self._claim(execution, n)
        return median_of(lambda n: self._complete(execution, n), range(CALLS))

    def complete_and_claim(self) -> float:
        """Seconds of one that claims the next task of its message."""
        execution = self._start("W")
        self._claim(execution, 0)

        def call(n: int) -> None:
            after = Follow(room=1e9, execution_id=execution, task_id=f"t{n + 1}", epoch=0, handler=HANDLER)
            self._complete(execution, n, after)

        return median_of(call, range(CALLS - 1))

    def release_and_claim(self) -> float:
        """Seconds of one that releases a task and claims it, and so waits for the disk."""
        execution = self._start("D")
        self._claim(execution, 0)
        return median_of(lambda n: self._complete(execution, n, Follow(room=1e9)), range(CALLS - 1))

    def _start(self, kind: str) -> str:
        definition = self._engine.register(definition_of(Shape.named(f"{kind}{CALLS}").graph()))
        return self._engine.installation.dispatcher.create(definition, {}).execution_id

    def _claim(self, execution: str, number: int) -> None:
        claim = self._store.claim(
            execution_id=execution, task_id=f"t{number}", epoch=0, worker_id=self._worker, handler=HANDLER
        )
        if claim is None:
            raise RuntimeError(f"task t{number} of {execution} cannot be claimed")

    def _complete(self, execution: str, number: int, after: Follow = NOTHING) -> None:
        fence = Fence(execution_id=execution, task_id=f"t{number}", epoch=1, worker_id=self._worker)
        ended = self._store.complete(fence, None, after)
        if ended.outcome != "done" or (ended.next is None) != (after is NOTHING):
            raise RuntimeError(f"the completion of t{number} was answered with {ended}")

    def close(self) -> None:
        """Let go of the connections."""
        self._store.close()
        self._engine.close()


def median_of(call: Callable[[int], object], numbers: Iterable[int]) -> float:
    """Seconds of a call, the first ones left out."""
    taken = []
    for number in numbers:
        began = time.perf_counter()
        call(number)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[WARM:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="repeats of each kind (default 5)")
    options = parser.parse_args(argv)
    with Ground() as ground:
        calls = Calls(ground)
        kinds = {
            "claim": calls.claim,
            "completion that releases nothing": calls.complete,
            "completion that claims the next task of its message": calls.complete_and_claim,
            "completion that releases a task and claims it": calls.release_and_claim,
        }
        runs = [(calls.bare(), [call() for call in kinds.values()]) for _ in range(options.repeats)]
        calls.close()
        about = describe(ground.server_versions(), ["ours"])
    bare = statistics.median(bare for bare, _ in runs)
    rows = [["SELECT 1", f"{bare * 1e6:.0f}", ""]]
    for number, name in enumerate(kinds):
        seconds, ratios = [taken[number] for _, taken in runs], [taken[number] / bare for bare, taken in runs]
        ratio = Ratio(median=statistics.median(ratios), least=min(ratios), greatest=max(ratios))
        rows.append([name, f"{statistics.median(seconds) * 1e6:.0f}", times(ratio)])
    print(markdown(["call", "microseconds", "bare round trips"], rows))
    print(f"\n{line(about)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
