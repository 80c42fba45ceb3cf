"""The settings: one variable for each field, read once, and refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from config.settings import BUILT_IN_HANDLERS, Settings


def test_empty_environment_gives_the_defaults() -> None:
    read = Settings.from_env({})
    assert read == Settings()
    assert (read.database_url, read.broker_url, read.home) == (None, None, Path(".pipeline"))
    assert (read.flower_address, read.shell_enabled, read.python_calls) == ("127.0.0.1", False, ())
    assert read.handler_modules == BUILT_IN_HANDLERS


def test_every_field_is_described_and_frozen() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
    with pytest.raises(ValueError, match="frozen"):
        Settings().queue = "other"  # type: ignore[misc]


def test_variables_are_read_by_their_fields_names_and_lists_by_commas() -> None:
    read = Settings.from_env({
        "PIPELINE_QUEUE": "night", "PIPELINE_LEASE": "7.5", "PIPELINE_HANDLERS": " a.b, c ,,", "PIPELINE_SHELL_ENABLED": "true",
        "PIPELINE_DATABASE_URL": "postgresql://u:p@h/d", "PIPELINE_BROKER_URL": "", "OTHER": "x",
    })  # fmt: skip
    assert (read.queue, read.lease, read.handlers, read.shell_enabled) == ("night", 7.5, ("a.b", "c"), True)
    assert read.handler_modules == (*BUILT_IN_HANDLERS, "a.b", "c")
    assert (read.database_url, read.broker_url) == ("postgresql://u:p@h/d", None)
    assert read.model_fields_set >= {"queue", "lease", "handlers", "shell_enabled", "database_url"}


def test_environment_of_the_process_is_read_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_QUEUE", "mine")
    assert Settings.from_env().queue == "mine"
    child = Settings.child_environment({"PIPELINE_QUEUE": "its"})
    assert child == {**os.environ, "PIPELINE_QUEUE": "its"}


def test_secrets_and_connections_are_gathered_and_secrets_not_shown() -> None:
    read = Settings.from_env({
        "PIPELINE_SECRET_TOKEN": "s3cret", "PIPELINE_CONNECTION_WAREHOUSE": "postgresql://w/d",
        "PIPELINE_FLOWER_BASIC_AUTH": "ana:sesame,bo:other",
    })  # fmt: skip
    assert read.secrets == {"TOKEN": "s3cret"}
    assert read.connections == {"WAREHOUSE": "postgresql://w/d"}
    assert read.flower_basic_auth == ("ana:sesame", "bo:other")
    assert "s3cret" not in repr(read) and "sesame" not in repr(read)
    assert "secrets" not in read.for_handlers


def test_artifacts_lie_in_the_home_where_no_url_is_given(tmp_path: Path) -> None:
    assert Settings(home=tmp_path).artifacts_root == str(tmp_path / "artifacts")
    assert Path(Settings().artifacts_root).is_absolute()
    assert Settings(artifacts_url="s3://bucket/x").artifacts_root == "s3://bucket/x"


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("PIPELINE_LEASE", "soon", "number"), ("PIPELINE_LEASE", "0", "greater than or equal to 1"),
        ("PIPELINE_CONCURRENCY", "2.5", "integer"), ("PIPELINE_POOL", "gevent", "prefork|threads|solo"),
        ("PIPELINE_QUEUE", "a/b", "pattern"), ("PIPELINE_FLOWER_PORT", "70000", "65535"),
        ("PIPELINE_DATABASE_URL", "mysql://root:hidden@h/d", "postgresql://"),
        ("PIPELINE_DATABASE_URL", "host=h password=hidden", "postgresql://"),
        ("PIPELINE_BROKER_URL", "sqs://hidden@", "redis:// or amqp://"), ("PIPELINE_SHELL_ENABLED", "perhaps", "boolean"),
        ("PIPELINE_FLOWER_BASIC_AUTH", "hidden", "user:password"), ("PIPELINE_FLOWER_BASIC_AUTH", "ana:", "user:password"),
    ],
)  # fmt: skip
def test_wrong_value_is_refused_by_the_variables_name_and_not_shown(variable: str, value: str, told: str) -> None:
    with pytest.raises(ValueError) as refused:
        Settings.from_env({variable: value})
    assert str(refused.value).startswith(f"{variable}: ")
    assert told in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_all_wrong_variables_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"PIPELINE_POOL: .*; PIPELINE_LEASE: "):
        Settings.from_env({"PIPELINE_POOL": "x", "PIPELINE_LEASE": "x"})


@pytest.mark.parametrize("scheme", ["redis", "rediss", "amqp", "amqps"])
def test_broker_of_every_kind_that_the_engine_knows_is_taken(scheme: str) -> None:
    assert Settings(broker_url=f"{scheme}://h").broker_url == f"{scheme}://h"


def test_flower_for_others_needs_a_password() -> None:
    with pytest.raises(ValueError, match="PIPELINE_FLOWER_BASIC_AUTH: needed where PIPELINE_FLOWER_ADDRESS"):
        Settings.from_env({"PIPELINE_FLOWER_ADDRESS": "0.0.0.0"})
    open_ = {"PIPELINE_FLOWER_ADDRESS": "0.0.0.0", "PIPELINE_FLOWER_BASIC_AUTH": "ana:sesame"}
    assert Settings.from_env(open_).flower_address == "0.0.0.0"
    assert Settings.from_env({"PIPELINE_FLOWER_ADDRESS": "localhost"}).flower_basic_auth == ()
