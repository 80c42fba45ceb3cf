"""COMPILE: a definition becomes groups and chords, pure and exact: no task waits for one that it does not depend on.

The entry is one group of the tasks without dependencies. Each task has a fan-out: one group of the successors that
depend on it alone. Each task with two or more dependencies is the body of a chord, and tasks with the same
dependencies share the chord's header. The end is one chord over the tasks without successors. A task stands in the
headers of as many chords as wait for it, which no native canvas can say: who counts the headers is the store.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import pairwise

from celery import chain, chord, group, signature
from celery.canvas import Signature

from pipeline.definition import TaskDefinition, WorkflowDefinition
from pipeline.errors import DefinitionError, NotSeriesParallel, Problem
from pipeline.graph import cycles

#: name of the body of the chord that closes an execution
END = "pipeline.end"
#: tasks of a header from which on it is counted in slots, and how many: one counter would be one row, which every end of a
#: task locks, and then many workers could not be faster than two
WIDE, SLOTS = 65, 16


@dataclass(frozen=True, kw_only=True)
class Header:
    """A set of tasks that others wait for together."""

    #: 0 is the end of the workflow
    number: int
    #: in topological order; two or more, except at the end
    tasks: tuple[str, ...]
    #: tasks that start once all of `tasks` succeeded; () at the end
    bodies: tuple[str, ...] = ()

    @property
    def slots(self) -> tuple[int, ...]:
        """How many of the tasks each slot counts, from slot 1 on; () where one counter does."""
        return tuple(len(self.tasks[slot::SLOTS]) for slot in range(SLOTS)) if len(self.tasks) >= WIDE else ()

    def slot(self, place: int) -> int:
        """The slot that counts the task at this place; 0: the header's only counter. Neighbours have different ones."""
        return 1 + place % SLOTS if len(self.tasks) >= WIDE else 0


