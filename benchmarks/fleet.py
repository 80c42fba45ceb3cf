"""A fleet of workers as a discrete event simulation: what so many processes make of a load, from measured costs.

Messages wait in the broker; a worker's main process fetches them, as many ahead as it has processes; a process of its pool
runs the tasks of one, each with its calls to the database. Cores, the broker and main processes serve one thing after
another, and so do the counters of a join, of which a wide one has several. Queues are first come, first served. What nobody
has measured is free: locks within Postgres but those of joins, and a network beyond its round trip.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.costs import Costs
from pipeline.compiler import SLOTS, WIDE

#: seconds from which on a task is given a message of its own
_LONG = 0.02
#: least number of tasks that share a message
_LEAST = 4
#: seconds between two heartbeats of a process, and between two looks of a worker's recovery, by default
_HEARTBEAT, _SWEEP = 5.0, 1.0
#: share of a resource's time from which on it is what keeps the others waiting
_SATURATED = 0.9

Then = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Machines and what runs on them."""

    processes: int
    #: processes of one worker, which has a machine of its own
    per_worker: int = 8
    #: of each worker's machine
    cores: int = 8
    database_cores: int = 8
    #: seconds to the database and back
    round_trip: float = 0.0003
    #: everything on one machine with `cores`
    together: bool = False

    @property
    def workers(self) -> list[int]:
        """Processes of each worker."""
        full, rest = divmod(self.processes, self.per_worker)
        return [self.per_worker] * full + [rest] * (rest > 0)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Tasks that are all ready at the start, in executions that end with a join."""

    tasks: int
    #: seconds that each waits or works outside of our machines
    duration: float = 0.0
    executions: int = 1

    @property
    def width(self) -> int:
        """Tasks of the widest execution."""
        return -(-self.tasks // self.executions)

    @property
    def slots(self) -> int:
        """Counters that the join of an execution has."""
        return SLOTS if self.width >= WIDE else 1


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Seconds of what happens to one task of a message with so many."""

    together: int
    broker: float
    main: float
    pool: float
    #: of the message's first task
    claim: float
    #: up to where it counts its join down
    complete: float
    #: with a counter of the join held, and with the claim of the next task
    hold: float

    @classmethod
    def of(cls, costs: Costs, fleet: Fleet, load: Load) -> Steps:
        """Between a message for each task and messages as full as measured, in proportion to messages.

        Raises:
            ValueError: heartbeats and recovery alone are more than the database can do.
        """
        together = 1
        if load.duration <= _LONG:
            together = min(round(costs.shared.tasks_per_message), max(_LEAST, -(-load.width // fleet.processes)))
        one, many = costs.single, costs.shared
        most = max(many.tasks_per_message, 1.000001)
        share = (1 - 1 / max(1, together)) / (1 - 1 / most)

        def cost(kind: str) -> float:
            return float(getattr(one, kind) + min(1.0, share) * (getattr(many, kind) - getattr(one, kind)))

        left = 1 - _upkeep(costs, fleet)
        calls = cost("database") / left * together
        claim = min(one.database / 2 / left, calls / 2)
        complete = (calls - claim) / together
        hold = min(cost("join") / left, complete)
        return cls(
            together=together, broker=cost("broker"), main=cost("main"), pool=cost("pool"), claim=claim,
            complete=complete - hold, hold=hold,
        )  # fmt: skip


def _upkeep(costs: Costs, fleet: Fleet) -> float:
    """Share of the database's machine that goes into heartbeats and looks of recovery."""
    a_second = fleet.processes * costs.heartbeat / _HEARTBEAT + len(fleet.workers) * costs.look / _SWEEP
    share = a_second / (fleet.cores if fleet.together else fleet.database_cores)
    if share >= 1:
        raise ValueError(f"heartbeats and recovery of {fleet.processes} processes take {share:.1f} of the database")
    return share


def bounds(costs: Costs, fleet: Fleet, load: Load) -> dict[str, float]:
    """Seconds that the load takes at least, by each resource that could be the narrow one."""
    steps = Steps.of(costs, fleet, load)
    messages = _messages(load, steps.together)
    database = load.tasks * (steps.complete + steps.hold) + len(messages) * steps.claim
    of_a_worker = load.tasks * (steps.main + steps.pool)
    trips = (load.tasks + len(messages)) * fleet.round_trip
    found = {
        "processes": (load.tasks * (steps.pool + load.duration) + database + trips) / fleet.processes,
        "worker main": load.tasks * steps.main / len(fleet.workers),
        "broker": load.tasks * steps.broker,
        "a join": -(-load.width // load.slots) * steps.hold,
    }
    if fleet.together:
        return found | {"cores": (of_a_worker + database + load.tasks * steps.broker) / fleet.cores}
    return found | {
        "cores of workers": of_a_worker / (fleet.cores * len(fleet.workers)),
        "database": database / fleet.database_cores,
    }


@dataclass(frozen=True)
class Span:
    """When which process ran a task, from before its claim until it was recorded."""

    task: int
    process: int
    began: float
    ended: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of it."""

    seconds: float
    spans: Sequence[Span]
    #: share of the time that each resource was needed for
    used: Mapping[str, float]

    @property
    def rate(self) -> float:
        """Tasks a second."""
        return len(self.spans) / self.seconds

    @property
    def narrow(self) -> str:
        """What saturates; the processes, where they do not wait for anything else."""
        name, share = max(((n, s) for n, s in self.used.items() if n != "processes"), key=lambda found: found[1])
        return name if share >= _SATURATED or share > self.used["processes"] else "processes"


class Station:
    """So many at a time; the others wait in the order in which they came."""

    def __init__(self, servers: int = 1) -> None:
        self._free = servers
        self._waiting: deque[Then] = deque()

    def take(self, then: Then) -> None:
        """Go on once there is room."""
        if self._free:
            self._free -= 1
            then()
        else:
            self._waiting.append(then)

    def give(self) -> None:
        """Leave room for the next."""
        if self._waiting:
            self._waiting.popleft()()
        else:
            self._free += 1


@dataclass(kw_only=True)
class _Worker:
    machine: Station
    #: processes that run nothing
    idle: list[int]
    #: messages that it may have fetched and not begun
    ahead: int
    main: Station = field(default_factory=Station)
    fetched: deque[Sequence[int]] = field(default_factory=deque)
    #: messages that were fetched, or are about to be, and are not begun
    in_hand: int = 0


def _messages(load: Load, together: int) -> list[range]:
    """Tasks of one execution each, one execution after the other in turn; task n belongs to n modulo executions."""
    step = load.executions * together
    return [
        range(first + execution, min(first + step, load.tasks), load.executions)
        for first in range(0, load.tasks, step)
        for execution in range(load.executions)
        if first + execution < load.tasks
    ]


class Simulation:
    """One run."""

    def __init__(self, costs: Costs, fleet: Fleet, load: Load) -> None:
        self._fleet, self._load, self._costs = fleet, load, costs
        self._steps = Steps.of(costs, fleet, load)
        self._now, self._made = 0.0, 0
        self._events: list[tuple[float, int, Then]] = []
        self._broker = Station()
        self._counters = [[Station() for _ in range(load.slots)] for _ in range(load.executions)]
        shared = Station(fleet.cores)
        self._database = shared if fleet.together else Station(fleet.database_cores)
        self._broker_machine = shared if fleet.together else Station()
        self._published: deque[Sequence[int]] = deque(_messages(load, self._steps.together))
        self._workers: list[_Worker] = []
        first = 0
        for count in fleet.workers:
            machine = shared if fleet.together else Station(fleet.cores)
            self._workers.append(_Worker(machine=machine, idle=list(range(first, first + count)), ahead=count))
            first += count
        self._spans: list[Span] = []

    def run(self) -> Outcome:
        """From the first fetch to the last record."""
        for worker in self._workers:
            self._fetch(worker)
        while self._events:
            self._now, _, then = heapq.heappop(self._events)
            then()
        found = bounds(self._costs, self._fleet, self._load)
        used = {name: seconds / self._now for name, seconds in found.items()}
        return Outcome(seconds=self._now, spans=self._spans, used=used)

    def _after(self, seconds: float, then: Then) -> None:
        self._made += 1
        heapq.heappush(self._events, (self._now + seconds, self._made, then))

    def _use(self, seconds: float, stations: Sequence[Station], then: Then) -> None:
        """Hold stations, taken in their order, for a while."""

        def take(number: int) -> None:
            if number < len(stations):
                stations[number].take(lambda: take(number + 1))
            else:
                self._after(seconds, leave)

        def leave() -> None:
            for station in reversed(stations):
                station.give()
            then()

        take(0)

    def _fetch(self, worker: _Worker) -> None:
        while self._published and worker.in_hand < worker.ahead:
            worker.in_hand += 1
            self._bring(worker, self._published.popleft())

    def _bring(self, worker: _Worker, message: Sequence[int]) -> None:
        def fetched() -> None:
            self._use(len(message) * self._steps.main, (worker.main, worker.machine), handed_over)

        def handed_over() -> None:
            worker.fetched.append(message)
            self._begin(worker)

        self._use(len(message) * self._steps.broker, (self._broker, self._broker_machine), fetched)

    def _begin(self, worker: _Worker) -> None:
        while worker.fetched and worker.idle:
            process, message = worker.idle.pop(0), worker.fetched.popleft()
            worker.in_hand -= 1
            self._go_on(worker, process, self._turn(worker, process, message))
        self._fetch(worker)

    def _go_on(self, worker: _Worker, process: int, turn: Iterator[tuple[float, Sequence[Station]]]) -> None:
        for seconds, stations in turn:
            self._use(seconds, stations, lambda: self._go_on(worker, process, turn))
            return
        worker.idle.append(process)
        self._begin(worker)

    def _turn(self, worker: _Worker, process: int, message: Sequence[int]) -> Iterator[tuple[float, Sequence[Station]]]:
        """What a process does with a message, one step after the other, and what it needs for each."""
        steps, trip = self._steps, self._fleet.round_trip
        began = self._now
        yield trip, ()
        yield steps.claim, (self._database,)
        for task in message:
            yield steps.pool, (worker.machine,)
            yield self._load.duration, ()
            yield trip, ()
            yield steps.complete, (self._database,)
            place, execution = divmod(task, self._load.executions)
            yield steps.hold, (self._counters[execution][place % self._load.slots], self._database)
            self._spans.append(Span(task, process, began, self._now))
            began = self._now


def simulate(costs: Costs, fleet: Fleet, load: Load) -> Outcome:
    """One run.

    Raises:
        ValueError: heartbeats and recovery alone are more than the database can do.
    """
    return Simulation(costs, fleet, load).run()
