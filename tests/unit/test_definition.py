from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.definition import RetryPolicy, TaskDefinition, WorkflowDefinition

# the same examples in every run, and no clock: a slow machine is no failure
PROPERTY = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
POLICIES = st.builds(
    RetryPolicy,
    max_retries=st.integers(0, 1000),
    backoff=st.sampled_from(["exponential", "linear", "fixed"]),
    jitter=st.sampled_from(["none", "full", "equal"]),
    max_delay=st.none() | st.floats(0, 604_800),
)


def test_task_with_id_alone_has_the_documented_defaults() -> None:
    task = TaskDefinition(id="a")
    assert (task.name, task.type, task.timeout, task.dependencies, task.params) == ("a", "task", 300, (), {})
    assert (task.retry_policy.max_retries, task.retry_policy.backoff, task.retry_policy.jitter) == (
        3,
        "exponential",
        "full",
    )


@pytest.mark.parametrize(
    ("backoff", "delays"),
    [
        ("exponential", [1, 2, 4, 8, 16, 32, 60, 60]),
        ("linear", [0, 5, 10, 15, 20, 25, 30, 35]),
        ("fixed", [1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_delay_without_jitter_follows_the_backoff(backoff: str, delays: list[float]) -> None:
    policy = RetryPolicy.model_validate({"backoff": backoff, "jitter": "none"})
    assert [policy.delay(n, 0.5) for n in range(8)] == delays


@PROPERTY
@given(policy=POLICIES, retry=st.integers(0, 10_000), die=st.floats(0, 1, exclude_max=True))
def test_delay_with_any_jitter_is_never_above_the_plain_delay_nor_the_cap(
    policy: RetryPolicy, retry: int, die: float
) -> None:
    plain = policy.model_copy(update={"jitter": "none"}).delay(retry, die)
    assert 0 <= policy.delay(retry, die) <= plain
    assert policy.max_delay is None or plain <= policy.max_delay


def test_delay_with_equal_jitter_is_at_least_half() -> None:
    assert RetryPolicy(backoff="fixed", jitter="equal").delay(0, 0.0) == 0.5


@pytest.mark.parametrize("timeout", [0, -1, True, "300", float("nan"), float("inf"), 604_801])
def test_timeout_that_is_no_number_in_range_is_refused(timeout: object) -> None:
    with pytest.raises(ValidationError):
        TaskDefinition.model_validate({"id": "a", "timeout": timeout})


@pytest.mark.parametrize("id_", ["", "a b", "-a", "a/b", "a\n", "é", "a" * 129, 5])
def test_task_id_that_is_no_name_is_refused(id_: object) -> None:
    with pytest.raises(ValidationError):
        TaskDefinition.model_validate({"id": id_})


def test_version_as_whole_number_is_text_and_as_float_is_refused() -> None:
    assert WorkflowDefinition.model_validate({"id": "a", "version": 2, "tasks": [{"id": "t"}]}).version == "2"
    with pytest.raises(ValidationError):
        WorkflowDefinition.model_validate({"id": "a", "version": 1.1, "tasks": [{"id": "t"}]})


def test_digest_ignores_order_of_keys_and_spelled_out_defaults() -> None:
    short = WorkflowDefinition.model_validate({"id": "a", "tasks": [{"id": "t", "params": {"x": 1, "y": 2}}]})
    long = WorkflowDefinition.model_validate(
        {"tasks": [{"params": {"y": 2, "x": 1}, "timeout": 300, "name": "t", "id": "t"}], "version": "1", "id": "a"}
    )
    assert short.digest == long.digest


def test_digest_changes_with_content() -> None:
    one, two = (
        WorkflowDefinition.model_validate({"id": "a", "tasks": [{"id": "t", "params": {"x": x}}]}) for x in (1, "1")
    )
    assert one.digest != two.digest


@PROPERTY
@given(
    params=st.dictionaries(TEXT, VALUES, max_size=3),
    policy=POLICIES,
    variables=st.dictionaries(TEXT, VALUES, max_size=3),
)
def test_round_trip_through_json_keeps_content_and_digest(
    params: dict[str, object], policy: RetryPolicy, variables: dict[str, object]
) -> None:
    tasks = (TaskDefinition(id="a", params=params, retry_policy=policy), TaskDefinition(id="b", dependencies=("a",)))
    definition = WorkflowDefinition(id="w", tasks=tasks, variables=variables)
    again = WorkflowDefinition.from_json(definition.to_json())
    assert again == definition
    assert again.digest == definition.digest
