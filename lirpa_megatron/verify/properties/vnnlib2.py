"""Properties of VNN-LIB 2.0, read by the parser of the standard's authors (`vnnlib` on PyPI).

A query declares networks, one or two, with their inputs and outputs, and asserts comparisons of
linear expressions joined by `and` and `or`. Inputs and outputs are flattened in row-major order,
one after the other, and are those of the file in order: names need not agree.

Of the parser its syntax tree is used, in which literals are as written. Its `compat.transform` is
not: it makes one inequality of an equality. What it reads wrongly or fails on is found before and
after it (`vnnlib2_text`, `vnnlib2_errors`).

Numbers are exact and arithmetic is that of real numbers, also where the query says float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.description import MAX_WIDTH
from lirpa_megatron.verify.properties.assembly import Assertions, assemble
from lirpa_megatron.verify.properties.property import Declared, OutputRow, Property, Tensor
from lirpa_megatron.verify.properties.vnnlib2_errors import Explainer
from lirpa_megatron.verify.properties.vnnlib2_parser import Worker, parse
from lirpa_megatron.verify.properties.vnnlib2_text import (
    PIECE,
    QueryText,
    Span,
    grouped,
    is_version_2,
    query_text,
)
from lirpa_megatron.verify.properties.vnnlib_formula import (
    MAX_TERMS,
    ONE,
    ZERO,
    Conjunct,
    Dnf,
    Formulas,
    Linear,
    conjunction,
    linear_product,
    linear_sum,
)
from lirpa_megatron.verify.properties.vnnlib_syntax import VnnlibError, number

__all__ = ["is_version_2", "parse_query"]

_SYMBOLS = {"==": "=", "!=": "distinct"}
_TYPES = {
    "Real": "real", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}


def parse_query(text: str, name: str) -> Property:
    """Parses a query.

    Raises:
        VnnlibError, UserError: as `read_vnnlib`; the parser is not installed.
    """
    query = query_text(text)
    parser = _parser()
    with Worker() as worker:
        large = len(query.text) > 2 * PIECE
        reader = _Reader(query, parser, worker.parse if large else partial(parse, parser))
        for group in grouped(list(query.assertions)):
            if group[-1][1] - group[0][0] <= PIECE:
                for formula in reader.parse(query.text[group[0][0] : group[-1][1]], group[0][0]):
                    reader.assertion(formula)
            else:
                reader.assertions.add(reader.large(query.formula(group[0])))
    return reader.property(name)


def _parser() -> Any:
    try:
        import vnnlib
    except ImportError as error:
        raise UserError(
            f"it is a file of VNN-LIB 2.0, whose parser is not installed ({error}): "
            "pip install vnnlib==1.0.2"
        ) from None
    if not hasattr(vnnlib, "parse_query_string"):
        raise UserError(
            "it is a file of VNN-LIB 2.0, and the installed vnnlib reads 1.0: "
            "pip install vnnlib==1.0.2"
        )
    return vnnlib


class _Reader:
    """Reads the assertions of one query, piece by piece."""

    def __init__(
        self, query: QueryText, parser: Any, parse: Callable[[str], tuple[str, Any]]
    ) -> None:
        self._text, self._call = query, parse
        self._header_lines = query.header.count("\n")
        self.assertions = Assertions()
        self._formulas = Formulas({})
        # The grammar wants an assertion. This one is about no variable.
        alone = "(assert (<= 0 0))"
        self._assertions_of(alone, query.line(query.assertions[0][0]))
        declared = parser.parse_query_string(f"{query.header}\n{alone}").networks
        self.networks = tuple(_declared(network, query.header) for network in declared)
        _check_networks(self.networks)
        self._offsets = _offsets(self.networks)
        n_in = sum(network.n_in for network in self.networks)
        # of each input variable the one that it is equal to, or itself
        self._equal = list(range(n_in))
        self._variables: dict[tuple[str, tuple[int, ...]], Linear] = {}
        self._numbers: dict[str, Linear] = {}
        self._line = 0
        self._first_line = 1

    # ----------------------------------------------------------------- pieces

    def parse(self, text: str, position: int) -> list[tuple]:
        """What some assertions say, which stand at a position of the text."""
        self._first_line = self._text.line(position)
        return self._assertions_of(text, self._first_line)

    def _assertions_of(self, text: str, line: int) -> list[tuple]:
        whole = self._text.header + "\n" + text
        kind, found = self._call(whole)
        if kind == "assertions":
            return found
        explainer = Explainer(whole, self._header_lines + 2, line)
        if kind == "died":
            raise VnnlibError(line, f"its parser ended here ({found})")
        explainer.explain(found) if kind == "refused" else explainer.explain_number(found)

    def large(self, formula: Span) -> Dnf:
        """A formula that is larger than a piece: its operands, a few at a time."""
        found = self._text.operands(formula)
        if found is None:
            (node,) = self.parse(f"(assert {self._text.text[slice(*formula)]})", formula[0])
            return self._formula(node)
        word, operands = found
        parts: list[Dnf] = []
        for group in grouped(operands):
            begin, end = group[0][0], group[-1][1]
            if end - begin > PIECE:
                parts.append(self.large(group[0]))
                continue
            (node,) = self.parse(f"(assert ({word} {self._text.text[begin:end]}))", begin)
            parts += [self._formula(operand) for operand in node[1:]]
        if word == "or":
            return [conjunct for part in parts for conjunct in part]
        return conjunction(parts, self._first_line)

    # ----------------------------------------------------------------- formulas

    def assertion(self, node: tuple) -> None:
        """What is asserted; an equality of two inputs makes them one variable."""
        if node[0] == "and":
            for operand in node[1:]:
                self.assertion(operand)
            return
        if node[0] == "==":
            terms, constant = linear_sum(
                [self._linear(node[1]), self._linear(node[2])], [1, -1], self._line
            )
            (kinds, indices) = zip(*terms, strict=True) if terms else ((), ())
            if kinds == ("X", "X") and constant == 0 and sum(terms.values()) == 0:
                self._unite(*indices)
                return
        self.assertions.add(self._formula(node))

    def _unite(self, first: int, second: int) -> None:
        first, second = self._root(first), self._root(second)
        self._equal[max(first, second)] = min(first, second)

    def _root(self, variable: int) -> int:
        while self._equal[variable] != variable:
            variable = self._equal[variable]
        return variable

    def _formula(self, node: tuple) -> Dnf:
        kind = node[0]
        if kind in ("and", "or"):
            parts = [self._formula(operand) for operand in node[1:]]
            if kind == "or":
                return [conjunct for part in parts for conjunct in part]
            return conjunction(parts, self._line)
        self._line = 0
        left, right = self._linear(node[1]), self._linear(node[2])
        return self._formulas.comparison(_SYMBOLS.get(kind, kind), left, right, self._line)

    def _linear(self, node: tuple) -> Linear:
        """A linear expression; `_line` becomes that of the first leaf since it was 0."""
        kind = node[0]
        if kind == "variable":
            return self._variable(*node[1:])
        if kind == "number":
            return self._number(*node[1:])
        parts = [self._linear(part) for part in node[1:]]
        if kind == "*":
            return linear_product(parts, self._line)
        first = -1 if kind == "-" and len(parts) == 1 else 1
        rest = 1 if kind == "+" else -1
        return linear_sum(parts, [first] + [rest] * (len(parts) - 1), self._line)

    def _seen(self, line: int) -> int:
        line += self._first_line - self._header_lines - 2
        self._line = self._line or line
        return line

    def _variable(self, line: int, name: str, indices: tuple[int, ...]) -> Linear:
        line, key = self._seen(line), (name, indices)
        known = self._variables.get(key)
        if known is None:
            if name not in self._offsets:
                raise VnnlibError(line, f"{name} is an output of a hidden layer: constraints on "
                                        "those are not supported")
            kind, offset, shape = self._offsets[name]
            index = 0
            for i, size in zip(indices, shape, strict=True):
                if not 0 <= i < size:
                    raise VnnlibError(line, f"{_element(*key)} is outside of its shape {[*shape]}")
                index = index * size + i
            offset += index
            known = {(kind, offset): ONE}, ZERO
            if len(self._variables) < MAX_TERMS:
                self._variables[key] = known
        return known

    def _number(self, line: int, word: str) -> Linear:
        line = self._seen(line)
        known = self._numbers.get(word)
        if known is None:
            known = {}, number(word, line)
            if len(self._numbers) < MAX_TERMS:
                self._numbers[word] = known
        return known

    # ----------------------------------------------------------------- the whole

    def property(self, name: str) -> Property:
        """The property, after all assertions."""
        n_out = sum(network.n_out for network in self.networks)
        roots = [self._root(i) for i in range(len(self._equal))]
        place = {root: i for i, root in enumerate(sorted(set(roots)))}
        merged = [place[root] for root in roots]
        rows, assertions = self._formulas.rows, self.assertions
        if len(place) < len(merged):
            assertions = assertions.renamed(merged)
            rows, assertions = _with_merged(rows, merged, assertions)
        # the first declared input that each variable is
        first = {variable: i for i, variable in reversed(list(enumerate(merged)))}
        reads, begin = [], 0
        for network in self.networks:
            reads.append(tuple(merged[begin : begin + network.n_in]))
            begin += network.n_in
        return assemble(
            name, len(place), n_out, rows, assertions,
            lambda variable: self._name(first[variable]),
            self.networks, tuple(reads),
        )

    def _name(self, variable: int) -> str:
        """Of a declared input variable."""
        tensors = [tensor for network in self.networks for tensor in network.inputs]
        for tensor in tensors:
            if variable < tensor.size:
                break
            variable -= tensor.size
        return _element(tensor.name, np.unravel_index(variable, tensor.shape))


def _element(name: str, indices: Sequence[int]) -> str:
    return f"{name}[{','.join(str(int(i)) for i in indices)}]" if len(indices) else name


def _declared(network: Any, header: str) -> Declared:
    if network.equal_to and network.isometric_to:
        raise UserError(f"network {network.name} has both equal-to and isomorphic-to: one of them "
                        "is allowed")
    return Declared(
        network.name, *(tuple(_tensor(t, header) for t in tensors)
                        for tensors in (network.inputs, network.outputs)),
        network.equal_to or None,
    )


def _tensor(tensor: Any, header: str) -> Tensor:
    kind = tensor.dtype.name
    dtype, written = _TYPES.get(kind), kind
    if dtype is None:
        found = re.search(rf"\(declare-(?:in|out)put\s+{tensor.name}\s+(\w+)", header)
        written = found[1] if found else kind
        dtype = "real" if written == "Real" else None  # as before the standard was published
    if dtype is None:
        raise UserError(f"{tensor.name} has type {written}: only {', '.join(_TYPES.values())} are "
                        "supported")
    made = Tensor(tensor.name, dtype, tuple(tensor.shape))
    if made.size > MAX_WIDTH:
        raise UserError(f"{made.name} of shape {list(made.shape)} is too large")
    return made


def _check_networks(networks: Sequence[Declared]) -> None:
    if len(networks) > 2:
        raise UserError(
            f"it declares {len(networks)} networks ({', '.join(n.name for n in networks)[:200]}): "
            "at most two are supported"
        )
    if len({network.name for network in networks}) < len(networks):
        raise UserError(f"network {networks[0].name} is declared twice")


def _offsets(networks: Sequence[Declared]) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """Name of each input and output -> "X" or "Y", its first variable's number, its shape."""
    found, begins = {}, {"X": 0, "Y": 0}
    for network in networks:
        for kind, tensors in (("X", network.inputs), ("Y", network.outputs)):
            for tensor in tensors:
                found[tensor.name] = kind, begins[kind], tensor.shape
                begins[kind] += tensor.size
    return found


