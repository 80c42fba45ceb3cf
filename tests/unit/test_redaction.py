"""Values of secrets are replaced wherever text leaves the process."""

from __future__ import annotations

import io
import json
import logging
from urllib.parse import quote, quote_plus

from hypothesis import given
from hypothesis import strategies as st

from pipeline.redaction import Redactor

SECRET = 'pa"ss\\wört\n'


def test_text_is_redacted_longest_value_first() -> None:
    redactor = Redactor.of(["open sesame", "sesame", "open sesame 2"])
    assert redactor.text("open sesame 2, open sesame, sesame!") == "[secret], [secret], [secret]!"


def test_short_values_are_left_for_they_would_blot_out_ordinary_text() -> None:
    redactor = Redactor.of(["", "a", "abc", "abcd"])
    assert redactor.text("a banana abc") == "a banana abc"


def test_secret_is_redacted_as_python_json_and_urls_write_it() -> None:
    redactor = Redactor.of([SECRET])
    for text in (repr(SECRET)[1:-1], json.dumps(SECRET)[1:-1], quote(SECRET), quote_plus(SECRET)):
        assert redactor.text(f"<{text}>") == "<[secret]>"


def test_value_is_redacted_in_keys_and_deep_inside() -> None:
    redactor = Redactor.of([SECRET])
    assert redactor.value([{SECRET: [SECRET, 1, None]}, True]) == [{"[secret]": ["[secret]", 1, None]}, True]
    assert Redactor.of(["12345"]).value({"n": 12345, "m": 123456}) == {"n": "[secret]", "m": 123456}
    untouched = {"a": [1]}
    assert Redactor.of([]).value(untouched) is untouched


@given(st.text(min_size=4, max_size=12), st.recursive(st.text(), st.lists, max_leaves=5))
def test_no_secret_is_left_in_any_value(secret: str, around: object) -> None:
    shown = Redactor.of([secret]).value({"x": secret, "around": around, "both": f"<{secret}>"})
    assert shown["x"] == "[secret]"
    assert json.loads(json.dumps(shown)) == shown


def test_log_records_lose_secrets_in_message_arguments_and_traceback() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(Redactor.of(["open sesame"]))
    logger = logging.Logger("test")  # noqa: LOG001 - one that no other test hears
    logger.addHandler(handler)
    try:
        raise RuntimeError("rejected open sesame")
    except RuntimeError:
        logger.exception("token %s of %d", "open sesame", 7)
    told = stream.getvalue()
    assert "token [secret] of 7" in told
    assert "RuntimeError: rejected [secret]" in told
    assert "open sesame" not in told


def test_log_record_keeps_its_arguments_where_there_is_no_secret() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "%s", ("a",), None)
    assert Redactor.of([]).filter(record)
    assert record.args == ("a",)


def test_repr_of_the_redactor_shows_no_secret() -> None:
    assert "sesame" not in repr(Redactor.of(["open sesame"]))
