"""Names that RocketMQ allows, and names of files and memory objects."""

from __future__ import annotations

import pytest

from shmbroker import naming
from shmbroker.errors import NameIllegal


@pytest.mark.parametrize("name", ["orders", "a", "A-Z_0%|9", "x" * 127, "%RETRY%" + "g" * 120, "%DLQ%" + "g" * 250])
def test_a_topic_name_of_rocketmqs_alphabet_and_length_is_allowed(name: str) -> None:
    assert naming.check_topic(name) == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        ("x" * 128, "128 characters, at most 127"),
        ("%RETRY%" + "x" * 249, "256 characters, at most 255"),
        ("with space", "only letters"),
        ("a/b", "only letters"),
        ("../up", "only letters"),
        ("ünï", "only letters"),
        ("\u0661", "only letters"),
        ("line\n", "only letters"),
        ("nul\0", "only letters"),
        (b"bytes", "must be a str"),
        (None, "must be a str"),
    ],
)
def test_any_other_topic_name_is_refused_with_the_reason(name: object, reason: str) -> None:
    with pytest.raises(NameIllegal, match=reason):
        naming.check_topic(name)  # type: ignore[arg-type]


def test_a_group_name_is_shorter_and_some_are_reserved() -> None:
    assert naming.check_group("g" * 120) == "g" * 120
    with pytest.raises(NameIllegal, match="121 characters, at most 120"):
        naming.check_group("g" * 121)
    for reserved in ("DEFAULT_PRODUCER", "DEFAULT_CONSUMER"):
        with pytest.raises(NameIllegal, match="reserved"):
            naming.check_group(reserved)


def test_segment_names_sort_as_positions_do_and_are_read_back() -> None:
    starts = [0, 64, 10**9, 2**63]
    names = [naming.segment_name(start) for start in starts]
    assert names == sorted(names)
    assert [naming.segment_start(name) for name in names] == starts
    assert naming.segment_start("00000000000000000000.tmp") is None
    assert naming.segment_start("\u0661" * 20) is None


def test_object_names_cannot_be_guessed_and_nothing_else_is_taken_for_one() -> None:
    pairs = [naming.object_names() for _ in range(100)]
    assert len({name for pair in pairs for name in pair}) == 200
    assert all(len(name.split("-")[1]) == 32 for pair in pairs for name in pair), "128 random bits"
    assert all(naming.is_object_name(name) for pair in pairs for name in pair)
    for forged in ("/shmbroker-1-c", "/other", "/shmbroker-" + "a" * 32 + "-c/../x", pairs[0][0] + "\n", "", None, 7):
        assert not naming.is_object_name(forged)
