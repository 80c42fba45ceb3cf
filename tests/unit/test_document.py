from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.document import Format, Limits, of_data, parse_document, read_document
from pipeline.errors import DefinitionError

# the same examples in every run, and no clock: a slow machine is no failure
PROPERTY = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), inner)
    ),
    max_leaves=12,
)


def data(text: str | bytes, form: Format = "yaml") -> Any:
    return parse_document(text, "f", form).data


def refusal(text: str | bytes, form: Format = "yaml", limits: Limits | None = None) -> str:
    with pytest.raises(DefinitionError) as caught:
        parse_document(text, "f", form, limits or Limits())
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2013-01-01", "2013-01-01"),
        ("2013-01-01T10:00:00Z", "2013-01-01T10:00:00Z"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("True", "True"),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("007", "007"),
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("+1", "+1"),
        ("-1", -1),
        ("1.50", 1.5),
        ("1e3", 1000.0),
        ("'1'", "1"),
        ('"true"', "true"),
        ("|\n  a\n  b\n", "a\nb\n"),
        ("é", "é"),
    ],
)
def test_yaml_scalar_means_what_it_looks_like(text: str, value: object) -> None:
    found = data(f"a: {text}")["a"]
    assert found == value
    assert type(found) is type(value)


def test_yaml_lines_are_those_of_keys_and_items() -> None:
    document = parse_document("a: 1\nb:\n  - x\n  - c: 2\n    d:\n      e: f\n", "f", "yaml")
    assert {path: document.line(path) for path in [("a",), ("b",), ("b", 0), ("b", 1, "c"), ("b", 1, "d", "e")]} == {
        ("a",): 1,
        ("b",): 2,
        ("b", 0): 3,
        ("b", 1, "c"): 4,
        ("b", 1, "d", "e"): 6,
    }


def test_line_of_an_unknown_path_is_that_of_the_nearest_around_it() -> None:
    document = parse_document("a:\n  b: 1\n", "f", "yaml")
    assert document.line(("a", "b", "zz", 3)) == 2
    assert document.line(("zz",)) == 1
    assert of_data({"a": 1}).line(("a",)) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x 1\nb: 2", "f:1: an anchor (&x)"),
        ("a: 1\nb: *x", "f:2: an alias (*x)"),
        ("*x : 1", "an alias (*x)"),
        ("a: 1\nb: 2\na: 3", "f:3: key 'a' stands twice in one mapping; line 1 has it first"),
        ("1: a", "key 1 is not text; quote it"),
        ("true: a", "key true is not text; quote it"),
        ("? [a]\n: b", "a key that is a list or a mapping"),
        ("a: 1\nb: {{ input.x }}", 'f:2: a key that is a list or a mapping; quote a template: "{{ ... }}"'),
        ("a: !!python/object:os.system x", "a tag (tag:yaml.org,2002:python/object:os.system)"),
        ("a: !x\n  b: c", "a tag (!x)"),
        ("a: .inf", ".inf is no number that JSON has"),
        ("a: .nan", ".nan is no number that JSON has"),
        ("a: 1e999", "1e999 is no number that JSON has"),
        ("a: " + "9" * 5000, "is no number that JSON has"),
        ("a:\n\tb: 1", "f:2: not YAML"),
        ("a:\n\tb: 1", "indent with spaces, not tabs"),
        ("a: [1,\n2", "f:3: not YAML: while parsing a flow sequence"),
        ("a: 1\n---\nb: 2", "f:2: a second document"),
        ("a: 1\nb: \x01", "f:2: not YAML: control characters are not allowed"),
        ("a: 1\nb: \0", "f:2: a NUL character"),
        ("a: 1\nb: \ud800", "f:2: not UTF-8 text"),
        (b"a: 1\nb: \xff", "f:2: not UTF-8 text"),
        ('a: "\\0"', "a NUL character or half a surrogate pair"),
        ("a: " + "[" * 40, "nested deeper than 32 levels"),
        ("- " * 40 + "a", "nested deeper than 32 levels"),
        ("[" * 100_000, "exceeded maximum nesting depth"),
    ],
)
def test_yaml_that_is_refused_says_where_and_why(text: str | bytes, words: str) -> None:
    assert words in refusal(text)