@dataclass(frozen=True, kw_only=True)
class CompiledWorkflow:
    """A workflow as groups and chords; Celery's objects are made anew at each call, for they can be changed."""

    #: of the definition
    digest: str
    #: topological; among tasks that could come next, the one that the definition names first
    order: tuple[str, ...]
    #: what each task waits for when it runs, in topological order; one task at most where nothing runs in parallel
    dependencies: Mapping[str, tuple[str, ...]]
    #: tasks that wait for nothing
    roots: tuple[str, ...]
    #: successors that wait for this task alone; only tasks that have some
    releases: Mapping[str, tuple[str, ...]]
    #: the end, then each set of two or more tasks that something waits for; the index is the header's number
    headers: tuple[Header, ...]
    #: numbers of the headers that each task stands in; only tasks that stand in some
    memberships: Mapping[str, tuple[int, ...]]
    #: of these headers, the slot that counts it there; only tasks that a slot counts
    slots: Mapping[str, tuple[int, ...]]
    #: Celery task name of each task
    handlers: Mapping[str, str] = field(repr=False)

    def signature(self, task_id: str) -> Signature:
        """The task as an immutable signature: named as its handler, called with its id."""
        return signature(self.handlers[task_id], args=(task_id,), immutable=True)

    def _group(self, task_ids: Iterable[str]) -> group:
        return group([self.signature(task_id) for task_id in task_ids])

    @property
    def entry(self) -> group:
        """The group that an execution starts with."""
        return self._group(self.roots)

    def fan_out(self, task_id: str) -> group:
        """The group that starts when this task succeeded; empty where nothing waits for it alone."""
        return self._group(self.releases.get(task_id, ()))

    def join(self, task_id: str) -> chord:
        """The chord that this task is the body of.

        Raises:
            KeyError: the task waits for fewer than two tasks.
        """
        header = self.dependencies[task_id]
        if len(header) < 2:
            raise KeyError(task_id)
        return chord(self._group(header), body=self.signature(task_id))

    @property
    def end(self) -> chord:
        """The chord whose body closes the execution."""
        return chord(self._group(self.headers[0].tasks), body=signature(END, immutable=True))

    def to_canvas(self) -> Signature:
        """The whole workflow as one native canvas with the same partial order over its tasks.

        Exists for exactly the series-parallel orders. Dependencies that others imply are left out. Memory grows with
        the square of the number of tasks.

        Raises:
            NotSeriesParallel: no nesting of chains, groups and chords has this order.
        """
        # Each set of dependencies becomes a node and each task an edge, from what it waits for to what waits for it:
        # that graph contracts to one edge exactly where the order is series-parallel (Valdes, Tarjan and Lawler,
        # "The recognition of series parallel digraphs", 1982).
        waits = self._without_implied()
        waiting: dict[str, tuple[str, ...]] = {}
        for tasks in dict.fromkeys(waits.values()):
            for task_id in tasks:
                if task_id in waiting:
                    raise NotSeriesParallel(
                        f"tasks wait for {task_id!r} together with different other tasks: no one canvas has this order"
                    )
                waiting[task_id] = tasks
        start: tuple[str, ...] = ()
        finish = (END, END)  # no set of dependencies names a task twice
        steps = _Contraction()
        for task_id in self.order:
            steps.add(waits[task_id], waiting.get(task_id, finish), [self.signature(task_id)])
        nodes = deque(node for node in steps.after if node != start)
        while nodes:
            nodes.extend(node for node in steps.contract(nodes.popleft()) if node not in (start, finish))
        if steps.after[start].keys() != {finish}:
            raise NotSeriesParallel("the dependencies cross: no one canvas of chains, groups and chords has this order")
        return _canvas(steps.after[start][finish])

    def _without_implied(self) -> dict[str, tuple[str, ...]]:
        """The dependencies of each task that no other of its dependencies implies."""
        bit = {task_id: 1 << place for place, task_id in enumerate(self.order)}
        ancestors: dict[str, int] = {}
        known: dict[tuple[str, ...], tuple[tuple[str, ...], int]] = {}
        for task_id in self.order:
            tasks = self.dependencies[task_id]
            if tasks not in known:
                implied = own = 0
                for dependency in tasks:
                    implied |= ancestors[dependency]
                    own |= bit[dependency]
                known[tasks] = tuple(t for t in tasks if not bit[t] & implied), implied | own
            ancestors[task_id] = known[tasks][1]
        return {task_id: known[self.dependencies[task_id]][0] for task_id in self.order}


#: what stands between two nodes: one step after another, a list being canvases that run side by side
_Series = list["Signature | list[Signature]"]
_Node = tuple[str, ...]


class _Contraction:
    """A graph whose edges hold canvases and are merged: side by side, and one after another."""

    def __init__(self) -> None:
        self.after: dict[_Node, dict[_Node, _Series]] = {}
        self.before: dict[_Node, set[_Node]] = {}

    def add(self, source: _Node, target: _Node, series: _Series) -> None:
        edges = self.after.setdefault(source, {})
        rival = edges.setdefault(target, series)
        self.before.setdefault(target, set()).add(source)
        if rival is series:
            return
        if len(rival) == 1 and isinstance(rival[0], list):
            rival[0].append(_canvas(series))
        else:
            edges[target] = [[_canvas(rival), _canvas(series)]]

    def contract(self, node: _Node) -> tuple[_Node, ...]:
        """Take out a node with one edge on each side; gives the nodes that this touched."""
        if len(self.before.get(node, ())) != 1 or len(self.after.get(node, ())) != 1:
            return ()
        (source,), ((target, series),) = self.before.pop(node), self.after.pop(node).items()
        before = self.after[source].pop(node)
        before.extend(series)
        self.before[target].discard(node)
        self.add(source, target, before)
        return source, target


def _canvas(series: _Series) -> Signature:
    """Steps one after another; parallel steps become the header of a chord over all that follows."""
    rest: deque[Signature] = deque()
    for step in reversed(series):
        if isinstance(step, list):
            rest = deque([chord(group(step), body=_chain(rest)) if rest else group(step)])
        else:
            rest.appendleft(step)
    return _chain(rest)


def _chain(steps: deque[Signature]) -> Signature:
    return chain(list(steps)) if len(steps) > 1 else steps[0]


