"""Break the store on purpose and see whether the model notices: `make mutants`.

Each mutant is the schema with one piece of text replaced. The sound schema must pass first; then the model of
test_model.py runs against each broken one until something fails. What counts is an answer or a row that differs from
the oracle's, an error of the database, or an execution that never ends; hypothesis finding itself unable to repeat a
failure counts for nothing. Exits 1 where more than SURVIVORS are not caught.
"""

from __future__ import annotations

import re
import secrets
import sys
import tempfile
import time
from pathlib import Path

import psycopg
from hypothesis.errors import HypothesisException
from psycopg import sql

from pipeline.embedded import EmbeddedServices
from pipeline.result_store.statements import sql_text
from tests.conftest import _guards, _named
from tests.store.conftest import Driver
from tests.store.test_model import explore

EXAMPLES = 160
#: what the model comes to too seldom, and tests of its own see
SURVIVORS = 3

#: name: a function, a piece of its text (spaces and line ends are all the same), and what it becomes
MUTANTS: dict[str, tuple[str, str, str]] = {
    "claim: ignores the epoch": ("start_task", "t.epoch = p_epoch AND t.due_at", "t.due_at"),
    "claim: keeps the epoch": ("start_task", "epoch = t.epoch + 1", "epoch = t.epoch"),
    "claim: takes what is not ready": ("start_task", "AND t.due_at IS NOT NULL", ""),
    "claim: takes another handler's task": ("start_task", "(t.handler = p_handler OR", "(true OR"),
    "claim: ignores the pause": ("take_task", "x.paused OR", ""),
    "claim: ignores the verdict": ("take_task", "x.verdict IS NOT NULL OR", ""),
    "claim: an expired worker may claim": ("start_task", "k.expires_at > now_", "true"),
    "claim: repeats another worker's claim": ("taken_before", "AND t.status = 'running' AND t.worker_id = p_worker", "AND t.status = 'running'"),
    "complete: ignores the epoch": ("complete_task", "AND t.epoch = p_epoch", ""),
    "complete: ignores the worker": ("complete_task", "AND t.worker_id = p_worker", ""),
    "complete: accepts what does not run": ("complete_task", "AND t.status = 'running'", "AND t.status <> 'success'"),
    "complete: loses the result": ("complete_task", "result = p_result,", ""),
    "complete: forgets the counters": ("complete_task", "c.remaining - 1", "c.remaining"),
    "complete: releases one too early": ("complete_task", "IF remaining_ = 0", "IF remaining_ <= 1"),
    "complete: forgets a slot that is down": ("complete_task", "IF remaining_ = 0 AND x.slots[n] > 0", "IF false"),
    "release: forgets a slot that is down": ("release", "WHERE o.slot > 0 AND o.remaining = 0", "WHERE false"),
    "reopen: counts slots that are down": ("open_places", "count(*) FILTER (WHERE o.remaining > 0)", "count(*)"),
    "complete: forgets a body": ("complete_task", "(SELECT h.bodies", "(SELECT h.bodies[2:]"),
    "complete: never closes": ("complete_task", "ended := ended OR x.headers[n] = 0", "ended := false"),
    "complete: does not see skips": ("complete_task", "OR x.careful", ""),
    "complete: goes on in a pause": ("complete_task", "IF p_room > 0 AND NOT x.paused", "IF p_room > 0"),
    "complete: goes on with its message in a pause": (
        "complete_task", "released = '{}' AND p_room > 0 AND NOT x.paused", "released = '{}' AND p_room > 0"),
    "complete: forgets what it released for another execution": (
        "complete_task", "ELSIF released <> '{}' THEN ready := pipeline.make_ready(p_execution, x.definition_id, released, p_grace);",
        "ELSIF released <> '{}' THEN ready := '{}';"),
    "take_due: looks for who leads in the wrong execution": ("take_due", "coalesce(led.led_in, led.execution_id)", "led.execution_id"),
    "take_due: looks at the same ones again and again": ("take_due", "SET due_at = pipeline.clock() + p_grace / 4", "SET due_at = t.due_at"),
    "take_due: waits for who leads and is paused": ("take_due", "l.due_at < 'infinity'", "l.due_at IS NOT NULL"),
    "start: with less time than the task asks for": ("start_task", "AND w.timeout <= p_room", ""),
    "start: of a handler that the worker does not know": ("start_task", "AND t.handler = ANY (k.handlers)", ""),
    "take_due: forgets what shared a message that is gone": ("take_due", "IF NOT (SELECT e.paused", "IF true OR NOT (SELECT e.paused"),
    "take_due: does not wait for the message that is shared": ("take_due", "IF NOT (SELECT e.paused", "IF false AND NOT (SELECT e.paused"),
    "repeat: names nothing": ("repeat_of", "AND t.due_at IS NOT NULL", "AND t.due_at IS NULL"),
    "repeat: of whatever worker": ("repeat_of", "AND t.worker_id = p_worker", ""),
    "end: ignores the fence": ("end_task", "AND r.status = 'running' AND r.epoch = p_epoch AND r.worker_id = p_worker", ""),
    "end: a loss is forgotten": ("end_task", "due_at = pipeline.clock() + coalesce(p_delay, '0')", "due_at = NULL"),
    "end: losses are not counted": ("end_task", "losses = r.losses + (target = 'lost')::int", "losses = r.losses"),
    "end: one loss more than the budget": ("end_task", "t.losses >= p_loss_budget", "t.losses > p_loss_budget"),
    "end: starts again after the verdict": ("end_task", "IF x.verdict IS NOT NULL THEN target :=", "IF false THEN target :="),
    "end: the attempt is not kept": ("end_task", "VALUES (p_execution, p_task, p_epoch, t.attempt, target,", "VALUES (p_execution, p_task, p_epoch, t.attempt, 'lost',"),
    "decide: leaves what waits": ("decide", "t.status IN ('pending', 'retry')", "t.status = 'pending'"),
    "release: a skipped dependency does not matter": ("release", "AND d.status = 'skipped'", "AND d.status = 'failed'"),
    "release: forgets a body": ("release", "unnest(h.bodies) b", "unnest(h.bodies[2:]) b"),
    "join: a message whose task was claimed": ("join_message", "t.status = 'pending' AND t.attempt = 0 AND t.hints = 1", "true"),
    "claim: tells nobody who joined its message": ("start_task", "CASE WHEN t.attempt = 1 THEN t.leads END", "NULL"),
    "claim: a repeat tells nobody who joined its message": ("taken_before", "CASE WHEN t.attempt = 1 THEN t.leads END", "NULL"),
    "close: leaves what several end together": ("close_executions", "closed + pipeline.close_if_over(over)::int", "closed"),
    "close: forgets an execution that is left open": ("complete_task", "closing := p_closing || p_execution;", "closing := p_closing;"),
    "close: nobody looks after what is left open": (
        "complete_task", "VALUES (p_execution, pipeline.clock() + p_grace / 4)", "SELECT p_execution, now() WHERE false"),
    "close: ends nothing that was left open before": ("complete_task", "PERFORM pipeline.close_executions(p_closing);", "NULL;"),
    "cancel: of what has succeeded already": ("cancel_execution", "PERFORM pipeline.close_if_over(p_execution);", ""),
    "pause: of what has succeeded already": ("pause_execution", "PERFORM pipeline.close_if_over(p_execution);", ""),
    "close: does not wait for what runs": ("close_if_idle", "t.status = 'running'", "false"),
    "take_due: publishes what is paused": ("take_due", "WHERE NOT p.paused", ""),
    "expire: lets tasks wait for ever": ("expire_execution", "OR waiting.task_id IS NOT NULL", ""),
    "cancel: a failure outweighs it": ("cancel_execution", "SET verdict = NULL", "SET verdict = e.verdict"),
    "resume: leaves what waits for a retry": ("resume_execution", "OR t.status = 'retry' AND t.due_at = 'infinity'", ""),
    "reopen: keeps the epoch": ("reopen_execution", "epoch = t.epoch + 1", "epoch = t.epoch"),
    "reopen: patches no counters": ("reopen_execution", "SET remaining = o.remaining", "SET remaining = c.remaining"),
    "reopen: forgets what is downstream": ("reopen_execution", "w.dependencies @> ARRAY[d.task_id]", "false"),
    "reopen: starts all that run one after another": ("reopen_execution", "AND (NOT x.sequential OR", "AND (true OR"),
    "mark: the attempt keeps its fence": ("mark_task", "epoch = t.epoch + 1", "epoch = t.epoch"),
    "mark: out of turn": ("mark_task", "IF FOUND THEN", "IF false THEN"),
}  # fmt: skip


