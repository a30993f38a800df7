"""VNN-LIB 1.0 properties.

The subset of SMT-LIB that VNN-LIB 1.0 defines: `declare-const` of real X_i and Y_j, and `assert`
of `and`/`or` trees over `<=`, `>=` and `=` of linear expressions. Inputs may be constrained one
variable at a time only (boxes), but different boxes may stand in different disjuncts.

A parser of our own, because no kept library serves: the PyPI package `vnnlib` reads VNN-LIB 2.0
from 1.0 on; its last release for 1.0 (0.0.1.post1, 2024) reports neither lines nor nested
disjunctions (an AssertionError), and drops constraints without variables.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.files import read_file, stem
from lirpa_megatron.verify.property import OutputRow, Property, Region

_TOKEN = re.compile(
    r"(?P<skip>[ \t\r]+|;[^\n]*)|(?P<newline>\n)|(?P<paren>[()])|(?P<word>[^\s();]+)"
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_VARIABLE = re.compile(r"([XY])_(0|[1-9]\d*)")
# Commands of SMT-LIB that say nothing about the property.
_IGNORED = {"set-logic", "set-info", "set-option", "check-sat", "get-model", "exit"}
_MAX_DEPTH = 200
_MAX_LITERALS = 1_000_000

# A parsed expression: a word or a list of expressions, with the line where it begins.
Expression = tuple["str | list[Expression]", int]
# ("X" or "Y", index)
Variable = tuple[str, int]
_serial_numbers = itertools.count()


class _SyntaxError(Exception):
    """A problem at a line of the file; becomes a UserError with the file's name."""

    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class _Atom:
    """The constraint `sum(coefficients * variables) + constant <= 0`."""

    coefficients: dict[Variable, float]
    constant: float
    line: int
    # increases in file order, which expanding into disjuncts does not keep
    serial: int = field(default_factory=_serial_numbers.__next__)

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.coefficients}


# A formula in disjunctive normal form: any of (all of atoms).
_Dnf = list[tuple[_Atom, ...]]


def read_vnnlib(
    path: str | Path, n_in: int | None = None, n_out: int | None = None, network: str = "network"
) -> Property:
    """Reads a property and checks it against the network's sizes.

    Args:
        path: PROP.vnnlib or PROP.vnnlib.gz.
        n_in, n_out: numbers of inputs and outputs of the network; None: not checked.
        network: the network's name, for errors.

    Raises:
        UserError: unreadable file, syntax error (with its line), unbounded input, empty box,
            or numbers of variables other than the network's.
    """
    data = read_file(path, "property")
    try:
        prop = parse_vnnlib(data.decode("utf-8"), stem(path))
    except UnicodeDecodeError:
        raise UserError(f"property {path} is not a text file") from None
    except _SyntaxError as error:
        raise UserError(f"property {path}, line {error.line}: {error}") from None
    except UserError as error:
        raise UserError(f"property {path}: {error}") from None
    for kind, found, expected in (("input", prop.n_in, n_in), ("output", prop.n_out, n_out)):
        if expected is not None and found != expected:
            raise UserError(
                f"property {path} declares {found} {kind} variables, "
                f"but {network} has {expected} {kind}s"
            )
    return prop


def parse_vnnlib(text: str, name: str) -> Property:
    """Parses the text of a property; see `read_vnnlib`."""
    declared: dict[Variable, int] = {}
    assertions: list[_Dnf] = []
    for command, line in _read_expressions(text):
        words = command if isinstance(command, list) else []
        head = words[0][0] if words else command
        if head in ("declare-const", "declare-fun"):
            _declare(words, line, declared)
        elif head == "assert":
            if len(words) != 2:
                raise _SyntaxError(line, f"assert takes one formula, found {len(words) - 1}")
            assertions.append(_formula(words[1], declared))
        elif head not in _IGNORED:
            shown = head if isinstance(head, str) and head else "()"
            raise _SyntaxError(line, f"unknown command {shown!r}")
    n_in, n_out = (_count(declared, kind) for kind in "XY")
    return _to_property(name, n_in, n_out, assertions)


def _read_expressions(text: str) -> Iterator[Expression]:
    """The top-level expressions of the file, read without recursion."""
    line = 1
    stack: list[tuple[list[Expression], int]] = []
    for token in _TOKEN.finditer(text):
        kind, value = token.lastgroup, token.group()
        if kind == "newline":
            line += 1
        elif value == "(":
            stack.append(([], line))
            if len(stack) > _MAX_DEPTH:
                raise _SyntaxError(line, f"nested deeper than {_MAX_DEPTH} parentheses")
        elif value == ")":
            if not stack:
                raise _SyntaxError(line, "')' without its '('")
            done = stack.pop()
            if stack:
                stack[-1][0].append(done)
            else:
                yield done
        elif kind == "word":
            if not stack:
                raise _SyntaxError(line, f"expected '(', found {value!r}")
            stack[-1][0].append((value, line))
    if stack:
        raise _SyntaxError(stack[-1][1], "'(' is never closed (is the file truncated?)")


