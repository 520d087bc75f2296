"""When a failed message is tried again: pure policy."""

from __future__ import annotations

import re
from typing import Any

import pytest

from shmbroker.delays import DEFAULT_LEVELS, format_delay, parse_delay, parse_delay_levels
from shmbroker.errors import BadRequest, ConfigError
from shmbroker.retry import DEFAULT_POLICY, RetryPolicy, parse_policy

LEVELS = parse_delay_levels(DEFAULT_LEVELS)


def test_the_levels_are_rocketmqs() -> None:
    minutes = [60.0 * minute for minute in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 30, 60, 120)]
    assert (1.0, 5.0, 10.0, 30.0, *minutes) == LEVELS


@pytest.mark.parametrize("seconds", [0.0, 0.25, 1.0, 1.5, 90.0, 120.0, 7200.0, 86_400.0])
def test_a_delay_is_read_as_it_was_written(seconds: float) -> None:
    assert parse_delay(format_delay(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "-1s", "1 s", "5x", "41d", "1e3s"])
def test_what_is_no_delay_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ConfigError, match="a number and ms, s, m, h or d"):
        parse_delay(text)


def test_by_default_sixteen_retries_wait_for_the_levels_from_three_on() -> None:
    assert DEFAULT_POLICY.max_deliveries == 17
    assert tuple(DEFAULT_POLICY.delay(retry, LEVELS) for retry in range(1, 17)) == LEVELS[2:]
    assert DEFAULT_POLICY.delay(17, LEVELS) == LEVELS[-1]


def test_exponential_delays_grow_up_to_the_longest() -> None:
    policy = RetryPolicy("exponential", initial=5, multiplier=2, longest=7200)
    assert [policy.delay(retry, LEVELS) for retry in (1, 2, 3, 11, 12, 250)] == [5, 10, 20, 5120, 7200, 7200]


def test_a_table_ends_with_its_last_delay() -> None:
    policy = RetryPolicy("table", max_retries=5, delays=(0.0, 1.5, 60.0))
    assert [policy.delay(retry, LEVELS) for retry in range(1, 6)] == [0.0, 1.5, 60.0, 60.0, 60.0]


@pytest.mark.parametrize(
    "policy",
    [
        RetryPolicy(),
        RetryPolicy(max_retries=0),
        RetryPolicy("exponential", 3, initial=0.1, multiplier=1.5, longest=9),
        RetryPolicy("table", 250, delays=(0.0, 3600.0)),
    ],
)
def test_a_policy_is_read_as_it_was_written(policy: RetryPolicy) -> None:
    assert parse_policy(policy.encode()) == policy


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "fibonacci"}, {"max_retries": 251}, {"max_retries": -1}, {"max_retries": True}, {"kind": "table"},
        {"kind": "table", "delays": (1.0,) * 33}, {"kind": "table", "delays": (-1.0,)}, {"multiplier": 0.5},
        {"initial": float("nan")}, {"longest": 41 * 86_400.0},
    ],
)  # fmt: skip
def test_a_policy_that_cannot_be_meant_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        RetryPolicy(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"delays": ("1s",)}, "delays = '1s': must be seconds, as a float or an int, not str"),
        ({"delays": "1s 5s"}, "delays = '1s 5s': must be a tuple of seconds, not str"),
        ({"delays": 1.0}, "delays = 1.0: must be a tuple of seconds, not float"),
        ({"initial": "1"}, "initial = '1': must be seconds, as a float or an int, not str"),
        ({"longest": None}, "longest = None: must be seconds, as a float or an int, not NoneType"),
        ({"multiplier": "2"}, "multiplier = '2': must be a number, as a float or an int, not str"),
    ],
)
def test_a_policy_of_the_wrong_types_is_refused_by_the_name_of_the_argument(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadRequest, match=re.escape(says)):
        RetryPolicy(**({"kind": "table", "delays": (1.0,)} | settings))


@pytest.mark.parametrize("text", ["[]", '{"kind":1}', '{"sort":"levels"}', "{", '{"kind":"table","delays":["1"]}'])
def test_text_that_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_policy(text)
