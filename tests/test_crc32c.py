"""CRC-32C: the chosen implementation against the portable one, and both against values published elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmbroker._native._core import CRC_IMPLEMENTATION, crc32c, crc32c_portable

# RFC 3720, appendix B.4, and the check value of the catalogue of CRC algorithms.
KNOWN = [
    (b"", 0x00000000),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
]


@pytest.mark.parametrize("crc", [crc32c, crc32c_portable])
@pytest.mark.parametrize(("data", "value"), KNOWN)
def test_published_values_come_out(crc: type[int], data: bytes, value: int) -> None:
    assert crc(data) == value


def test_the_implementation_in_use_has_a_name() -> None:
    assert CRC_IMPLEMENTATION in {"sse4.2", "armv8", "portable"}


# Around one word, one, two and three short blocks (168 bytes), and one, two and three long ones (1024).
SIZES = sorted(
    {size + off for size in (8, 64, 168, 336, 504, 1008, 1024, 2048, 3072, 3576, 6144, 65_536) for off in (-1, 0, 1)}
)


@pytest.mark.parametrize("size", SIZES)
def test_both_implementations_agree_at_the_edges_of_their_blocks(size: int) -> None:
    data = bytes((index * 131 + index // 251) & 0xFF for index in range(size + 7))
    for shift in range(8):
        view = memoryview(data)[shift : shift + size]
        assert crc32c(view) == crc32c_portable(view)


@given(st.binary(max_size=5000), st.integers(0, 2**32 - 1))
def test_both_implementations_agree(data: bytes, start: int) -> None:
    assert crc32c(data, start) == crc32c_portable(data, start)


@given(st.binary(max_size=3000), st.binary(max_size=3000))
def test_a_crc_continues_where_the_last_one_ended(first: bytes, second: bytes) -> None:
    assert crc32c(second, crc32c(first)) == crc32c(first + second)


def test_something_that_is_no_buffer_is_refused() -> None:
    with pytest.raises(TypeError):
        crc32c("text")
