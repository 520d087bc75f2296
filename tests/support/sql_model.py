"""SQL92 filters once more, slowly: expressions as trees, and what they say of a message's properties.

A tree is a tuple: an operator and its operands. ``None`` is NULL, which is what text is that cannot be read as wanted.
"""

from __future__ import annotations

import re
from typing import Any, Final

from hypothesis import strategies as st

Tree = tuple[Any, ...]

NUMBER: Final = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
NUMBER_LENGTH_MAX: Final = 64


def evaluate(tree: Tree, message: dict[str, str]) -> Any:
    """The value of ``tree``. ``message``: the properties, with TAGS and KEYS among them unless they are empty."""
    operator, *operands = tree
    if operator == "property":
        return message.get(operands[0])
    if operator in ("string", "number", "truth"):
        return operands[0]
    if operator in ("IN", "CONTAINS", "STARTSWITH", "ENDSWITH"):
        return _of_text(operator, evaluate(operands[0], message), operands[1])
    values = [evaluate(operand, message) for operand in operands]
    if operator == "NOT":
        return None if _truth(values[0]) is None else not _truth(values[0])
    if operator == "IS NULL":
        return values[0] is None
    if operator in ("AND", "OR"):
        return _joined(operator, _truth(values[0]), _truth(values[1]))
    if operator == "BETWEEN":
        return _joined("AND", _ordered("<=", values[1], values[0]), _ordered("<=", values[0], values[2]))
    return _equal(*values) if operator == "=" else _ordered(operator, *values)


def accepts(tree: Tree, message: dict[str, str]) -> bool:
    """Whether a message passes: neither FALSE nor NULL do."""
    return _truth(evaluate(tree, message)) is True


def _of_text(operator: str, text: str | None, wanted: Any) -> bool | None:
    if text is None:
        return None
    if operator == "IN":
        return text in wanted
    if operator == "CONTAINS":
        return wanted in text
    return text.startswith(wanted) if operator == "STARTSWITH" else text.endswith(wanted)


def _truth(value: Any) -> bool | None:
    if isinstance(value, str):
        return value.encode().lower() == b"true"  # ASCII only
    return value if isinstance(value, bool) else None


def _number(value: Any) -> int | float | None:
    if isinstance(value, str):
        if len(value.encode()) > NUMBER_LENGTH_MAX or not NUMBER.fullmatch(value):
            return None
        if re.fullmatch(r"[+-]?\d+", value, re.ASCII) and -(2**63) <= int(value) < 2**63:
            return int(value)
        return float(value)
    return None if isinstance(value, bool) else value


def _equal(left: Any, right: Any) -> bool | None:
    if left is None or right is None:
        return None
    if isinstance(left, str) and isinstance(right, str):
        return left == right
    if isinstance(left, bool) or isinstance(right, bool):
        return _truth(left) == _truth(right)
    return _ordered("=", left, right)


def _ordered(operator: str, left: Any, right: Any) -> bool | None:
    left, right = _number(left), _number(right)
    if left is None or right is None:
        return None
    if isinstance(left, float) or isinstance(right, float):
        left, right = float(left), float(right)
    return bool(
        {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right, "=": left == right}[operator]
    )


def _joined(operator: str, left: bool | None, right: bool | None) -> bool | None:
    decisive = operator == "OR"
    if left is decisive or right is decisive:
        return decisive
    return None if left is None or right is None else not decisive


# ---- trees, and how they are written ---------------------------------------------------------------------------------

PROPERTIES: Final = ("a", "b", "amount", "order_", "$x", "TAGS", "KEYS")
TEXTS: Final = st.sampled_from(
    ["", "a", "ab", "bab", "it's", "true", "TRUE", "blå", "1", "1.0", "-0", "+7", "007", "1e2", "100", ".5", "5.",
     "1e400",
     "9223372036854775807", "9223372036854775808", "-9223372036854775808", "9007199254740993", "0x10", "1_0", " 1",
     "nan", "inf", "1e", "e1", ".", "-", "1l", "9" * 64, "9" * 65, "1,5", "EU", "%", "--", "/*"]
)  # fmt: skip
MESSAGES: Final = st.dictionaries(st.sampled_from(PROPERTIES), st.one_of(TEXTS, st.text("ab1.-'", max_size=4)))