def mutated(function: str, old: str, new: str) -> str:
    """The schema with the first such piece of the function replaced."""
    schema = sql_text("schema.sql")
    start = schema.index(f"CREATE FUNCTION pipeline.{function}(")
    pattern = re.compile(r"\s+".join(map(re.escape, old.split())))
    found = pattern.search(schema, start, schema.index("END $$;", start))
    assert found is not None, f"{function} does not say {old!r} any more"
    return schema[: found.start()] + new + schema[found.end() :]


def caught(url: str, schema: str) -> str | None:
    """What the model says of a schema; None where it says nothing that counts."""
    name = f"mutant_{secrets.token_hex(4)}"
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        with psycopg.connect(_named(url, name), autocommit=True) as connection:
            connection.execute(schema.encode())
            connection.execute(_guards().encode())
        driver = Driver(_named(url, name))
        try:
            explore(driver, EXAMPLES)
        except (AssertionError, psycopg.Error) as exc:
            kind = "" if isinstance(exc, AssertionError) else f"{type(exc).__name__}: "
            return f"{kind}{exc}".splitlines()[0][:160]
        except HypothesisException as exc:
            print(f"no verdict: {type(exc).__name__}")
        finally:
            driver.close()
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
    return None


def main() -> int:
    """Run all of them, or those whose names hold the first argument."""
    wanted = {name: mutated(*how) for name, how in MUTANTS.items() if sys.argv[1:2] == [] or sys.argv[1] in name}
    survivors = []
    with tempfile.TemporaryDirectory() as folder, EmbeddedServices(Path(folder), redis=False) as services:
        for name, schema in {"": sql_text("schema.sql"), **wanted}.items():
            began = time.monotonic()
            verdict = caught(services.database_url, schema)
            took = f"({time.monotonic() - began:.0f} s)"
            if not name:
                print(f"the sound schema {'FAILS' if verdict else 'passes'} {took} {verdict or ''}", flush=True)
                if verdict:
                    return 1
                continue
            survivors += [] if verdict else [name]
            print(f"{'caught' if verdict else 'SURVIVED':9} {name} {took} {verdict or ''}", flush=True)
    print(
        f"{len(wanted) - len(survivors)} of {len(wanted)} broken engines caught; survivors: {', '.join(survivors) or 'none'}"
    )
    return int(len(survivors) > SURVIVORS)


if __name__ == "__main__":
    sys.exit(main())
