"""Dependencies as a graph of numbers: order, cycles and ancestors, without recursion and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

#: `dependencies[n]` are the numbers of the tasks that task n needs
Dependencies = Sequence[Sequence[int]]

_BATCH = 4096  # ancestors looked for in one pass: bits of one integer per task


def topological_order(dependencies: Dependencies) -> list[int]:
    """Every task after all that it needs; tasks in a cycle, or behind one, are left out."""
    successors: list[list[int]] = [[] for _ in dependencies]
    for task, needed in enumerate(dependencies):
        for dependency in needed:
            successors[dependency].append(task)
    waits = [len(needed) for needed in dependencies]
    order = [task for task, count in enumerate(waits) if count == 0]
    for task in order:  # it grows while it is read
        for successor in successors[task]:
            waits[successor] -= 1
            if waits[successor] == 0:
                order.append(successor)
    return order


def cycles(dependencies: Dependencies, order: Iterable[int]) -> Iterator[list[int]]:
    """Cycles that share no task, in the direction of the flow, the first task repeated at the end.

    Args:
        dependencies: the graph.
        order: its topological order: what is not in there has a cycle before it.
    """
    clean = set(order)
    walked: dict[int, int] = {}  # task -> the walk that came by
    for start in range(len(dependencies)):
        task, trail = start, []
        while task not in clean and task not in walked:
            walked[task] = start
            trail.append(task)
            task = next(needed for needed in dependencies[task] if needed not in clean)
        if trail and walked.get(task) == start:
            cycle = [*trail[trail.index(task) :], task]
            yield cycle[::-1]


def missing_ancestors(
    dependencies: Dependencies, order: Sequence[int], pairs: Iterable[tuple[int, int]], doubtful: Iterable[int]
) -> set[tuple[int, int]]:
    """Those of the pairs (task, other) where `other` surely does not precede `task`.

    Args:
        dependencies: the graph.
        order: its topological order; nothing is said of tasks that are not in it.
        pairs: what to look for.
        doubtful: tasks whose dependencies are not all known: nothing is said of them and of what comes after.
    """
    wanted: dict[int, list[int]] = {}
    for task, other in pairs:
        if other not in dependencies[task]:
            wanted.setdefault(other, []).append(task)
    others = sorted(wanted)
    missing: set[tuple[int, int]] = set()
    unsure = set(doubtful)
    for start in range(0, len(others), _BATCH):
        bits = {other: 2 << number for number, other in enumerate(others[start : start + _BATCH])}
        masks = [0] * len(dependencies)
        for task in order:
            mask = 1 if task in unsure else 0
            for dependency in dependencies[task]:
                mask |= masks[dependency] | bits.get(dependency, 0)
            masks[task] = mask
        ordered = set(order)
        missing.update(
            (task, other)
            for other, bit in bits.items()
            for task in wanted[other]
            if task in ordered and not masks[task] & (bit | 1)
        )
    return missing