_property = st.tuples(st.just("property"), st.sampled_from(PROPERTIES))
_whole = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, 7, 100, 2**53 + 1]))
_real = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([0.5, 1.0, 100.0, 2.0**63]))
_number_tree = st.tuples(st.just("number"), st.one_of(_whole, _real))
_numeric = st.one_of(_property, _number_tree)
_string = st.tuples(st.just("string"), TEXTS)
_truth_tree = st.tuples(st.just("truth"), st.booleans())
_comparison = st.one_of(
    st.tuples(st.just("="), _property, st.one_of(_property, _number_tree, _string, _truth_tree)),
    st.tuples(st.just("="), st.one_of(_number_tree, _string, _truth_tree), _property),
    st.tuples(st.sampled_from(["<", "<=", ">", ">="]), _numeric, _numeric),
    st.tuples(st.just("IS NULL"), _property),
    st.tuples(st.just("BETWEEN"), _numeric, _property, _numeric),
    st.tuples(st.just("BETWEEN"), _property, _numeric, _property),
    st.tuples(st.just("IN"), _property, st.lists(TEXTS, min_size=1, max_size=4)),
    st.tuples(st.sampled_from(["CONTAINS", "STARTSWITH", "ENDSWITH"]), _property, TEXTS.filter(bool)),
    _property,
    _truth_tree,
)
TREES: Final = st.recursive(
    _comparison,
    lambda inner: st.one_of(
        st.tuples(st.just("NOT"), inner),
        st.tuples(st.sampled_from(["AND", "OR"]), inner, inner),
        st.tuples(st.just("="), inner.filter(lambda tree: tree[0] != "property"), _truth_tree),
        st.tuples(st.just("IS NULL"), inner),
    ),
    max_leaves=12,
)

_NOT_IN_FRONT: Final = {"IS NULL": "IS NOT NULL", "BETWEEN": "NOT BETWEEN", "IN": "NOT IN", "CONTAINS": "NOT CONTAINS",
                        "STARTSWITH": "NOT STARTSWITH", "ENDSWITH": "NOT ENDSWITH", "=": "<>"}  # fmt: skip


def written(tree: Tree, word: str | None = None) -> str:
    """``tree`` as an expression. word: another spelling of its operator, which makes its negation of it."""
    operator, *operands = tree
    if operator in ("property", "number"):
        return repr(operands[0]) if operator == "number" else operands[0]
    if operator == "string":
        return quoted(operands[0])
    if operator == "truth":
        return str(operands[0]).upper()
    if operator == "NOT" and operands[0][0] in _NOT_IN_FRONT:
        return written(operands[0], _NOT_IN_FRONT[operands[0][0]])
    if operator == "NOT":
        return f"NOT ({written(operands[0])})"
    word = word or operator
    first = written(operands[0])
    first = first if operands[0][0] in ("property", "string", "number", "truth") else f"({first})"
    if operator == "IS NULL":
        return f"{first} {word}"
    if operator == "BETWEEN":
        return f"{first} {word} {written(operands[1])} AND {written(operands[2])}"
    if operator == "IN":
        return f"{first} {word} ({', '.join(map(quoted, operands[1]))})"
    if operator in ("CONTAINS", "STARTSWITH", "ENDSWITH"):
        return f"{first} {word} {quoted(operands[1])}"
    second = written(operands[1])
    second = second if operands[1][0] in ("property", "string", "number", "truth") else f"({second})"
    return f"{first} {word} {second}"


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
