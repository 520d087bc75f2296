"""SQL92 expressions of RocketMQ's grammar, compiled to the program that ``_native/filter.c`` runs on a record.

Needs lark, which takes a tenth of a second to load and to prepare: ``selector.py`` imports this module when the first
expression is used.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from math import isinf
from typing import Any, Final, Literal

from lark import Lark, Token, Transformer_NonRecursive, UnexpectedCharacters, UnexpectedToken, v_args
from lark.exceptions import VisitError

from shmbroker._native._core import FILTER_INSTRUCTIONS, FILTER_NAMES_MAX, FILTER_STACK_MAX
from shmbroker.errors import BadRequest

# NOT binds as in SQL, weaker than a comparison. A keyword is a NAME that lark finds among the strings.
GRAMMAR: Final = r"""
    ?start: disjunction
    ?disjunction: conjunction | disjunction _OR conjunction -> either
    ?conjunction: negation | conjunction _AND negation -> both
    ?negation: comparison | _NOT negation -> negated
    ?comparison: operand
        | operand "=" operand -> equal
        | operand NOT_EQUAL operand -> not_equal
        | operand MORE operand -> greater
        | operand AT_LEAST operand -> greater
        | operand LESS operand -> less
        | operand AT_MOST operand -> less
        | operand _BETWEEN operand _AND operand -> between
        | operand _NOT _BETWEEN operand _AND operand -> not_between
        | operand _IN "(" STRING ("," STRING)* ")" -> among
        | operand _NOT _IN "(" STRING ("," STRING)* ")" -> not_among
        | operand _IS _NULL -> is_null
        | operand _IS _NOT _NULL -> is_not_null
        | operand (CONTAINS | STARTSWITH | ENDSWITH) STRING -> search
        | operand _NOT (CONTAINS | STARTSWITH | ENDSWITH) STRING -> not_search
    ?operand: NAME -> property
        | STRING -> string
        | [SIGN] WHOLE -> whole
        | [SIGN] REAL -> real
        | TRUE -> true
        | FALSE -> false
        | "(" disjunction ")"

    _OR: "OR"i
    _AND: "AND"i
    _NOT: "NOT"i
    _BETWEEN: "BETWEEN"i
    _IN: "IN"i
    _IS: "IS"i
    _NULL: "NULL"i
    TRUE: "TRUE"i
    FALSE: "FALSE"i
    CONTAINS: "CONTAINS"i
    STARTSWITH: "STARTSWITH"i
    ENDSWITH: "ENDSWITH"i
    NOT_EQUAL: "<>"
    MORE: ">"
    AT_LEAST: ">="
    LESS: "<"
    AT_MOST: "<="
    SIGN: "+" | "-"
    NAME: /[a-z_$][a-z0-9_$]*/i
    STRING: /'(?:[^']|'')*'/
    REAL.2: /(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|[0-9]+e[+-]?[0-9]+/i
    WHOLE: /(?:0|[1-9][0-9]*)l?/i
    COMMENT.3: /--[^\r\n]*|\/\*(?:[^*]|\*(?!\/))*\*\//
    %ignore COMMENT
    %ignore /[ \t\n\r\f]+/
"""

# What people read for a terminal, in the order in which alternatives are listed.
_NAMES: Final = {
    "NAME": "a property", "WHOLE": "a number", "REAL": "a number", "SIGN": "a number", "STRING": "a string",
    "TRUE": "TRUE", "FALSE": "FALSE", "EQUAL": "=", "NOT_EQUAL": "<>", "MORE": ">", "AT_LEAST": ">=", "LESS": "<",
    "AT_MOST": "<=", "_BETWEEN": "BETWEEN", "_IN": "IN", "_IS": "IS", "CONTAINS": "CONTAINS",
    "STARTSWITH": "STARTSWITH", "ENDSWITH": "ENDSWITH", "_NULL": "NULL", "_NOT": "NOT", "_AND": "AND", "_OR": "OR",
    "COMMA": ",", "LPAR": "(", "RPAR": ")", "$END": "the end",
}  # fmt: skip
_HINTS: Final = {
    "'": "a string without its closing quote",
    '"': "strings stand in single quotes",
    "!": "not equal is written <>",
    "&": "write AND",
    "|": "write OR",
    "*": "there is no arithmetic",
    "/": "neither arithmetic nor the whole of a comment",
    "%": "there is no arithmetic",
}
_SHOWN_BEFORE, _SHOWN_AFTER = 60, 30  # characters of the expression that an error shows
_WHOLE_MIN, _WHOLE_MAX = -(2**63), 2**63 - 1
_SYSTEM: Final = {"TAGS": 0, "KEYS": 1}  # what RocketMQ calls them, and the program

Kind = Literal["property", "string", "number", "condition"]


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of an expression: what it is, the code that leaves its value on the stack, and the room it needs there."""

    kind: Kind
    code: bytes
    at: int  # where it begins in the expression
    depth: int = 1
    number: float | None = None


def compile_sql(expression: str) -> tuple[str, bytes]:
    """The expression in one line without comments, and its program. Raises BadRequest, which shows the place."""
    parser = _parser()
    try:
        tree = parser.parse(expression)
        text = _one_line(list(parser.lex(expression)))
    except UnexpectedCharacters as error:
        at: int = error.pos_in_stream  # type: ignore[assignment] # lark declares it as None alone
        why = _HINTS.get(expression[at], f"a character without a meaning: {expression[at]!r}")
        raise _refused(expression, at, why) from None
    except UnexpectedToken as error:
        raise _refused(expression, *_unexpected(error, expression)) from None
    compiler = _Compiler(expression)
    try:
        whole = compiler.condition(compiler.transform(tree))
    except VisitError as error:
        raise error.orig_exc from None
    names = b"".join(bytes([len(name)]) + name.encode() for name in compiler.names)
    return text, bytes([len(compiler.names)]) + names + whole.code


@cache
def _parser() -> Lark:
    return Lark(GRAMMAR, parser="lalr", lexer="basic")


def _one_line(tokens: list[Token]) -> str:
    text = ""
    for token in tokens:
        keyword = token.type not in ("NAME", "STRING") and token.isalpha()
        closed = text.endswith("(") or (len(text) > 1 and text[-1] in "+-") or token.type in ("RPAR", "COMMA")
        text += ("" if closed or not text else " ") + (token.upper() if keyword else token)
    return text


def _unexpected(error: UnexpectedToken, expression: str) -> tuple[int, str]:
    """Where, and what was expected there."""
    wanted = list(dict.fromkeys(name for key, name in _NAMES.items() if key in error.accepts))
    expected = " or ".join([", ".join(wanted[:-1]), wanted[-1]] if len(wanted) > 1 else wanted)
    token = error.token
    if token.type == "$END":
        return len(expression), f"it ends here, but {expected} is expected"
    if token.type == "EQUAL" and expression[: token.start_pos].endswith("="):
        return token.start_pos or 0, "equal is written ="
    if token.upper() == "LIKE":
        return token.start_pos or 0, "there is no LIKE: use CONTAINS, STARTSWITH or ENDSWITH"
    if token.type == "_NULL":
        return token.start_pos or 0, "nothing is compared with NULL: write IS NULL or IS NOT NULL"
    return token.start_pos or 0, f"unexpected {str(token)!r}; {expected} is expected"


def _refused(expression: str, at: int, why: str) -> BadRequest:
    before, after = expression[:at], expression[at:]
    line_number, column = before.count("\n") + 1, at - (before.rfind("\n") + 1)
    line = before[at - column :] + after.split("\n", 1)[0]
    start = max(0, column - _SHOWN_BEFORE)
    shown = "".join(letter if letter.isprintable() else " " for letter in line[start : column + _SHOWN_AFTER])
    mark = " " * (column - start) + "^"
    return BadRequest(f"SQL expression, line {line_number}, column {column + 1}: {why}\n    {shown}\n    {mark}")


_PROPERTY, _TEXT, _WHOLE, _REAL = (bytes([FILTER_INSTRUCTIONS[name]]) for name in ("PROPERTY", "TEXT", "WHOLE", "REAL"))
_TRUE, _NOT, _IS_NULL = (bytes([FILTER_INSTRUCTIONS[name]]) for name in ("TRUE", "NOT", "IS_NULL"))
_SEARCHES: Final = {"CONTAINS": "CONTAINS", "STARTSWITH": "STARTS", "ENDSWITH": "ENDS"}


@v_args(inline=True)
class _Compiler(Transformer_NonRecursive[Token, Any]):
    """One method for each alternative of the grammar, called from the leaves to the root."""

    def __init__(self, expression: str) -> None:
        super().__init__()
        self.expression = expression
        self.names: list[str] = []

    # ---- operands

    def property(self, name: Token) -> _Part:
        if name in _SYSTEM:
            return _Part("property", _PROPERTY + bytes([_SYSTEM[name]]), _at(name))
        if name not in self.names:
            if len(self.names) == FILTER_NAMES_MAX:
                raise self._refused(_at(name), f"more than {FILTER_NAMES_MAX} different properties")
            if len(name) > 0xFF:
                raise self._refused(_at(name), "a name of more than 255 characters")
            self.names.append(str(name))
        return _Part("property", _PROPERTY + bytes([2 + self.names.index(name)]), _at(name))

    def string(self, token: Token) -> _Part:
        content = token[1:-1].replace("''", "'").encode()
        if len(content) > 0xFFFF:
            raise self._refused(_at(token), "a string of more than 65,535 bytes")
        return _Part("string", _TEXT + struct.pack("<H", len(content)) + content, _at(token))

    def whole(self, sign: Token | None, digits: Token) -> _Part:
        value = int((sign or "") + digits.rstrip("lL"))
        if not _WHOLE_MIN <= value <= _WHOLE_MAX:
            raise self._refused(_at(digits), "a whole number of more than 64 bits; with a decimal point it would do")
        return _Part("number", _WHOLE + struct.pack("<q", value), _at(sign or digits), number=value)

    def real(self, sign: Token | None, digits: Token) -> _Part:
        value = float((sign or "") + digits)
        if isinf(value):
            raise self._refused(_at(digits), "a number beyond the largest double, 1.8e308")
        return _Part("number", _REAL + struct.pack("<d", value), _at(sign or digits), number=value)

    def true(self, token: Token) -> _Part:
        return _Part("condition", _TRUE, _at(token))

    def false(self, token: Token) -> _Part:
        return _Part("condition", _TRUE + _NOT, _at(token))

    # ---- comparisons

    def equal(self, left: _Part, right: _Part) -> _Part:
        if {left.kind, right.kind} == {"number", "condition"}:
            raise self._refused(right.at, "a number is not compared with TRUE, FALSE or a condition")
        return self._joined("EQUAL", left, right)

    def not_equal(self, left: _Part, _operator: Token, right: _Part) -> _Part:
        return self.negated(self.equal(left, right))

    def less(self, left: _Part, operator: Token, right: _Part) -> _Part:
        self._need_numbers(operator, left, right)
        return self._joined("LESS" if operator == "<" else "AT_MOST", left, right)

    def greater(self, left: _Part, operator: Token, right: _Part) -> _Part:
        self._need_numbers(operator, left, right)
        return self._joined("LESS" if operator == ">" else "AT_MOST", right, left)

    def between(self, part: _Part, low: _Part, high: _Part) -> _Part:
        self._need_numbers("BETWEEN", part, low, high)
        if low.number is not None and high.number is not None and low.number > high.number:
            raise self._refused(low.at, "BETWEEN wants the smaller number first: nothing lies between these")
        return self._joined("AND", self._joined("AT_MOST", low, part), self._joined("AT_MOST", part, high))

    def not_between(self, part: _Part, low: _Part, high: _Part) -> _Part:
        return self.negated(self.between(part, low, high))

    def among(self, part: _Part, *strings: Token) -> _Part:
        self._need_property(part, "IN")
        found = self._joined("EQUAL", part, self.string(strings[0]))
        for other in strings[1:]:
            found = self._joined("OR", found, self._joined("EQUAL", part, self.string(other)))
        return found

    def not_among(self, part: _Part, *strings: Token) -> _Part:
        return self.negated(self.among(part, *strings))

    def is_null(self, part: _Part) -> _Part:
        return _Part("condition", part.code + _IS_NULL, part.at, part.depth)

    def is_not_null(self, part: _Part) -> _Part:
        return self.negated(self.is_null(part))

    def search(self, part: _Part, operator: Token, wanted: Token) -> _Part:
        self._need_property(part, operator.upper())
        if len(wanted) == len("''"):
            raise self._refused(_at(wanted), "the empty string is in every other")
        return self._joined(_SEARCHES[operator.upper()], part, self.string(wanted))

    def not_search(self, part: _Part, operator: Token, wanted: Token) -> _Part:
        return self.negated(self.search(part, operator, wanted))

    # ---- conditions

    def both(self, left: _Part, right: _Part) -> _Part:
        return self._joined("AND", self.condition(left), self.condition(right))

    def either(self, left: _Part, right: _Part) -> _Part:
        return self._joined("OR", self.condition(left), self.condition(right))

    def negated(self, part: _Part) -> _Part:
        return _Part("condition", self.condition(part).code + _NOT, part.at, part.depth)

    def condition(self, part: _Part) -> _Part:
        """A property stands for its truth: "true", in whatever case, or anything else."""
        if part.kind in ("string", "number"):
            raise self._refused(part.at, f"a condition is expected here, not a {part.kind}")
        return part

    # ---- inside

    def _joined(self, instruction: str, left: _Part, right: _Part) -> _Part:
        depth = max(left.depth, right.depth + 1)
        if depth > FILTER_STACK_MAX:
            raise self._refused(right.at, f"nested more than {FILTER_STACK_MAX} deep")
        code = left.code + right.code + bytes([FILTER_INSTRUCTIONS[instruction]])
        return _Part("condition", code, min(left.at, right.at), depth)

    def _need_numbers(self, operator: str, *parts: _Part) -> None:
        for part in parts:
            if part.kind not in ("number", "property"):
                raise self._refused(part.at, f"{operator} compares numbers, and properties that hold one, nothing else")

    def _need_property(self, part: _Part, operator: str) -> None:
        if part.kind != "property":
            raise self._refused(part.at, f"{operator} asks for a property, not for a {part.kind}")

    def _refused(self, at: int, why: str) -> BadRequest:
        return _refused(self.expression, at, why)


def _at(token: Token) -> int:
    return token.start_pos or 0