def test_yaml_problems_are_reported_together() -> None:
    assert refusal("a: &x 1\nb: *x\n2: c\nq: {{ y }}\nz: .inf").count("\n") == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1,\n "a": 2}', "f:2: key 'a' stands twice"),
        ("[1,\n]", "f:2: not JSON: expected a value, found ']'"),
        ('{"a": 1,}', "a key must be text in double quotes"),
        ("{'a': 1}", "a key must be text in double quotes"),
        ("[1 2]", "expected , or ], found '2'"),
        ('{"a": 1]', "expected , or }, found ']'"),
        ('{"a" 1}', "expected : after a key"),
        ('{"a": NaN}', "found 'NaN'"),
        ("[-Infinity]", "found '-Infinity'"),
        ("[01]", "not JSON"),
        ("1 2", "text after the end"),
        ("", "expected a value"),
        ('"a\tb"', "Invalid control character"),
        ('"a', "Unterminated string"),
        ("[1e999]", "is no number that JSON has"),
        ('["\\ud800"]', "half a surrogate pair"),
        ('["\\u0000"]', "a NUL character"),
        ("[" * 100_000, "nested deeper than 32 levels"),
    ],
)
def test_json_that_is_refused_says_where_and_why(text: str, words: str) -> None:
    assert words in refusal(text, "json")


def test_json_lines_are_those_of_keys_and_items() -> None:
    document = parse_document('\t{"a": [1,\n 2],\n\n "b": {"c": null}}', "f", "json")
    assert document.data == {"a": [1, 2], "b": {"c": None}}
    assert [document.line(path) for path in [("a",), ("a", 1), ("b",), ("b", "c")]] == [1, 2, 4, 4]


@PROPERTY
@given(value=VALUES, indent=st.sampled_from([None, 0, 1]), escaped=st.booleans())
def test_json_of_any_value_is_read_as_the_standard_library_reads_it(
    value: object, indent: int | None, escaped: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=escaped)
    found = parse_document(text, "f", "json", Limits(depth=1000)).data
    assert found == json.loads(text)
    assert json.dumps(found) == json.dumps(json.loads(text))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


@PROPERTY
@given(text=st.text('[]{},:"1a -.e\n', max_size=12))
def test_json_of_any_text_is_refused_exactly_where_the_standard_library_does(text: str) -> None:
    try:
        expected = json.loads(text, object_pairs_hook=_unique)
    except ValueError:
        assert refusal(text, "json")
    else:
        if expected in (float("inf"), float("-inf")):
            assert refusal(text, "json")
        else:
            assert data(text, "json") == expected


@PROPERTY
@given(text=st.text(max_size=60) | st.text("ab:-[]{}&*!|>'\"#\n ", max_size=40))
def test_yaml_of_any_text_is_read_or_refused_with_a_line(text: str) -> None:
    lines: list[int | None] = []
    try:
        json.dumps(parse_document(text, "f", "yaml").data, allow_nan=False)
    except DefinitionError as exc:
        lines += (problem.line for problem in exc.problems)
    assert None not in lines


def test_text_above_the_limit_is_refused_before_it_is_parsed() -> None:
    assert "larger than 10 bytes" in refusal("a: " + "x" * 8, limits=Limits(document_bytes=10))
    assert "larger than 10 bytes" in refusal("a: " + "é" * 4, limits=Limits(document_bytes=10))


def test_byte_order_mark_is_passed_over() -> None:
    assert data(b"\xef\xbb\xbfa: 1") == {"a": 1}


@pytest.mark.parametrize(("name", "text"), [("w.yaml", "a: 1"), ("w.yml", "a: 1"), ("w.JSON", '{"a": 1}')])
def test_file_is_read_by_its_suffix(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    document = read_document(tmp_path / name)
    assert (document.data, document.source) == ({"a": 1}, str(tmp_path / name))


def test_file_that_is_missing_or_has_another_suffix_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"none\.yaml: cannot be read: No such file"):
        read_document(tmp_path / "none.yaml")
    with pytest.raises(DefinitionError, match=r"w\.toml: not a definition by its name"):
        read_document(tmp_path / "w.toml")
    with pytest.raises(DefinitionError, match="cannot be read: Is a directory"):
        (tmp_path / "d.yaml").mkdir()
        read_document(tmp_path / "d.yaml")


def test_file_above_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text("a: " + "x" * 100)
    with pytest.raises(DefinitionError, match="larger than 50 bytes"):
        read_document(tmp_path / "w.yaml", Limits(document_bytes=50))
