"""The command line, command by command: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import EXAMPLES, Exit, parser

NO_RETRY = {"max_retries": 0}
#: what holds for every pair of servers is tried on one
ONE_PAIR = pytest.mark.parametrize("servers", ["embedded"], indirect=True, scope="session")

GOOD = {
    "id": "good", "version": "2", "variables": {"day": "monday"},
    "tasks": [
        {"id": "a", "handler": "debug.echo", "params": {"x": "{{ input.n + 1 }}", "d": "{{ variables.day }}"}},
        {"id": "b", "handler": "debug.noop", "dependencies": ["a"]},
        {"id": "c", "handler": "debug.noop", "dependencies": ["a"]},
        {"id": "d", "handler": "debug.echo", "dependencies": ["b", "c"], "params": {"from_a": "{{ tasks.a.x }}"}},
    ],
}  # fmt: skip
FAILS = {
    "id": "fails",
    "tasks": [
        {"id": "a", "handler": "debug.fail", "params": {"message": "boom"},
         "retry_policy": {"max_retries": 1, "max_delay": 0.0}},
        {"id": "b", "handler": "debug.noop", "dependencies": ["a"]},
    ],
}  # fmt: skip
EMPTY = {"id": "empty", "tasks": [{"id": "a", "handler": "debug.noop"}]}
BAD = "id: bad\ntasks:\n  - id: a\n    handler: debug.noop\n    dependencies: [zz]\n"


def waiting(path: Path) -> dict[str, Any]:
    """A workflow whose first task works until a file appears."""
    return {
        "id": "waits",
        "tasks": [
            {"id": "a", "handler": "site.wait_for_file", "params": {"path": str(path)}, "retry_policy": NO_RETRY},
            {"id": "b", "handler": "debug.noop", "dependencies": ["a"]},
        ],
    }


# what needs no server


@pytest.fixture
def offline(home: Any) -> Any:
    """A command that must not reach for any service."""
    return home


def test_validate_good_says_so_and_bad_names_every_problem_with_its_line(offline: Any) -> None:
    good, bad = offline.write("good.yaml", GOOD), offline.write("bad.yaml", BAD)
    done = offline("validate", good)
    assert (done.code, done.err) == (0, "")
    assert "good.yaml: good@2 is valid, 4 tasks" in done.out
    done = offline("validate", good, bad, offline.write("worse.yaml", BAD.replace("debug.noop", "debug.nope")))
    assert done.code == 2
    assert "bad.yaml:5: " in done.err and "zz" in done.err
    assert "worse.yaml:4: " in done.err and "debug.nope" in done.err
    assert not offline.home.exists()


def test_compile_gives_each_format_and_refuses_others(offline: Any) -> None:
    file = offline.write("good.yaml", GOOD)
    text, as_json, mermaid, svg = (offline("compile", file, "--format", f) for f in ("text", "json", "mermaid", "svg"))
    assert [d.code for d in (text, as_json, mermaid, svg)] == [0, 0, 0, 0]
    assert offline("compile", file).out == text.out
    assert all(word in text.out for word in ("group", "chord", "a", "d"))
    assert isinstance(json.loads(as_json.out), dict)
    assert mermaid.out.startswith(("flowchart", "graph"))
    assert ET.fromstring(svg.out).tag.endswith("svg")
    assert offline("compile", file, "--format", "png").code == 2
    assert offline("compile", offline.write("bad.yaml", BAD)).code == 2
    assert not offline.home.exists()


def test_schema_is_one_document_and_handlers_have_a_line_each(offline: Any) -> None:
    schema = json.loads(offline("schema").out)
    assert set(schema["required"]) == {"id", "tasks"}
    lines = offline("handlers").out.splitlines()
    assert "debug.sleep(seconds)" in lines
    assert "site.add(a, b?)" in lines
    assert all(line.startswith("    ") for line in lines[1::2]) and len(lines) > 40
    assert not offline.home.exists()


def test_help_shows_examples_that_parse_and_exit_codes(offline: Any) -> None:
    help_ = offline("--help")
    assert help_.code == 0
    assert EXAMPLES in help_.out
    lines = [line for line in EXAMPLES.splitlines() if line.startswith("  pipeline ")]
    commands = {parser().parse_args(shlex.split(re.split(r"   +| > ", line.strip())[0])[1:]).command for line in lines}
    assert len(lines) >= 10
    assert commands >= {"demo", "validate", "compile", "up", "run", "status", "list", "retry"}
    told = re.findall(r"(\d+) ", EXAMPLES.partition("exit codes:")[2])
    assert [int(code) for code in told] == sorted(Exit)


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["fly"], ["run"], ["run", "x", "--timeout", "soon"], ["run", "x", "--timeout", "-1"], ["list", "--limit", "0"],
        ["list", "--status", "great"], ["status", "exec-0", "--json", "--watch"], ["db"], ["up", "--workers", "x"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_exits_2_with_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        parser().parse_args(arguments)
    assert exited.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("usage: pipeline")


# executions: the first two on every pair of servers


def test_run_json_is_one_document_and_status_repeats_it(worked: Any) -> None:
    file = worked.write("good.yaml", GOOD)
    done = worked("run", file, "--input", '{"n": 41}', "--user", "ana", "--json")
    assert done.code == 0, done
    document = json.loads(done.out)
    assert re.fullmatch(r"exec-[0-9a-f]{12}", document["execution_id"])
    assert done.err.split() == [document["execution_id"]]
    assert document["status"] == "success" and document["error_message"] is None and document["created_by"] == "ana"
    assert document["results"]["d"]["from_a"] == 42
    assert list(document["tasks"]) in (["a", "b", "c", "d"], ["a", "c", "b", "d"])
    for task in document["tasks"].values():
        assert {"status", "attempt", "result", "error_message", "started_at", "finished_at"} <= task.keys()
        assert task["status"] == "success" and task["attempt"] == 1
        assert task["started_at"] <= task["finished_at"]
    assert worked.json("status", document["execution_id"]) == document
    shown = worked("status", document["execution_id"])
    assert shown.code == 0
    assert shown.out.startswith(f"{document['execution_id']} good@2 success (4 success)\n")


def test_run_that_fails_exits_1_and_status_shows_attempts_and_error(worked: Any) -> None:
    document = worked.json("run", worked.write("fails.json", FAILS), code=1)
    assert document["status"] == "failed"
    assert "boom" in document["error_message"] and "boom" in document["tasks"]["a"]["error_message"]
    assert document["tasks"]["a"]["attempt"] == 2
    assert document["tasks"]["b"]["status"] == "skipped"
    shown = worked("status", document["execution_id"])
    assert shown.code == 0
    row = next(line for line in shown.out.splitlines() if line.startswith("a "))
    assert re.search(r"debug\.fail +failed +2 .* boom", row)
    watched = worked("status", document["execution_id"], "--watch")
    assert watched.code == 1
    assert watched.out.count(document["execution_id"]) == 1
    found = worked.json("list", "--status", "failed", "--limit", "500")
    mine = next(row for row in found if row["execution_id"] == document["execution_id"])
    assert (mine["workflow_id"], mine["version"], mine["tasks"], mine["ended"]) == ("fails", "1", 2, 2)
    assert mine["created_at"] == document["created_at"]
    assert {row["status"] for row in found} == {"failed"}
    table = worked("list", "--limit", "500").out.splitlines()
    line = next(line for line in table if line.startswith(document["execution_id"]))
    assert re.search(r"fails@1 +failed +2/2 .*boom", line)


@ONE_PAIR
def test_submitted_execution_is_steered_from_pause_to_retry(worked: Any, tmp_path: Path, eventually: Any) -> None:
    go = tmp_path / "go"
    file = worked.write("waits.yaml", waiting(go))
    submitted = worked("run", file, "--no-wait")
    assert (submitted.code, submitted.err) == (0, "")
    execution = submitted.out.strip()
    assert eventually(Path(f"{go}.started").exists)
    timed_out = worked("run", file, "--timeout", "0", "--idempotency-key", execution, "--json")
    assert (timed_out.code, timed_out.out) == (124, "")
    other = timed_out.err.split()[0]
    assert f"execution {other} had not ended after 0 s; look at its status, or wait again" in timed_out.err
    paused = worked("pause", execution)
    assert paused.code == 0 and "running, paused" in paused.out
    resumed = worked("resume", execution, "--user", "ana")
    assert resumed.code == 0 and "paused" not in resumed.out
    assert worked("cancel", execution, "--user", "ana").code == 0
    assert worked("status", execution, "--watch").code == 1
    again = worked("cancel", execution)
    assert again.code == 2 and "is cancelled: cancel is not possible" in again.err
    go.touch()
    assert worked("retry", execution).code == 0
    watched = worked("status", execution, "--watch")
    assert watched.code == 0
    assert "b: success" in watched.out
    assert worked("status", other, "--watch").code == 0
    refused = worked("retry", execution)
    assert refused.code == 2 and "is success: retry is not possible" in refused.err


@ONE_PAIR
def test_registered_workflow_runs_by_id_and_version_with_input_from_a_file(worked: Any) -> None:
    old = {**EMPTY, "id": "registered", "version": "1"}
    new = {**GOOD, "id": "registered"}
    done = worked("register", worked.write("old.yaml", old), worked.write("new.yaml", new))
    assert (done.code, done.out) == (0, "registered@1\nregistered@2\n")
    data = "@" + worked.write("input.json", {"n": 1})
    assert worked.json("run", "registered@1")["version"] == "1"
    first = worked.json("run", "registered", "--input", data, "--idempotency-key", "k")
    assert (first["version"], first["input"], first["results"]["d"]["from_a"]) == ("2", {"n": 1}, 2)
    assert worked.json("run", "registered@2", "--input", data, "--idempotency-key", "k") == first
    conflict = worked("run", "registered", "--input", '{"n": 2}', "--idempotency-key", "k")
    assert conflict.code == 2 and f"belongs to execution {first['execution_id']}" in conflict.err
    changed = worked("register", worked.write("changed.yaml", {**old, "name": "changed"}))
    assert changed.code == 2 and "give the changed definition a new version" in changed.err
    assert worked.json("run", "registered@2", "--no-wait", "--input", data).keys() == {"execution_id"}
    missing = worked("run", "registered@9")
    assert missing.code == 3 and "'registered@9' is not registered" in missing.err


@ONE_PAIR
def test_plain_run_prints_each_task_as_it_ends_and_lines_stay_whole(worked: Any) -> None:
    long = "x" * 60
    definition = {
        "id": "long", "tasks": [
            {"id": long, "handler": "debug.fail", "params": {"message": "y" * 150}, "retry_policy": NO_RETRY}],
    }  # fmt: skip
    done = worked("run", worked.write("long.yaml", definition), COLUMNS="40")
    assert done.code == 1
    lines = [line.rstrip() for line in done.out.splitlines()]
    assert re.fullmatch(rf"{long}: failed in \d+\.\d\d s \({'y' * 150}\)", lines[0])
    assert re.fullmatch(rf"{long} +debug\.fail +failed +1 +\d+\.\d\d +{'y' * 150}", lines[-1])
    assert re.search(rf"^exec-\w+ long@1 failed \(1 failed\): .*{'y' * 150}$", "\n".join(lines), re.MULTILINE)


@ONE_PAIR
def test_program_on_the_path_and_module_are_the_same_command(worked: Any) -> None:
    program = shutil.which("pipeline", path=str(Path(sys.executable).parent))
    assert program is not None
    assert worked("--help", program=(program,)).out == worked("--help", program=("-m", "pipeline")).out


@ONE_PAIR
def test_reader_that_leaves_is_no_error(worked: Any) -> None:
    with worked.start("schema") as running:
        running.stdout.close()
        assert running.wait(60) == 0
        assert "Traceback" not in running.stderr.read()


@ONE_PAIR
def test_db_upgrade_makes_the_schema_once_and_status_tells_the_version(cli: Any, site: Any) -> None:
    store = site.engine.installation.store
    before = cli("db", "status")
    assert before.code == 0
    assert re.fullmatch(r"schema version (\d+), this code needs \1\n", before.out)
    with site.engine.installation.store.link.connection.cursor() as cursor:
        cursor.execute("DROP SCHEMA pipeline CASCADE")
    behind = cli("db", "status")
    assert (behind.code, behind.out.split(",")[0]) == (4, "schema version 0")
    assert "pipeline db upgrade" in behind.err
    upgraded = cli("db", "upgrade")
    assert upgraded.code == 0 and "upgraded to 1 (initial)" in upgraded.out
    assert cli("db", "upgrade").out == before.out
    store.close()


@ONE_PAIR
def test_worker_alone_and_scheduler_alone_do_the_work_and_end_quietly_by_a_signal(cli: Any, site: Any) -> None:
    alone = {"PIPELINE_RECOVERY_BESIDE": "false"}
    execution = cli("run", cli.write("fails.json", FAILS), "--no-wait").out.strip()
    with cli.start("worker", "--pool", "solo", "--name", "lonely", **alone) as worker, cli.start("scheduler") as scheduler:
        assert site.engine.wait(execution, 60).status == "failed"
        task = cli.json("status", execution)["tasks"]["a"]
        assert task["attempt"] == 2  # the retry is the scheduler's work
        assert task["worker"].startswith("lonely@")
        for process, number in ((scheduler, signal.SIGINT), (worker, signal.SIGTERM)):
            os.kill(process.pid, number)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            assert "interrupted" not in err


@ONE_PAIR
@pytest.mark.parametrize(
    ("status", "code"), [("success", Exit.DONE), ("failed", Exit.FAILED), ("cancelled", Exit.FAILED)]
)
def test_exit_code_follows_the_status(
    worked_site: Any, worked: Any, tmp_path: Path, status: str, code: int
) -> None:
    definition = EMPTY if status != "failed" else FAILS
    engine = worked_site.engine
    execution = engine.execute_workflow(definition, {})
    if status == "cancelled":
        execution = engine.execute_workflow(
            {"id": "w", "tasks": [{"id": "w", "handler": "site.wait_for_file", "params": {"path": str(tmp_path / "x")}}]}, {}
        )
        engine.cancel(execution)
    assert engine.wait(execution, 60).status == status
    assert worked("status", execution, "--watch").code == code