def compile_workflow(definition: WorkflowDefinition) -> CompiledWorkflow:
    """Compile a valid definition; equal definitions give equal results.

    Raises:
        DefinitionError: the dependencies are circular; the problem names the circle.
    """
    waits = _dependency_sets(definition.tasks)
    order = _topological(definition.tasks, waits)
    place = {task_id: n for n, task_id in enumerate(order)}
    if definition.enable_parallel:
        sets = dict.fromkeys(waits[task_id] for task_id in order)
        in_order = {tasks: tuple(sorted(tasks, key=place.__getitem__)) for tasks in sets}
        dependencies = {task_id: in_order[waits[task_id]] for task_id in order}
    else:
        dependencies = {order[0]: (), **{task_id: (previous,) for previous, task_id in pairwise(order)}}

    bodies: dict[tuple[str, ...], list[str]] = {}
    for task_id, tasks in dependencies.items():
        bodies.setdefault(tasks, []).append(task_id)
    awaited = set().union(*bodies)
    headers = [Header(number=0, tasks=tuple(task_id for task_id in order if task_id not in awaited))]
    for tasks, waiting in bodies.items():
        if len(tasks) > 1:
            headers.append(Header(number=len(headers), tasks=tasks, bodies=tuple(waiting)))
    memberships: dict[str, list[int]] = {}
    slots: dict[str, list[int]] = {}
    for header in headers:
        for n, task_id in enumerate(header.tasks):
            memberships.setdefault(task_id, []).append(header.number)
            slots.setdefault(task_id, []).append(header.slot(n))
    return CompiledWorkflow(
        digest=definition.digest,
        order=order,
        dependencies=dependencies,
        roots=tuple(bodies[()]),
        releases={tasks[0]: tuple(waiting) for tasks, waiting in bodies.items() if len(tasks) == 1},
        headers=tuple(headers),
        memberships={task_id: tuple(numbers) for task_id, numbers in memberships.items()},
        slots={task_id: tuple(found) for task_id, found in slots.items() if any(found)},
        handlers={task.id: task.handler or f"pipeline.{task.type}" for task in definition.tasks},
    )


def _dependency_sets(tasks: tuple[TaskDefinition, ...]) -> dict[str, frozenset[str]]:
    """The dependencies of each task; equal ones are one object, so that layers of n by n tasks cost n, not n * n."""
    spellings: dict[tuple[str, ...], frozenset[str]] = {}
    shared: dict[frozenset[str], frozenset[str]] = {}
    for task in tasks:
        if task.dependencies not in spellings:
            found = frozenset(task.dependencies)
            spellings[task.dependencies] = shared.setdefault(found, found)
    return {task.id: spellings[task.dependencies] for task in tasks}


def _topological(tasks: tuple[TaskDefinition, ...], waits: dict[str, frozenset[str]]) -> tuple[str, ...]:
    bodies: dict[frozenset[str], list[int]] = {}
    for number, task in enumerate(tasks):
        bodies.setdefault(waits[task.id], []).append(number)
    stands_in: dict[str, list[frozenset[str]]] = {task.id: [] for task in tasks}
    for needed in bodies:
        for task_id in needed:
            stands_in[task_id].append(needed)
    missing = {needed: len(needed) for needed in bodies}
    ready = bodies.get(frozenset(), [])
    heapify(ready)
    order: list[str] = []
    while ready:
        task_id = tasks[heappop(ready)].id
        order.append(task_id)
        for needed in stands_in[task_id]:
            missing[needed] -= 1
            if not missing[needed]:
                for number in bodies[needed]:
                    heappush(ready, number)
    if len(order) < len(tasks):
        numbers = {task.id: number for number, task in enumerate(tasks)}
        graph = [[numbers[dependency] for dependency in task.dependencies] for task in tasks]
        circle = next(cycles(graph, map(numbers.__getitem__, order)))
        names = " -> ".join(tasks[number].id for number in circle)
        path = f"tasks[{circle[0]}].dependencies"
        raise DefinitionError((Problem(path=path, what=f"circular dependency: {names}", how="take one of these out"),))
    return tuple(order)
