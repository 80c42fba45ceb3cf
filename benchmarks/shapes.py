"""What is run: graphs of no-ops by short names, from the standard library alone, for every contender's process.

W1000     1,000 tasks wide, then a join
D500      a chain of 500
L10x20    10 layers of 20, all-to-all, then a join
N50       two chains of 50 with cross edges, then a join: no set of layers, for the second chain waits for the first
S500      500 executions of 5 tasks (one, three, a join), submitted by 4 clients
B500      the same, each client's in one call
R400      real graphs of up to 400 tasks, one after the other
submit10000, again10000   handing over 10,000 tasks: of a definition that is new, or known
M1000     the most memory that workers hold while they run W1000
start2    a worker with 2 processes, from its command until both could run a task
idle10    10 seconds without work
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

#: tasks of one small execution, and the clients that submit them
SMALL, CLIENTS = 5, 4
#: tasks from which on a shape is run once, and by ours alone
LONG = 50_000


@dataclass(frozen=True)
class Graph:
    """Tasks by number, each with the numbers of those that it needs, which stand before it."""

    name: str
    needs: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.needs)

    @property
    def edges(self) -> int:
        """How many dependencies there are."""
        return sum(map(len, self.needs))

    @cached_property
    def levels(self) -> list[list[int]]:
        """Tasks by their longest path: what a contender without graphs runs, one level after the other."""
        depth: list[int] = []
        for needs in self.needs:
            depth.append(1 + max((depth[need] for need in needs), default=-1))
        levels: list[list[int]] = [[] for _ in range(max(depth) + 1)]
        for task, level in enumerate(depth):
            levels[level].append(task)
        return levels

    @property
    def is_layered(self) -> bool:
        """Whether one level after the other keeps no task waiting for what it does not need."""
        return all(
            set(self.needs[task]) == set(before)
            for before, level in zip([[], *self.levels], self.levels, strict=False)
            for task in level
        )


@dataclass(frozen=True)
class Shape:
    """A name of the list above, taken apart."""

    name: str
    kind: str
    size: int
    width: int = 1

    @classmethod
    def named(cls, name: str) -> Shape:
        """The shape of this name.

        Raises:
            ValueError: there is no such shape.
        """
        found = re.fullmatch(r"(W|D|N|S|B|R|M|submit|again|start|idle)([1-9]\d*)|(L)([1-9]\d*)x([1-9]\d*)", name)
        if found is None:
            raise ValueError(
                f"there is no shape {name!r}: write W1000, D100, L10x10, N50, S500, B500, R400, submit10000, start2, idle10"
            )
        if found[3]:
            return cls(name, "L", int(found[4]), int(found[5]))
        return cls(name, found[1], int(found[2]))

    @property
    def measure(self) -> str:
        """What is compared: `seconds`, `cpu` (seconds of it a second) or `megabytes`."""
        return {"idle": "cpu", "M": "megabytes"}.get(self.kind, "seconds")

    @property
    def is_for_ours_alone(self) -> bool:
        """Whether it is of no use to compare, or too long for anybody else."""
        return self.kind in ("B", "submit", "again", "M", "start", "idle") or self.tasks >= LONG

    @property
    def tasks(self) -> int:
        """Tasks of one run; 0 where that depends on files, or none is run."""
        sizes = {"W": self.size + 1, "M": self.size + 1, "submit": self.size, "again": self.size, "D": self.size,
                 "L": self.size * self.width + 1, "N": 2 * self.size + 1, "S": self.size * SMALL,
                 "B": self.size * SMALL}  # fmt: skip
        return sizes.get(self.kind, 0)

    @property
    def longest_path(self) -> int:
        """Tasks of the longest path; 0 where that depends on files, or none is run."""
        return {"W": 2, "M": 2, "D": self.size, "L": self.size + 1, "N": self.size + 2, "S": 3, "B": 3}.get(self.kind, 0)

    def graph(self) -> Graph:
        """The one graph of this shape."""
        return Graph(self.name, tuple(self._needs()))

    def _needs(self) -> Iterator[tuple[int, ...]]:
        if self.kind in ("W", "M", "submit", "again"):
            width = self.size if self.kind in ("W", "M") else self.size - 1
            yield from [()] * width
            yield tuple(range(width))
        elif self.kind == "D":
            yield from (() if task == 0 else (task - 1,) for task in range(self.size))
        elif self.kind == "L":
            for layer in range(self.size):
                yield from [tuple(range((layer - 1) * self.width, layer * self.width) if layer else ())] * self.width
            yield tuple(range((self.size - 1) * self.width, self.size * self.width))
        elif self.kind == "N":
            for rung in range(self.size):
                a, b = 2 * rung, 2 * rung + 1
                yield (a - 2,) if rung else ()
                yield (b - 2, a) if rung else (a,)
            yield (2 * self.size - 2, 2 * self.size - 1)
        elif self.kind in ("S", "B"):
            yield from ((), (0,), (0,), (0,), (1, 2, 3))
        else:
            raise ValueError(f"{self.name} is not one graph")

    def graphs(self, folder: Path | None) -> list[Graph]:
        """The graphs that are run one after the other: one, or the real ones that lie in the folder."""
        if self.kind != "R":
            return [self.graph()]
        found = [read_graph(path) for path in sorted(folder.glob("*.json"))] if folder else []
        return [graph for graph in found if len(graph) <= self.size]


def read_graph(path: Path) -> Graph:
    """A workflow in WfFormat, as its edges."""
    tasks = json.loads(path.read_text("utf-8"))["workflow"]["specification"]["tasks"]
    needs: dict[str, set[str]] = {task["id"]: set(task["parents"]) for task in tasks}
    for task in tasks:
        for child in task["children"]:
            needs[child].add(task["id"])
    number: dict[str, int] = {}
    while len(number) < len(needs):
        ready = [task for task, need in needs.items() if task not in number and need <= number.keys()]
        if not ready:
            raise ValueError(f"{path}: its tasks wait for each other")
        number |= {task: len(number) + place for place, task in enumerate(ready)}
    return Graph(path.stem, tuple(tuple(sorted(number[need] for need in needs[task])) for task in number))
