"""What can go wrong: the kinds of faults, and a fault as a value that can be drawn, written down and repeated."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

#: what can be done at each transition, before and after it; a process does it to itself
TRANSITIONS: Mapping[str, tuple[str, ...]] = {
    "claim.before": ("kill", "kill_parent", "raise", "sever", "stop"),
    "claim.after": ("kill", "kill_parent", "raise", "stop"),
    "handler.before": ("kill", "kill_parent", "raise", "stop"),
    "handler.after": ("kill", "kill_parent", "raise", "stop"),
    "complete.before": ("kill", "kill_parent", "raise", "sever", "stop"),
    "complete.after": ("kill", "kill_parent", "raise", "stop"),
    "end.before": ("kill", "raise", "sever"),
    "end.after": ("kill", "raise"),
    "publish.before": ("kill", "kill_parent", "raise", "drop", "double", "delay", "shuffle", "stop"),
    "publish.after": ("kill", "kill_parent", "raise"),
    "ack.before": ("kill", "stop"),
    "ack.after": ("kill",),
}
#: what an action at a transition does
ACTIONS: Mapping[str, str] = {
    "kill": "SIGKILL to itself",
    "kill_parent": "SIGKILL to the worker's main process; the orphan goes on",
    "raise": "a connection error instead of the call, or instead of its answer",
    "sever": "the statement commits and its answer is lost",
    "stop": "SIGSTOP to itself for longer than the lease, then SIGCONT",
    "drop": "the messages are lost without an error",
    "double": "the messages are published twice",
    "delay": "the messages come late",
    "shuffle": "the messages come in another order",
}
#: what is done from outside
OUTSIDE: Mapping[str, str] = {
    "child-kill": "SIGKILL to a pool child",
    "child-stop": "SIGSTOP to a pool child for longer than the lease",
    "main-kill": "SIGKILL to a worker's main process; its children are orphans",
    "main-stop": "SIGSTOP to a worker's main process for longer than the lease",
    "session-kill": "SIGKILL to a worker with all its children",
    "session-stop": "SIGSTOP to a worker with all its children for longer than the lease",
    "recovery-kill": "SIGKILL to the process that runs recovery beside a worker",
    "deploy": "SIGTERM to a worker, then a new one",
    "broker-cut": "RST of all connections to the broker",
    "broker-refuse": "no connection to the broker for a while",
    "broker-blackhole": "the broker neither hears nor answers for a while, then RST",
    "broker-stall": "the broker hears, its answers come late",
    "broker-flush": "all messages are lost",
    "broker-kill": "kill -9 of the broker, with its data, and its restart",
    "database-cut": "RST of all connections to the database",
    "database-refuse": "no connection to the database for a while",
    "database-blackhole": "the database neither hears nor answers for longer than the lease, then RST",
    "database-stall": "the database hears, its answers come late",
    "database-terminate": "all backends are terminated",
    "database-kill": "kill -9 of the database and its restart",
    "messages-replayed": "messages of everything that ended are published again",
    "messages-doubled": "messages of everything that waits are published five times more",
    "messages-forged": "messages that name what is not there, or say it wrongly",
}
#: need a server that belongs to the kit
OF_OWN_BROKER, OF_OWN_DATABASE = frozenset({"broker-kill"}), frozenset({"database-kill"})


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault of a plan."""

    #: `point:action` of a transition, or a name of those from outside
    kind: str
    #: of a transition: which occurrence, counted from 1 over all processes
    nth: int = 1
    #: from outside: seconds after the executions were enqueued
    after: float = 0.0
    #: from outside: which worker, which child of it
    target: int = 0

    @property
    def transition(self) -> tuple[str, str] | None:
        """Point and action; None where it comes from outside."""
        point, found, action = self.kind.partition(":")
        return (point, action) if found else None


def all_kinds() -> tuple[str, ...]:
    """Every kind there is."""
    inside = (f"{point}:{action}" for point, actions in TRANSITIONS.items() for action in actions)
    return (*inside, *OUTSIDE)


def select(names: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """The kinds that are meant: a name, the beginning of names (`broker-`, `claim.`), or `:action`.

    Raises:
        ValueError: a name means none.
    """
    found: dict[str, None] = {}
    for name in names:
        meant = [k for k in known if k == name or k.startswith(name) or (name.startswith(":") and k.endswith(name))]
        if not meant:
            raise ValueError(f"no kind of fault is called {name!r}; `python -m pipeline.testing --list` names them")
        found |= dict.fromkeys(meant)
    return tuple(found)


def describe(kind: str) -> str:
    """One line for people."""
    point, found, action = kind.partition(":")
    return f"{point.replace('.', ' ', 1)}: {ACTIONS[action]}" if found else OUTSIDE[kind]


def draw(kinds: Sequence[str], rng: random.Random) -> Iterator[Fault]:
    """Faults without end: every kind once before any comes again."""
    while True:
        for kind in rng.sample(kinds, len(kinds)):
            yield Fault(
                kind=kind, nth=rng.randint(1, 12) if not kind.startswith("end.") else 1,
                after=round(rng.uniform(0.0, 1.0), 2), target=rng.randrange(64),
            )  # fmt: skip


def to_json(faults: Iterable[Fault]) -> str:
    """One line that `from_json` reads."""
    return json.dumps([asdict(fault) for fault in faults])


def from_json(text: str) -> tuple[Fault, ...]:
    """The faults of a line."""
    return tuple(Fault(**fields) for fields in json.loads(text))


def write_plan(path: Path, faults: Iterable[Fault], round_number: int) -> dict[str, Fault]:
    """Write the transitions' faults for the workers, in one step; returns them by name."""
    named = {f"{round_number}-{i}": fault for i, fault in enumerate(faults) if fault.transition is not None}
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({name: asdict(fault) for name, fault in named.items()}))
    fresh.replace(path)
    return named


def read_plan(path: Path) -> dict[str, Fault]:
    """What `write_plan` wrote."""
    return {name: Fault(**fields) for name, fields in json.loads(path.read_text()).items()}
