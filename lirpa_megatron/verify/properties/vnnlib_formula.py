"""Formulas of VNN-LIB as disjunctions of (a box of inputs, rows of outputs).

Comparisons are exact: numbers are rationals. A negation is driven inwards to the comparisons, where
it turns `<=` into `>`. Disjuncts whose box is empty are dropped as soon as they arise, so that
disjunctions over inputs (boxes with holes) do not multiply.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache

from lirpa_megatron.verify.properties.property import Interval, OutputRow
from lirpa_megatron.verify.properties.vnnlib_syntax import (
    Expression,
    Variable,
    VnnlibError,
    is_representable,
    number,
    shown,
    variable,
)

_MAX_DISJUNCTS = 200_000
_MAX_LITERALS = 5_000_000
_MAX_TRIED = 5_000_000
MAX_TERMS = 100_000

# input index -> the values it may have, for the inputs that are constrained
Box = dict[int, Interval]
# One disjunct: its box, and the positions of its rows.
Conjunct = tuple[Box, tuple[int, ...]]
# A formula in disjunctive normal form: any of these; none: never.
Dnf = list[Conjunct]
ALWAYS: Conjunct = ({}, ())

ZERO, ONE = Fraction(0), Fraction(1)
# coefficients of the variables, and the constant
Linear = tuple[dict[Variable, Fraction], Fraction]
_NEGATED = {"<=": ">", ">=": "<", "<": ">=", ">": "<="}
_COMPARISONS = (*_NEGATED, "=", "distinct")
_KNOWN = "and, or, not, =>, <=, >=, <, >, = or distinct"
_REFUSED = {
    "let": "let (names for parts of a formula) is not supported: write the parts out",
    "ite": "ite (if-then-else) is not supported: write it as a disjunction",
    "forall": "quantifiers are not supported",
    "exists": "quantifiers are not supported",
    "xor": "xor is not supported: write it with and, or and not",
}


class Formulas:
    """Reads the formulas of one file.

    Attributes:
        rows: every constraint on outputs so far, in file order, and on several inputs; coefficient
            -1 - i is input i's.
    """

    def __init__(self, declared: dict[Variable, int]):
        """declared: the variables, with the line of each; may grow between formulas."""
        self.rows: list[OutputRow] = []
        self._declared = declared
        # what was read before: large files repeat a few numbers and variables
        self._terms: dict[str, Linear] = {}

    def read(self, expression: Expression, negated: bool = False) -> Dnf:
        """Disjunctive normal form of a formula, or of its negation.

        Raises:
            VnnlibError: what is not supported or not well-formed, with its line.
        """
        value, line = expression
        if value in ("true", "false"):
            return [ALWAYS] if (value == "true") != negated else []
        operator = value[0][0] if isinstance(value, list) and value else value
        operands = value[1:] if isinstance(value, list) else []
        name = operator if isinstance(operator, str) else None
        if name in ("and", "or", "=>"):
            if not operands:
                raise VnnlibError(line, f"({name}) has no operands")
            signs = [negated] * len(operands)
            if name == "=>":  # all but the last one fail, or the last one holds
                signs = [not negated] * (len(operands) - 1) + [negated]
            parts = [self.read(o, sign) for o, sign in zip(operands, signs, strict=True)]
            if (name == "and") == negated:
                return [conjunct for part in parts for conjunct in part]
            return conjunction(parts, line)
        if name in ("not", "!"):  # (! formula :named x) is the formula
            if not operands or (name == "not" and len(operands) != 1):
                raise VnnlibError(line, f"{name} takes one formula, found {len(operands)}")
            return self.read(operands[0], negated != (name == "not"))
        if name in _COMPARISONS and isinstance(value, list):
            return self._chain(name, operands, line, negated)
        if name in _REFUSED:
            raise VnnlibError(line, _REFUSED[name])
        raise VnnlibError(line, f"expected {_KNOWN}, found {shown(operator)}")

    def _chain(self, operator: str, operands: list[Expression], line: int, negated: bool) -> Dnf:
        """(<= a b c) is a <= b and b <= c; all pairs of `distinct` differ."""
        if len(operands) < 2:
            raise VnnlibError(line, f"{operator} takes two operands, found {len(operands)}")
        if operator == "distinct" and len(operands) > 2:
            raise VnnlibError(line, "distinct takes two operands here: write pairs")
        sides = [self._linear(operand) for operand in operands]
        links = [
            self.comparison(operator, left, right, line, negated)
            for left, right in zip(sides, sides[1:], strict=False)
        ]
        if negated:  # one of them fails
            return [conjunct for link in links for conjunct in link]
        return conjunction(links, line)

    def comparison(
        self, operator: str, left: Linear, right: Linear, line: int, negated: bool = False
    ) -> Dnf:
        """left `operator` right, or its negation."""
        if operator in ("=", "distinct"):
            if (operator == "=") == negated:
                return [
                    *self.comparison("<", left, right, line, False),
                    *self.comparison(">", left, right, line, False),
                ]
            return conjunction(
                [self.comparison(o, left, right, line, False) for o in ("<=", ">=")], line
            )
        if negated:
            operator = _NEGATED[operator]
        is_upper, strict = operator in ("<=", "<"), operator in ("<", ">")
        if len(left[0]) == 1 and left[1] is ZERO and not right[0]:  # nearly always
            terms, bound = left[0], right[1]
        else:
            terms, constant = linear_sum([left, right], [1, -1], line)
            bound = -constant
        # terms <= bound, or >= bound
        if not terms:
            holds = bound > 0 if is_upper else bound < 0
            return [ALWAYS] if holds or (bound == 0 and not strict) else []
        if len(terms) > 1 or next(iter(terms))[0] == "Y":
            own = {
                j if kind == "Y" else -1 - j: c if is_upper else -c
                for (kind, j), c in terms.items()
            }
            self.rows.append(OutputRow(own, bound if is_upper else -bound, line, strict))
            return [({}, (len(self.rows) - 1,))]
        (((_, index), coefficient),) = terms.items()
        limit = bound if coefficient == 1 else _checked(bound / coefficient, line)
        return [({index: _half_line(limit, is_upper == (coefficient > 0), strict)}, ())]

    def _linear(self, expression: Expression) -> Linear:
        """A linear expression as coefficients and constant."""
        value, line = expression
        if isinstance(value, str):
            return self._term(value, line)
        operator = value[0][0] if value else "()"
        name = operator if isinstance(operator, str) else None
        if name in _REFUSED:
            raise VnnlibError(line, _REFUSED[name])
        if name not in ("+", "-", "*", "/"):
            raise VnnlibError(line, f"expected +, -, * or / in an expression, found "
                                    f"{shown(operator)}")
        parts = [self._linear(operand) for operand in value[1:]]
        if not parts:
            raise VnnlibError(line, f"({operator}) has no operands")
        if name in ("*", "/"):
            return linear_product(parts, line) if name == "*" else _quotient(parts, line)
        if name == "-" and len(parts) == 1:
            return linear_sum(parts, [-1], line)
        return linear_sum(parts, [1] + [1 if name == "+" else -1] * (len(parts) - 1), line)

    def _term(self, word: str, line: int) -> Linear:
        term = self._terms.get(word)
        if term is None:
            term = self._read_term(word, line)
            if len(self._terms) < MAX_TERMS:
                self._terms[word] = term
        return term

    def _read_term(self, word: str, line: int) -> Linear:
        value = number(word, line)
        if value is not None:
            return {}, value
        found = variable(word)
        if found is None:
            raise VnnlibError(line, f"expected a number or a variable, found {shown(word)}")
        if found not in self._declared:
            raise VnnlibError(line, f"{word} is not declared")
        return {found: ONE}, ZERO


@lru_cache(maxsize=100_000)  # large files repeat a few numbers: memory
def _half_line(limit: Fraction, is_upper: bool, strict: bool) -> Interval:
    if is_upper:
        return Interval(upper=limit, upper_open=strict)
    return Interval(lower=limit, lower_open=strict)


def conjunction(parts: Sequence[Dnf], line: int, within: Box | None = None) -> Dnf:
    """All of some formulas: each choice of one disjunct of each of them, empty boxes dropped.

    Args:
        parts: the formulas.
        line: for errors.
        within: constraints that hold anyway; they are not part of the result.

    Raises:
        VnnlibError: too many disjuncts.
    """
    made = _single([part[0] for part in parts if len(part) == 1], within or {})
    tried = 0
    for part in parts:
        if len(part) == 1:
            continue
        before, made = made, []
        tried += len(before) * len(part)
        if tried > _MAX_TRIED:
            raise VnnlibError(
                line, f"the conjunction has too many combinations: more than {_MAX_TRIED:,}"
            )
        literals = 0
        for box, rows in before:
            for other, more in part:
                both = _meet(box, other, within or {})
                if both is None:
                    continue
                made.append((both, rows + more))
                literals += len(both) + len(rows) + len(more)
                if len(made) > _MAX_DISJUNCTS or literals > _MAX_LITERALS:
                    raise VnnlibError(
                        line, f"the conjunction expands to too many disjuncts: more than "
                        f"{_MAX_DISJUNCTS:,}, or {_MAX_LITERALS:,} constraints in all"
                    )
    return made


def _single(parts: Sequence[Conjunct], within: Box) -> Dnf:
    """The conjunction of conjuncts: one, or none."""
    box: Box = {}
    rows: list[int] = []
    for other, more in parts:
        rows += more
        for index, interval in other.items():
            if index in box:
                interval = interval.meet(box[index])
                if interval.is_empty():
                    return []
            box[index] = interval
    if any(interval.meet(box[index]).is_empty() for index, interval in within.items()
           if index in box):
        return []
    return [(box, tuple(rows))]


def _meet(first: Box, second: Box, within: Box) -> Box | None:
    """The values in both boxes; None if there are none."""
    if not second:
        return first
    both = dict(first)
    for index, interval in second.items():
        if index in both:
            interval = both[index].meet(interval)
        around = within.get(index)
        if (interval if around is None else interval.meet(around)).is_empty():
            return None
        both[index] = interval
    return both


def linear_sum(parts: Iterable[Linear], factors: Iterable[int], line: int) -> Linear:
    coefficients: dict[Variable, Fraction] = {}
    constant = Fraction(0)
    for (terms, own), factor in zip(parts, factors, strict=True):
        for name, coefficient in terms.items():
            coefficients[name] = coefficients.get(name, 0) + factor * coefficient
        constant += factor * own
    return (
        {name: _checked(c, line) for name, c in coefficients.items() if c},
        _checked(constant, line),
    )


def linear_product(parts: Sequence[Linear], line: int) -> Linear:
    with_variables = [part for part in parts if part[0]]
    if len(with_variables) > 1:
        raise VnnlibError(line, "a product of variables is not linear")
    terms, constant = with_variables[0] if with_variables else ({}, Fraction(1))
    for others, factor in parts:
        if not others:
            constant = _checked(constant * factor, line)
            terms = {name: _checked(c * factor, line) for name, c in terms.items() if factor}
    return terms, constant


def _quotient(parts: Sequence[Linear], line: int) -> Linear:
    if len(parts) < 2:
        raise VnnlibError(line, "/ takes two operands, found 1")
    for terms, constant in parts[1:]:
        if terms:
            raise VnnlibError(line, "a division by a variable is not linear")
        if constant == 0:
            raise VnnlibError(line, "a division by zero")
    return linear_product([parts[0], *(({}, 1 / constant) for _, constant in parts[1:])], line)


def _checked(value: Fraction, line: int) -> Fraction:
    if not is_representable(value):
        raise VnnlibError(line, "a number that follows from this line is too large")
    return value