def _declare(words: list[Expression], line: int, declared: dict[Variable, int]) -> None:
    """`(declare-const X_0 Real)` or `(declare-fun X_0 () Real)`."""
    values = [value for value, _ in words[1:]]
    if words[0][0] == "declare-fun" and len(values) == 3 and values[1] == []:
        del values[1]
    if len(values) != 2 or not isinstance(values[0], str):
        raise _SyntaxError(line, "expected (declare-const NAME Real)")
    variable = _variable(values[0])
    if variable is None:
        raise _SyntaxError(line, f"variable {values[0]!r} is neither X_i nor Y_i")
    if values[1] != "Real":
        raise _SyntaxError(line, f"{values[0]} has type {values[1]!r}, only Real is supported")
    if variable in declared:
        first = declared[variable]
        raise _SyntaxError(line, f"{values[0]} is declared twice (first in line {first})")
    declared[variable] = line


def _variable(word: str) -> Variable | None:
    match = _VARIABLE.fullmatch(word)
    return (match[1], int(match[2])) if match else None


def _formula(expression: Expression, declared: dict[Variable, int]) -> _Dnf:
    """Disjunctive normal form of an and/or tree of comparisons."""
    value, line = expression
    operator = value[0][0] if isinstance(value, list) and value else value
    operands = value[1:] if isinstance(value, list) else []
    if operator in ("and", "or"):
        if not operands:
            raise _SyntaxError(line, f"({operator}) has no operands")
        parts = [_formula(operand, declared) for operand in operands]
        return list(itertools.chain(*parts)) if operator == "or" else _conjunction(parts, line)
    if operator in ("<=", ">=", "="):
        if len(operands) != 2:
            raise _SyntaxError(line, f"{operator} takes two operands, found {len(operands)}")
        left, right = (_linear(operand, declared) for operand in operands)
        return [_comparison(operator, left, right, line)]
    shown = operator if isinstance(operator, str) else "()"
    raise _SyntaxError(line, f"expected and, or, <=, >= or =, found {shown!r}")


