"""What is wrong is said once, in one message with its mend, by the right exit code, and leaves nothing half-done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pipeline import cli as command_line
from pipeline.result_store.migrations import migrations

pytestmark = pytest.mark.parametrize("servers", ["embedded"], indirect=True, scope="session")

NOWHERE = {"redis": "redis://127.0.0.1:1/0", "amqp": "amqp://127.0.0.1:1//"}
EMPTY = {"id": "empty", "tasks": [{"id": "a", "handler": "debug.noop"}]}
STRICT = {
    **EMPTY, "id": "strict",
    "input_schema": {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False},
}  # fmt: skip
TABLES = ("workflow_definitions", "workflow_executions", "workflow_states", "task_executions")


def rows(url: str) -> dict[str, int]:
    """How many rows each table has."""
    with psycopg.connect(url) as connection:
        counts = (connection.execute(f"SELECT count(*) FROM pipeline.{name}".encode()).fetchone() for name in TABLES)
        return {name: count[0] for name, count in zip(TABLES, counts, strict=True) if count is not None}


@pytest.fixture
def main(
    site: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., tuple[int, str]]]:
    """The command in this process, which is quick: exit code and stderr; stdout must stay empty."""
    for name in [name for name in os.environ if name.startswith("PIPELINE_")]:
        monkeypatch.delenv(name)
    for name, value in site.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str, **env: str) -> tuple[int, str]:
        with monkeypatch.context() as changed:
            for name, value in env.items():
                changed.setenv(name, value)
            code = command_line.main(arguments)
        told = capsys.readouterr()
        assert told.out == ""
        assert "Traceback" not in told.err
        return code, told.err

    yield run
    signal.signal(signal.SIGTERM, handler)


# input


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hello", "--input:1: not JSON: expected a value, found 'h"),
        ("{'day': 1}", "--input:1: not JSON: a key must be text in double quotes"),
        ("", "--input:1: not JSON: "),
        ("[1]", """--input: not a JSON object; write a JSON object, as --input '{"day": "monday"}'"""),
        ('"text"', "--input: not a JSON object; "),
        ("null", "--input: not a JSON object; "),
        ('{"n": NaN}', "--input:1: "),
        ('{"n": 1e999}', "--input:1: "),
        ('{"n": 1, "n": 2}', "--input:1: key 'n' stands twice"),
        ('{"n": "\\u0000"}', "--input:1: a NUL character"),
        ('{"n": "\\ud800"}', "half a surrogate pair"),
        ('{"n": "one"}', 'n: "one" is not of type "integer"'),
        ('{"n": 1, "m": 2}', "'m'"),
        ('{"n": %s}' % ("[" * 100_000 + "]" * 100_000), "nested deeper than 32 levels"),
        ('{"n": "%s"}' % ("x" * 300_000), "above the limit of 262144"),
        ("@nowhere.json", "nowhere.json: cannot be read: No such file or directory"),
        ("@.", ".: cannot be read: Is a directory"),
        ("@binary", "binary:1: not UTF-8 text"),
    ],
    ids=(
        "word", "python", "nothing", "list", "text", "null", "nan", "infinity", "key_twice", "nul", "half_pair", "type",
        "unknown_name", "deep", "large", "no_file", "folder", "binary",
    ),
)  # fmt: skip
def test_wrong_input_exits_2_and_records_nothing(main: Any, site: Any, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "strict.json").write_text(json.dumps(STRICT))
    (tmp_path / "binary").write_bytes(b'{"n": "\xff"}')
    site.engine.register(STRICT)
    before = rows(site.settings.database_url)
    code, err = main("run", "strict.json", "--no-wait", "--input", text)
    assert code == 2
    assert told in err
    assert len(err.splitlines()) == 1
    assert rows(site.settings.database_url) == before


@pytest.mark.parametrize("text", ["NaN", "{", "[1, 1e999]", "[" * 5000])
def test_wrong_result_of_a_mark_exits_2(main: Any, text: str) -> None:
    code, err = main("mark", "exec-000000000000", "a", "success", "--reason", "by hand", "--result", text)
    assert code == 2
    assert err.startswith("--result:1: ")
    assert len(err.splitlines()) == 1


# names


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "nobody"), "workflow 'nobody' is not registered; `pipeline register FILE` records a definition\n"),
        (("run", "empty@7"), "workflow 'empty@7' is not registered; `pipeline register FILE` records a definition\n"),
        *(
            ((verb, "exec-000000000000"), "execution 'exec-000000000000' is not recorded; `pipeline list` shows those that are\n")
            for verb in ("status", "cancel", "pause", "resume", "retry")
        ),
        (("status", "exec-000000000000", "--watch"), "execution 'exec-000000000000' is not recorded"),
    ],
    ids=("id", "version", "status", "cancel", "pause", "resume", "retry", "watch"),
)
def test_unknown_name_exits_3_and_says_where_to_look(
    main: Any, site: Any, arguments: tuple[str, ...], told: str
) -> None:
    site.engine.register(EMPTY)
    code, err = main(*arguments)
    assert code == 3
    assert told in err
    assert rows(site.settings.database_url)["workflow_executions"] == 0


def test_argument_that_is_no_text_exits_2(capsys: pytest.CaptureFixture[str], servers: Any) -> None:
    with pytest.raises(SystemExit) as exited:
        command_line.main(["status", "exec-\udcff"])
    assert exited.value.code == 2
    assert "arguments must be UTF-8 text" in capsys.readouterr().err


# definitions


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere.yaml", "nowhere.yaml: cannot be read: No such file or directory"),
        ("folder.yaml", "folder.yaml: cannot be read: Is a directory"),
        ("binary.yaml", "binary.yaml:1: not UTF-8 text; save the file as UTF-8"),
        ("binary", "binary: not a definition by its name; name it *.yaml, *.yml or *.json"),
        ("many.json", "3 tasks, above the limit of 2; split the workflow"),
        ("large.json", "above the limit of 2048; hand on large data as an artifact"),
        ("unknown.json", "debug.nope"),
    ],
    ids=("no_file", "folder", "binary", "no_suffix", "many", "large", "unknown_handler"),
)
def test_wrong_definition_exits_2_by_every_command_that_takes_one(
    main: Any, site: Any, tmp_path: Path, name: str, told: str
) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for binary in ("binary.yaml", "binary"):
        (tmp_path / binary).write_bytes(b"\xff\x00" * 200)
    tasks = [{"id": f"t{n}", "handler": "debug.noop"} for n in range(3)]
    (tmp_path / "many.json").write_text(json.dumps({"id": "many", "tasks": tasks}))
    large = {"id": "a", "handler": "debug.echo", "params": {"x": "y" * 3000}}
    (tmp_path / "large.json").write_text(json.dumps({"id": "large", "tasks": [large]}))
    (tmp_path / "unknown.json").write_text(json.dumps({"id": "u", "tasks": [{"id": "a", "handler": "debug.nope"}]}))
    limits = {"PIPELINE_MAX_TASKS": "2", "PIPELINE_MAX_PARAMS_BYTES": "2048"}
    for command in ("validate", "compile", "register", "run"):
        if (command, name) == ("compile", "unknown.json"):
            continue  # draws what no handler is installed for
        code, err = main(command, name, **limits)
        assert (command, code) == (command, 2)
        assert told in err
        assert len(err.splitlines()) == 1
    assert sum(rows(site.settings.database_url).values()) == 0


def test_register_of_a_good_and_a_bad_file_records_neither(main: Any, site: Any, tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(EMPTY))
    (tmp_path / "bad.json").write_text('{"id": "bad", "tasks": []}')
    code, err = main("register", "good.json", "bad.json")
    assert code == 2 and "bad.json:1: tasks: " in err
    assert sum(rows(site.settings.database_url).values()) == 0


# handlers


def test_result_that_is_no_json_or_too_large_fails_the_task_and_names_the_alternative(worked: Any) -> None:
    for handler, params, told in (
        ("site.return_a_set_of_objects", {}, "return dicts, lists, text, numbers, booleans, None or pydantic models"),
        ("site.return_bytes", {"size": 300_000}, "write the data with context.artifacts and return the reference"),
    ):
        task = {"id": "a", "handler": handler, "params": params}
        document = worked.json("run", worked.write("w.json", {"id": handler, "tasks": [task]}), code=1)
        assert told in document["error_message"]
        assert (document["tasks"]["a"]["error_type"], document["tasks"]["a"]["attempt"]) == ("ResultError", 1)
        assert document["results"] == {}


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("broken_handlers", "ZeroDivisionError"),
        ("leaving_handlers", "SystemExit"),
        ("rival_handlers", "'debug.noop' is declared by handlers.debug.noop too"),
        ("unreadable_handlers", "signature of 'unreadable'"),
    ],
    ids=("missing", "broken", "leaving", "rival", "unreadable"),
)
def test_module_of_handlers_that_does_not_load_exits_2_and_is_named(
    main: Any, site: Any, tmp_path: Path, module: str, told: str
) -> None:
    begin = "from pipeline import handler\n"
    for name, text in (
        ("broken", "1 / 0\n"),
        ("leaving", "import sys\nsys.exit(0)\n"),
        ("rival", begin + "@handler('debug.noop')\ndef mine(): ...\n"),
        ("unreadable", begin + "@handler('unreadable')\ndef mine(a: 'Nowhere'): ...\n"),
    ):
        (tmp_path / f"{name}_handlers.py").write_text(text)
    (tmp_path / "empty.json").write_text(json.dumps(EMPTY))
    sys.modules.pop(module, None)
    for command in (("run", "empty.json"), ("validate", "empty.json"), ("handlers",), ("worker",)):
        code, err = main(*command, PIPELINE_HANDLERS=module)
        assert (command, code) == (command, 2)
        assert f"handlers of module '{module}' cannot be loaded: " in err and told in err
        assert "take it out of PIPELINE_HANDLERS" in err
    assert sum(rows(site.settings.database_url).values()) == 0
    for command in (("list",), ("status", "exec-000000000000")):  # what needs no handler goes on
        assert main(*command, PIPELINE_HANDLERS=module)[0] in (0, 3)


# settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEASE", "soon"), ("CONCURRENCY", "0"), ("POOL", "gevent"), ("QUEUE", "a b"), ("FLOWER_PORT", "99999"),
        ("BROKER_URL", "sqs://somewhere"), ("DATABASE_URL", "mysql://somewhere"), ("RECOVERY_BESIDE", "perhaps"),
        ("FLOWER_BASIC_AUTH", "nopassword"), ("LOG_LEVEL", "LOUD"),
    ],
)  # fmt: skip
def test_setting_that_cannot_be_used_exits_2_and_names_the_variable(main: Any, name: str, value: str) -> None:
    code, err = main("list", **{f"PIPELINE_{name}": value})
    assert code == 2
    assert err.startswith(f"PIPELINE_{name}: ")
    assert len(err.splitlines()) == 1


# services


def test_database_that_is_down_exits_4_and_names_the_variable(main: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text(json.dumps(EMPTY))
    down = {"PIPELINE_DATABASE_URL": "postgresql://ana:sesame@127.0.0.1:1/none"}
    for command in (
        ("run", "empty.json"), ("run", "empty"), ("register", "empty.json"), ("status", "exec-000000000000"), ("list",),
        ("cancel", "exec-000000000000"), ("db", "status"), ("db", "upgrade"), ("up",), ("worker",), ("scheduler",),
        ("status", "exec-000000000000", "--watch"), ("demo",),
    ):  # fmt: skip
        code, err = main(*command, **down)
        assert (command, code) == (command, 4)
        assert err.startswith("Postgres cannot be reached: ") and err.endswith("; look at PIPELINE_DATABASE_URL\n")
        assert len(err.splitlines()) == 1 and "sesame" not in err


def test_database_on_another_schema_exits_4_and_says_how_to_mend_it(
    main: Any, site: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.json").write_text(json.dumps(EMPTY))
    commands = (("run", "empty.json"), ("register", "empty.json"), ("list",), ("up",), ("worker",), ("scheduler",), ("demo",))
    celery = [sys.executable, "-m", "celery", "-A", "pipeline", "worker"]
    with psycopg.connect(site.settings.database_url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA pipeline CASCADE")
        for command in commands:
            code, err = main(*command)
            assert (command, code) == (command, 4)
            assert "run `pipeline db upgrade`" in err
            assert len(err.splitlines()) == 1
        refused = subprocess.run(celery, env=site.env, capture_output=True, text=True, timeout=60, check=False)
        assert refused.returncode != 0
        assert "worker not started: " in refused.stderr and "run `pipeline db upgrade`" in refused.stderr
        site.engine.installation.store.close()
        assert command_line.main(["db", "upgrade"]) == 0
        assert "upgraded to 1 (initial)" in capsys.readouterr().out
        connection.execute("INSERT INTO pipeline.schema_versions (version, name) VALUES (999, 'of the future')")
        code, err = main("up")
        newest = migrations()[-1].version
        assert (code, err) == (
            4, f"the database is on schema version 999, this code knows {newest}; run a version of chordal that fits\n"
        )  # fmt: skip
        connection.execute("DELETE FROM pipeline.schema_versions WHERE version = 999")


@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_broker_that_is_down_delays_the_start_and_loses_nothing(cli: Any, site: Any, broker: str) -> None:
    file = cli.write("empty.json", EMPTY)
    submitted = cli("run", file, "--no-wait", PIPELINE_BROKER_URL=NOWHERE[broker])
    assert submitted.code == 0
    assert submitted.err.startswith("the broker cannot be reached: ") and "once it is back" in submitted.err
    assert len(submitted.err.splitlines()) == 1
    execution = submitted.out.strip()
    assert site.engine.get_execution(execution).status == "pending"
    up = cli("up", PIPELINE_BROKER_URL=NOWHERE[broker])
    assert up.code == 4 and up.err.endswith("; look at PIPELINE_BROKER_URL\n") and len(up.err.splitlines()) == 1
    with site.worker(pool="threads"):
        assert site.engine.wait(execution, 60).status == "success"


def test_disk_that_is_full_fails_the_task_by_an_artifact_error_and_leaves_no_half_file(
    cli: Any, site: Any, tmp_path: Path, eventually: Any
) -> None:
    cli.write("writing_handlers.py", (
        "from pipeline import Context, handler\n"
        "@handler('write')\n"
        "def write(size: int, *, context: Context):\n"
        "    with context.artifacts.write('data.bin') as writing:\n"
        "        writing.path.write_bytes(b'x' * size)\n"
        "    return writing.artifact\n"
    ))  # fmt: skip
    more = {"PIPELINE_HANDLERS": "writing_handlers"}

    def executed(*tasks: dict[str, Any]) -> Any:
        policy = {"retry_policy": {"max_retries": 0}}
        definition = {"id": f"w{len(list(tmp_path.iterdir()))}", "tasks": [{**task, **policy} for task in tasks]}
        file = cli.write(f"{definition['id']}.json", definition)
        execution = cli("run", file, "--no-wait", **more).out.strip()
        return site.engine.wait(execution, 60)

    # a limit on the size of files says "no" as a full disk does, where a disk of one's own would need root
    limited = ["/bin/sh", "-c", 'ulimit -f 2048; exec "$@"', "sh", sys.executable, "-m", "pipeline", "worker"]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [*limited, "--pool", "solo"], env={**site.env, **more}, cwd=tmp_path, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        fits = executed({"id": "a", "handler": "write", "params": {"size": 1000}})
        assert fits.status == "success"
        large = executed({"id": "a", "handler": "write", "params": {"size": 30_000_000}})
        data = executed({"id": "a", "handler": "sql.transform", "params": {"sql": "SELECT hash(i) AS h FROM range(3000000) r(i)"}})
    finally:
        worker.terminate()
        worker.wait(60)
    root = Path(site.settings.artifacts_root)
    for execution in (large, data):
        assert execution.status == "failed"
        task = execution.tasks["a"]
        assert task.error_type == "ArtifactError"
        assert str(root) in task.error_message and "File too large" in task.error_message
        assert [path for path in (root / execution.execution_id).rglob("*") if not path.is_dir()] == []
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["data.bin"]
    assert list(root.rglob(".writing-*")) == []
    assert eventually(lambda: worker.returncode == 0)