def _with_merged(
    rows: Sequence[OutputRow], merged: Sequence[int], assertions: Assertions
) -> tuple[list[OutputRow], Assertions]:
    """Rows with input variable i called merged[i]; those of which nothing is left hold or not."""
    made: list[OutputRow] = []
    # of each row its new position, or whether it holds
    place: list[int | bool] = []
    for row in rows:
        sums: dict[int, Fraction] = {}
        for key, c in row.coefficients.items():
            new = key if key >= 0 else -1 - merged[-1 - key]
            sums[new] = sums.get(new, Fraction(0)) + c
        sums = {key: c for key, c in sums.items() if c}
        if sums:
            place.append(len(made))
            made.append(replace(row, coefficients=sums))
        else:
            place.append(row.allows(row.bound))

    def kept(conjunct: Conjunct) -> Conjunct | None:
        places = [place[row] for row in conjunct[1]]
        if any(p is False for p in places):
            return None
        return conjunct[0], tuple(p for p in places if p is not True)

    new = Assertions(common=assertions.common)
    common = kept(({}, tuple(assertions.rows)))
    if common is None:
        new.choices.append([])
    else:
        new.rows = list(common[1])
    new.choices += [[c for c in map(kept, dnf) if c is not None] for dnf in assertions.choices]
    return made, new
