"""SQL92 expressions: what each means, compared with a slow model, and what is said about those that are wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sql_model import MESSAGES, TREES, Tree, accepts, written

import shmbroker
from shmbroker import Message
from shmbroker._native._core import FILTER_INSTRUCTIONS, FILTER_NAMES_MAX, FILTER_STACK_MAX, run_filter
from shmbroker.sql_program import compile_sql


def matches(expression: str, tags: str | None = None, keys: str | None = None, **properties: str) -> bool:
    return shmbroker.sql(expression).accepts(Message("orders", b"x", tags=tags, keys=keys, properties=properties))


# ---- meaning ---------------------------------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(TREES, MESSAGES)
def test_the_native_core_answers_as_the_model_does(tree: Tree, message: dict[str, str]) -> None:
    text, program = compile_sql(written(tree))
    system = {"TAGS", "KEYS"}
    tags, keys = (message.get(name, "").encode() for name in ("TAGS", "KEYS"))
    properties = {name: value for name, value in message.items() if name not in system}
    full = {name: value for name, value in message.items() if value or name not in system}
    assert run_filter(program, tags, keys, properties) == accepts(tree, full)
    assert compile_sql(text) == (text, program), "the line that members compare means the same"


@pytest.mark.parametrize(
    ("expression", "properties", "expected"),
    [
        ("amount > 100 AND region = 'EU'", {"amount": "150.5", "region": "EU"}, True),
        ("amount > 100 AND region = 'EU'", {"amount": "100", "region": "EU"}, False),
        ("amount > 100 AND region = 'EU'", {"region": "EU"}, False),
        ("amount > 100 OR region = 'EU'", {"amount": "much", "region": "EU"}, True),
        ("NOT amount > 100", {"amount": "99"}, True),
        ("NOT amount > 100", {}, False),
        ("amount <> 100", {}, False),
        ("a = 1 OR b = 1 AND c = 1", {"a": "1"}, True),
        ("(a = 1 OR b = 1) AND c = 1", {"a": "1"}, False),
        ("NOT a = 1 AND b = 1", {"a": "2", "b": "1"}, True),
        ("a BETWEEN 1 AND 3", {"a": "3"}, True),
        ("a NOT BETWEEN 1 AND 3", {"a": "3"}, False),
        ("a NOT BETWEEN 1 AND 3", {}, False),
        ("a between b and c", {"a": "2", "b": "1", "c": "3"}, True),
        ("a IN ('x', 'it''s')", {"a": "it's"}, True),
        ("a NOT IN ('x')", {"a": "y"}, True),
        ("a NOT IN ('x')", {}, False),
        ("a IS NULL", {}, True),
        ("a IS NULL", {"a": ""}, False),
        ("a IS NOT NULL", {"a": ""}, True),
        ("a contains 'b'", {"a": "abc"}, True),
        ("a not contains 'b'", {"a": "abc"}, False),
        ("a StartsWith 'ab'", {"a": "abc"}, True),
        ("a ENDSWITH 'ab'", {"a": "abc"}, False),
        ("a = TRUE", {"a": "tRuE"}, True),
        ("a = FALSE", {"a": "yes"}, True),
        ("a", {"a": "true"}, True),
        ("NOT a", {"a": "false"}, True),
        ("TRUE", {}, True),
        ("a = 5l AND b = .5 AND c = 5.e1", {"a": "5", "b": "0.50", "c": "50"}, True),
        ("a > -5 AND a < +5", {"a": "-4"}, True),
        ("a >= 9223372036854775807", {"a": "9223372036854775806"}, False),
        ("/* what */ a = 'x' -- and why\n AND b = /* ? * / */ 'y'", {"a": "x", "b": "y"}, True),
        ("order = 1 AND inx = 2 AND $_1 = 4", {"order": "1", "inx": "2", "$_1": "4"}, True),
        ("A = 1", {"a": "1"}, False),
        ("a = 'blå'", {"a": "blå"}, True),
    ],
)  # fmt: skip
def test_the_grammar_means_what_it_says(expression: str, properties: dict[str, str], expected: bool) -> None:
    assert matches(expression, **properties) is expected


def test_tags_and_keys_are_asked_for_by_rocketmqs_names() -> None:
    assert matches("TAGS IN ('paid', 'refunded') AND KEYS CONTAINS 'order-7'", tags="paid", keys="order-7")
    assert not matches("TAGS IS NOT NULL OR KEYS IS NOT NULL")


def test_numbers_are_read_with_a_point_whatever_the_locale() -> None:
    code = (
        "import locale, shmbroker\nfrom shmbroker import Message\n"
        "for name in ('de_DE.UTF-8', 'fr_FR.UTF-8', 'C.UTF-8', 'C'):\n"
        "    try: locale.setlocale(locale.LC_ALL, name)\n"
        "    except locale.Error: continue\n"
        "    assert shmbroker.sql('a = 1.5').accepts(Message('t', b'x', properties={'a': '1.5'})), name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_expressions_that_differ_only_in_layout_are_one() -> None:
    layout = shmbroker.sql("amount>100 -- large\n  and region In('EU','US')")
    assert layout == shmbroker.sql("amount > 100 AND region IN ('EU', 'US')")
    assert layout.text == "amount > 100 AND region IN ('EU', 'US')"
    assert repr(layout) == """sql("amount > 100 AND region IN ('EU', 'US')")"""
    assert hash(layout) == hash(shmbroker.sql(layout.text))
    assert layout != shmbroker.sql("amount > 100")


def test_whoever_uses_no_expression_does_not_load_its_parser() -> None:
    code = (
        "import sys, shmbroker, shmbroker.consumer, shmbroker.subscription\nfrom shmbroker import sql\n"
        "shmbroker.subscription.parse_subscriptions({'orders': 'paid || refunded'})\n"
        "assert 'lark' not in sys.modules\nsql('a = 1')\nassert 'lark' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what is wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "column", "why"),
    [
        ("", 1, "it ends here, but a property, a number, a string, TRUE, FALSE, NOT or ( is expected"),
        ("amount >", 9, "it ends here, but a property, a number"),
        ("amount AN region", 8, "unexpected 'AN'; =, <>, >, >=, <, <=, BETWEEN, IN, IS, CONTAINS"),
        ("a = 5 b", 7, "unexpected 'b'; AND, OR or the end is expected"),
        ("(a = 5", 7, "it ends here, but OR or ) is expected"),
        ("a IN (5)", 7, "unexpected '5'; a string is expected"),
        ("a NOT > 5", 7, "unexpected '>'; BETWEEN, IN, CONTAINS"),
        ("a IS 5", 6, "unexpected '5'; NULL or NOT is expected"),
        ("a = b = c", 7, "unexpected '='"),
        ("a == 5", 4, "equal is written ="),
        ("a = 007", 6, "unexpected '0'"),
        ("a = 'x", 5, "a string without its closing quote"),
        ('a = "x"', 5, "strings stand in single quotes"),
        ("a != 5", 3, "not equal is written <>"),
        ("a = 1 && b = 2", 7, "write AND"),
        ("a = 1 || b = 2", 7, "write OR"),
        ("a * 2 > 5", 3, "there is no arithmetic"),
        ("a + 2 > 5", 3, "unexpected '+'"),
        ("a = 1 /* b", 7, "comment"),
        ("a = #", 5, "a character without a meaning: '#'"),
        ("a LIKE 'x%'", 3, "there is no LIKE: use CONTAINS, STARTSWITH or ENDSWITH"),
        ("a = NULL", 5, "write IS NULL or IS NOT NULL"),
        ("a > 'x'", 5, "> compares numbers"),
        ("'x' <= a", 1, "<= compares numbers"),
        ("a < TRUE", 5, "< compares numbers"),
        ("a BETWEEN 'x' AND 'y'", 11, "BETWEEN compares numbers"),
        ("a BETWEEN 7 AND 5", 11, "nothing lies between these"),
        ("a = 1 AND 5", 11, "a condition is expected here, not a number"),
        ("'x'", 1, "a condition is expected here, not a string"),
        ("5 = TRUE", 5, "a number is not compared with TRUE"),
        ("'x' IN ('x')", 1, "IN asks for a property, not for a string"),
        ("5 CONTAINS 'x'", 1, "CONTAINS asks for a property, not for a number"),
        ("a CONTAINS ''", 12, "the empty string is in every other"),
        ("a > 9223372036854775808", 5, "a whole number of more than 64 bits"),
        ("a > 1e400", 5, "beyond the largest double"),
        (" OR ".join(f"a{i} = 1" for i in range(FILTER_NAMES_MAX + 1)), 695, "more than 64 different properties"),
        ("a = (" * FILTER_STACK_MAX + "a" + ")" * FILTER_STACK_MAX, 6, "nested more than 64 deep"),
        ("x" * 256 + " = 1", 1, "more than 255 characters"),
        ("a = '" + "x" * 65536 + "'", 5, "a string of more than 65,535 bytes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_its_place(expression: str, column: int, why: str) -> None:
    with pytest.raises(shmbroker.BadRequest, match=re.escape(why)) as refused:
        shmbroker.sql(expression)
    head, shown, mark = str(refused.value).split("\n")
    assert f"line 1, column {column}:" in head
    under = shown[mark.index("^") :][:1]
    assert under == expression[column - 1 : column], "the mark stands below the place"
    assert len(shown) < 100


def test_the_line_of_an_error_is_shown() -> None:
    with pytest.raises(shmbroker.BadRequest) as refused:
        shmbroker.sql("amount > 100\n\tAND region == 'EU'\nAND x = 1")
    assert str(refused.value).split("\n") == [
        "SQL expression, line 2, column 14: equal is written =",
        "     AND region == 'EU'",
        "                 ^",
    ]


@pytest.mark.parametrize("expression", [None, 5, b"a = 1", ["a = 1"]])
def test_what_is_no_text_is_refused(expression: Any) -> None:
    with pytest.raises(shmbroker.BadRequest, match="must be a str"):
        shmbroker.sql(expression)


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_is_an_expression_or_refused(expression: str) -> None:
    with suppress(shmbroker.BadRequest):
        assert shmbroker.sql(shmbroker.sql(expression).text) == shmbroker.sql(expression)


# ---- programs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"\0",
        b"\1",
        b"\1\5abc",
        bytes([0, FILTER_INSTRUCTIONS["PROPERTY"], 2]),
        bytes([0, FILTER_INSTRUCTIONS["TEXT"], 9, 0, 65]),
        bytes([0, FILTER_INSTRUCTIONS["WHOLE"], 1]),
        bytes([0, FILTER_INSTRUCTIONS["TRUE"], FILTER_INSTRUCTIONS["AND"]]),
        bytes([0, FILTER_INSTRUCTIONS["NOT"]]),
        bytes([0] + [FILTER_INSTRUCTIONS["TRUE"]] * 2),
        bytes([0] + [FILTER_INSTRUCTIONS["TRUE"]] * (FILTER_STACK_MAX + 1)),
        bytes([0, 99]),
        bytes([FILTER_NAMES_MAX + 1]) + bytes(FILTER_NAMES_MAX + 1) + bytes([FILTER_INSTRUCTIONS["TRUE"]]),
    ],
)
def test_what_is_no_program_is_refused(program: bytes) -> None:
    with pytest.raises(ValueError, match="no program of a filter"):
        run_filter(program, b"", b"", {})
