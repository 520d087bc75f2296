"""``shmbroker group set-retry`` and ``shmbroker dlq``: dead letters from the command line, compared by content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import shmbroker, shmbroker_json
from support.failing import GROUP, at_once
from support.running import QUICK, running

from shmbroker import RetryPolicy
from shmbroker.broker import Broker
from shmbroker.retry import parse_policy
from shmbroker.tools.exit_codes import ExitCode


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with running(tmp_path / "broker", **QUICK) as opened:
        opened.create_topic("orders", queues=1)
        yield opened


def test_a_retry_policy_is_set_and_shown(broker: Broker) -> None:
    broker.create_group(GROUP, at_once(1))
    words = "group set-retry audit exponential --initial 1s --multiplier 3 --longest 10m --max 8".split()
    answer = shmbroker_json(broker.directory, *words)
    policy = RetryPolicy("exponential", 8, initial=1.0, multiplier=3.0, longest=600.0)
    assert parse_policy(broker.region.retry_text(GROUP)) == policy
    assert RetryPolicy(**answer["retry"]) == policy
    assert "8 retries after 1s, times 3, at most 10m" in shmbroker(broker.directory, "group", "show", GROUP).stdout
    shmbroker_json(broker.directory, "group", "set-retry", GROUP, "table", "--delays", "0s 1.5s 1m", "--max", "3")
    assert parse_policy(broker.region.retry_text(GROUP)) == RetryPolicy("table", 3, delays=(0.0, 1.5, 60.0))
    assert shmbroker_json(broker.directory, "group", "show", GROUP)["retry"]["delays"] == [0.0, 1.5, 60.0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["audit", "table"], "0 delays in a table of retries: from 1 to 32"),
        (["audit", "levels", "--max", "251"], "max_retries = 251: an integer from 0 to 250"),
        (["audit", "exponential", "--initial", "5"], "delay '5': a number and ms, s, m, h or d"),
        (["nobody", "levels"], "group 'nobody' does not exist"),
    ],
)
def test_a_policy_that_cannot_be_meant_changes_nothing(broker: Broker, words: list[str], says: str) -> None:
    broker.create_group(GROUP, at_once(1))
    done = shmbroker(broker.directory, "group", "set-retry", *words)
    assert done.returncode == ExitCode.USAGE
    assert says in done.stderr
    assert parse_policy(broker.region.retry_text(GROUP)) == at_once(1)
