"""The status of a send, as people and programs meet it."""

from __future__ import annotations

import json

import pytest

from shmbroker import SendStatus


@pytest.mark.parametrize("status", SendStatus)
def test_a_status_is_shown_by_its_name_and_compares_as_its_number(status: SendStatus) -> None:
    assert f"{status}" == str(status) == status.name
    assert status == int(status)
    assert f"{status:d}" == json.dumps(status) == str(int(status))