def _conjunction(parts: list[_Dnf], line: int) -> _Dnf:
    count = math.prod(len(part) for part in parts)
    literals = sum(count // max(len(p), 1) * sum(len(conjunct) for conjunct in p) for p in parts)
    if max(count, literals) > _MAX_LITERALS:
        raise _SyntaxError(line, f"the conjunction expands to {count} disjuncts, too many")
    return [tuple(itertools.chain(*choice)) for choice in itertools.product(*parts)]


# coefficients of the variables, and the constant
_Linear = tuple[dict[Variable, float], float]


def _comparison(operator: str, left: _Linear, right: _Linear, line: int) -> tuple[_Atom, ...]:
    below = _Atom(*_sum([left, right], [1.0, -1.0]), line)
    above = _Atom(*_sum([left, right], [-1.0, 1.0]), line)
    atoms = {"<=": (below,), ">=": (above,), "=": (below, above)}[operator]
    if {"X", "Y"} <= below.kinds:
        raise _SyntaxError(line, "a constraint that relates inputs to outputs is not supported")
    if "X" in below.kinds and len(below.coefficients) > 1:
        raise _SyntaxError(line, "a constraint on several inputs is not supported, only boxes are")
    return atoms


def _linear(expression: Expression, declared: dict[Variable, int]) -> _Linear:
    """A linear expression as coefficients and constant."""
    value, line = expression
    if isinstance(value, str):
        return _term(value, line, declared)
    operator = value[0][0] if value else "()"
    parts = [_linear(operand, declared) for operand in value[1:]]
    if operator not in ("+", "-", "*"):
        shown = operator if isinstance(operator, str) else "("
        raise _SyntaxError(line, f"expected +, - or * in an expression, found {shown!r}")
    if not parts:
        raise _SyntaxError(line, f"({operator}) has no operands")
    if operator == "*":
        return _product(parts, line)
    if operator == "+":
        return _sum(parts, [1.0] * len(parts))
    if len(parts) == 1:
        return _sum(parts, [-1.0])
    return _sum(parts, [1.0] + [-1.0] * (len(parts) - 1))


def _term(word: str, line: int, declared: dict[Variable, int]) -> _Linear:
    if _NUMBER.fullmatch(word):
        number = float(word)
        if not math.isfinite(number):
            raise _SyntaxError(line, f"number {word} is too large")
        return {}, number
    variable = _variable(word)
    if variable is None:
        raise _SyntaxError(line, f"expected a number or a variable, found {word!r}")
    if variable not in declared:
        raise _SyntaxError(line, f"{word} is not declared")
    return {variable: 1.0}, 0.0


def _sum(parts: list[_Linear], factors: list[float]) -> _Linear:
    coefficients: dict[Variable, float] = {}
    for (terms, _), factor in zip(parts, factors, strict=True):
        for variable, coefficient in terms.items():
            coefficients[variable] = coefficients.get(variable, 0.0) + factor * coefficient
    constant = sum(factor * part[1] for part, factor in zip(parts, factors, strict=True))
    return {variable: c for variable, c in coefficients.items() if c != 0.0}, constant


def _product(parts: list[_Linear], line: int) -> _Linear:
    with_variables = [part for part in parts if part[0]]
    if len(with_variables) > 1:
        raise _SyntaxError(line, "a product of variables is not linear")
    factor = math.prod(constant for terms, constant in parts if not terms)
    terms, constant = with_variables[0] if with_variables else ({}, 1.0)
    return {variable: c * factor for variable, c in terms.items() if c * factor}, constant * factor


def _count(declared: dict[Variable, int], kind: str) -> int:
    """Number of variables of a kind, which must be numbered 0 ... n-1."""
    indices = {index: line for (k, index), line in declared.items() if k == kind}
    for index in range(len(indices)):
        if index not in indices:
            raise UserError(f"{kind}_{index} is not declared, but {kind}_{max(indices)} is")
    if not indices:
        raise UserError(f"no variable {kind}_0 is declared")
    return len(indices)


def _to_property(name: str, n_in: int, n_out: int, assertions: list[_Dnf]) -> Property:
    """Groups the disjuncts of the whole file by their input box."""
    atoms = {atom.serial: atom for atom in itertools.chain(*itertools.chain(*assertions))}
    output_atoms = [atoms[serial] for serial in sorted(atoms) if "Y" in atoms[serial].kinds]
    if not output_atoms:
        raise UserError("it constrains no output")
    position = {atom.serial: index for index, atom in enumerate(output_atoms)}
    rows = tuple(
        OutputRow({j: c for (_, j), c in atom.coefficients.items()}, -atom.constant, atom.line)
        for atom in output_atoms
    )

    # Nearly all assertions are single constraints on one input: keep them out of the product.
    common = [atom for dnf in assertions if len(dnf) == 1 for atom in dnf[0]]
    common_inputs = [atom for atom in common if "X" in atom.kinds]
    others = [atom for atom in common if "X" not in atom.kinds]
    choices = _conjunction([dnf for dnf in assertions if len(dnf) != 1], line=1)

    boxes: dict[tuple[int, ...], list[_Atom]] = {}
    disjuncts: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for choice in choices:
        extra = [atom for atom in choice if "X" in atom.kinds]
        outputs = [*others, *(atom for atom in choice if "X" not in atom.kinds)]
        key = tuple(atom.serial for atom in extra)
        boxes[key] = extra
        unsafe = disjuncts.setdefault(key, [])
        if all(atom.constant <= 0.0 for atom in outputs if not atom.coefficients):
            unsafe.append(tuple(sorted({position[a.serial] for a in outputs if a.coefficients})))
    regions = []
    for key, extra in boxes.items():
        lower, upper = _box(n_in, [*common_inputs, *extra])
        regions.append(Region(lower, upper, tuple(disjuncts[key])))
    return Property(name, n_in, n_out, rows, tuple(regions))


def _box(n_in: int, atoms: list[_Atom]) -> tuple[np.ndarray, np.ndarray]:
    """Intersection of constraints on single inputs: lower and upper, [n_in] float64 each."""
    lower, upper = np.full(n_in, -np.inf), np.full(n_in, np.inf)
    for atom in atoms:
        (((_, index), coefficient),) = atom.coefficients.items()
        limit = -atom.constant / coefficient
        if coefficient > 0:
            upper[index] = min(upper[index], limit)
        else:
            lower[index] = max(lower[index], limit)
    for index in range(n_in):
        low, high = lower[index], upper[index]
        if not math.isfinite(low) or not math.isfinite(high):
            side = "lower" if not math.isfinite(low) else "upper"
            raise UserError(f"X_{index} has no {side} bound")
        if low > high:
            raise UserError(f"the box is empty: X_{index} must be >= {low} and <= {high}")
    return lower, upper
