"""A contender in a process of its own: commands come in by standard input, answers go out, one JSON document a line.

`python -m benchmarks.driver MODULE:CLASS PLACE`, with the Python of the contender's environment; standard library only.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shapes import CLIENTS, Graph, Shape

#: what everybody runs before the first time is taken
WARM_UP = Shape.named("W20")


class CannotRun(Exception):  # noqa: N818
    """This contender has no way to run the shape; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where a contender runs: servers that it shares with nobody's data, and a folder."""

    name: str
    database_url: str
    redis_url: str
    folder: str
    graphs: str = ""


class Contender(ABC):
    """A system with two worker processes, or what comes next to that."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.folder = Path(place.folder)
        self.announce: Callable[[], None] = lambda: None

    def begin(self) -> float:
        """The time from which a run counts; the parent hears of it, so that no preparation counts as a long run."""
        self.announce()
        return time.time()

    @abstractmethod
    def start(self) -> None:
        """Start workers, and return once they could run a task."""

    @abstractmethod
    def prepare(self, graph: Graph) -> Any:
        """The graph in the system's own terms: what a program has before it submits, and no part of the time."""

    @abstractmethod
    def run(self, prepared: Any) -> dict[str, float]:
        """Submit one and wait for its end; `seconds` of it, and whatever else is of interest.

        Raises:
            CannotRun: it has no way to run this.
        """

    def run_many(self, graph: Graph, executions: int, clients: int) -> dict[str, float]:
        """Submit many from several clients at once, and wait for the end of all."""
        raise CannotRun("not measured")

    def run_together(self, graph: Graph, executions: int, clients: int) -> dict[str, float]:
        """The same, where each client submits all of its own in one call."""
        raise CannotRun("not measured")

    def submit(self, graph: Graph, *, known: bool) -> dict[str, float]:
        """Hand over one; `seconds` until the call returns."""
        raise CannotRun("not measured")

    def start_worker(self, processes: int) -> dict[str, float]:
        """Start one more worker; `seconds` until each of its processes could run a task."""
        raise CannotRun("not measured")

    def idle(self, seconds: int) -> dict[str, float]:
        """Do nothing; `cpu`, the seconds of CPU that this cost for each second, with two workers."""
        raise CannotRun("not measured")

    def memory(self, graph: Graph) -> dict[str, float]:
        """Run one with fresh workers; `megabytes`, the most that they held at once."""
        raise CannotRun("not measured")

    @abstractmethod
    def stop(self) -> None:
        """End all processes."""


def measure(contender: Contender, shape: Shape) -> dict[str, Any]:
    """One run of a shape."""
    if shape.kind == "idle":
        return contender.idle(shape.size)
    if shape.kind == "start":
        return contender.start_worker(shape.size)
    if shape.kind in ("submit", "again"):
        return contender.submit(shape.graph(), known=shape.kind == "again")
    if shape.kind == "M":
        return contender.memory(shape.graph())
    if shape.kind == "S":
        return contender.run_many(shape.graph(), shape.size, CLIENTS)
    if shape.kind == "B":
        return contender.run_together(shape.graph(), shape.size, CLIENTS)
    graphs = shape.graphs(Path(contender.place.graphs) if contender.place.graphs else None)
    if not graphs:
        raise CannotRun("no graphs there")
    answers = [contender.run(contender.prepare(graph)) for graph in graphs]
    if len(answers) == 1:
        return dict(answers[0])
    return {"seconds": sum(a["seconds"] for a in answers), "tasks": sum(map(len, graphs)), "graphs": len(graphs)}


def poll(look: Callable[[], Any], pause: float = 0.005) -> Any:
    """The first look that shows something; the parent knows how long to wait."""
    while not (found := look()):
        time.sleep(pause)
    return found


def serve(contender: Contender, commands: Any, answers: Any) -> None:
    """Answer commands until one says stop, or the parent is gone."""

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        contender.start()
        with suppress(CannotRun):
            contender.run(contender.prepare(WARM_UP.graph()))
        contender.announce = lambda: answer(began=True)
        answer(started=True)
        for line in commands:
            if line.strip() == "stop":
                break
            try:
                answer(**measure(contender, Shape.named(line.strip())))
            except CannotRun as exc:
                answer(cannot=str(exc))
            except Exception as exc:  # what breaks is an outcome of this shape
                traceback.print_exc()
                answer(error=f"{type(exc).__name__}: {exc}"[:300])
    except CannotRun as exc:
        answer(cannot=str(exc))
    except Exception as exc:
        traceback.print_exc()
        answer(error=f"does not start: {type(exc).__name__}: {exc}"[:300])
    finally:
        contender.stop()


def main() -> None:
    """Run the contender that the command line names."""
    # what libraries print is none of the parent's business
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = sys.argv[1].partition(":")
    contender: type[Contender] = getattr(importlib.import_module(module), name)
    serve(contender(Place(**json.loads(sys.argv[2]))), sys.stdin, answers)


if __name__ == "__main__":
    # as the module that contenders import, whose exceptions are the ones that they raise
    importlib.import_module("benchmarks.driver").main()
