"""Break the store on purpose and see whether the model notices: `python -m tests.store.mutants`.

Each mutant is the schema with one piece of text replaced. The sound schema must pass first; then the model of
test_model.py runs against each broken one until something fails. Exits 1 where fewer than LEAST are caught.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
import time
from pathlib import Path

import psycopg
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from psycopg import sql

from pipeline.embedded import EmbeddedServices
from pipeline.result_store.statements import sql_text
from tests.conftest import _guards, _named
from tests.store.conftest import Driver
from tests.store.test_model import Model

EXAMPLES = 150
LEAST = 14

#: name: the text as it is, and what it becomes; the first occurrence after the function's name is replaced
MUTANTS: dict[str, tuple[str, str, str]] = {
    "claim: ignores the epoch": ("claim_task", " AND t.epoch = p_epoch\n", "\n"),
    "claim: keeps the epoch": ("claim_task", "epoch = t.epoch + 1", "epoch = t.epoch"),
    "claim: takes what is not ready": ("claim_task", "AND t.due_at IS NOT NULL", ""),
    "claim: ignores pause and verdict": ("claim_task", "x.paused OR x.verdict IS NOT NULL OR ", ""),
    "claim: an expired worker may claim": ("claim_task", "k.expires_at > pipeline.clock()", "true"),
    "complete: ignores the epoch": ("complete_task", " AND t.epoch = p_epoch", ""),
    "complete: ignores the worker": ("complete_task", " AND t.worker_id = p_worker", ""),
    "complete: accepts what does not run": ("complete_task", "AND t.status = 'running'", "AND t.status <> 'success'"),
    "complete: forgets the counters": ("complete_task", "c.remaining - 1", "c.remaining"),
    "complete: releases one too early": ("complete_task", "IF remaining_ = 0", "IF remaining_ <= 1"),
    "complete: never closes": ("complete_task", "ended := ended OR number_ = 0", "ended := false"),
    "complete: does not see skips": ("complete_task", " OR x.careful", ""),
    "end: ignores the fence": ("end_task", "AND r.status = 'running' AND r.epoch = p_epoch AND r.worker_id = p_worker", ""),
    "end: a loss is forgotten": ("end_task", "due_at = pipeline.clock() + coalesce(p_delay, '0')", "due_at = NULL"),
    "end: losses are not counted": ("end_task", "losses = r.losses + (target = 'lost')::int", "losses = r.losses"),
    "decide: leaves what waits": ("decide", "t.status IN ('pending', 'retry')", "t.status = 'pending'"),
    "release: a skipped dependency does not matter": ("release", "AND d.status = 'skipped'", "AND d.status = 'failed'"),
    "close: does not wait for what runs": ("close_if_idle", "t.status = 'running'", "false"),
    "reopen: keeps the epoch": ("reopen_execution", "epoch = t.epoch + 1", "epoch = t.epoch"),
    "reopen: patches no counters": ("reopen_execution", "SET remaining = (SELECT", "SET remaining = c.remaining + 0 * (SELECT"),
    "reopen: forgets what is downstream": ("reopen_execution", "w.dependencies @> ARRAY[d.task_id]", "false"),
    "mark: the attempt keeps its fence": ("mark_task", "epoch = t.epoch + 1", "epoch = t.epoch"),
}  # fmt: skip


def mutated(function: str, old: str, new: str) -> str:
    """The schema with one replacement."""
    schema = sql_text("schema.sql")
    start = schema.index(f"CREATE FUNCTION pipeline.{function}(")
    place = schema.index(old, start)
    assert place < schema.index("END $$;", start), f"{function} does not say {old!r} any more"
    return schema[:place] + new + schema[place + len(old) :]


def caught(url: str, schema: str) -> str | None:
    """What the model says of a schema; None where it says nothing."""
    name = f"mutant_{secrets.token_hex(4)}"
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        with psycopg.connect(_named(url, name), autocommit=True) as connection:
            connection.execute(schema.encode())
            connection.execute(_guards().encode())
        driver = Driver(_named(url, name))
        try:
            run_state_machine_as_test(
                lambda: Model(driver),
                settings=settings(
                    max_examples=EXAMPLES, stateful_step_count=40, derandomize=True, database=None, deadline=None,
                    phases=[Phase.generate], suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
                ),
            )  # fmt: skip
        except Exception as exc:
            return f"{type(exc).__name__}: {exc}".splitlines()[0][:100]
        finally:
            driver.store.close()
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
    return None


def main() -> int:
    """Run all of them, or those whose names hold the first argument."""
    wanted = {name: how for name, how in MUTANTS.items() if sys.argv[1:2] == [] or sys.argv[1] in name}
    with tempfile.TemporaryDirectory() as folder, EmbeddedServices(Path(folder), redis=False) as services:
        verdict = caught(services.database_url, sql_text("schema.sql"))
        if verdict is not None:
            print(f"the sound schema fails: {verdict}")
            return 1
        survivors = []
        for name, how in wanted.items():
            began = time.monotonic()
            verdict = caught(services.database_url, mutated(*how))
            survivors += [] if verdict else [name]
            print(
                f"{'caught' if verdict else 'SURVIVED':9} {name} ({time.monotonic() - began:.0f} s) {verdict or ''}",
                flush=True,
            )
    killed = len(wanted) - len(survivors)
    print(f"{killed} of {len(wanted)} broken engines caught; survivors: {', '.join(survivors) or 'none'}")
    return int(killed < min(LEAST, len(wanted)))


if __name__ == "__main__":
    sys.exit(main())
