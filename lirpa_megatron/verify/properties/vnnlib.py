"""VNN-LIB properties: version 1.0, and 2.0 (`vnnlib2`) where the file's first word says so.

The subset of SMT-LIB that VNN-LIB 1.0 defines, and what its files have in practice: `declare-const`
of real X_i and Y_j, and `assert` of trees of `and`, `or`, `not` over comparisons of linear
expressions (chains too). Every input needs bounds; different boxes may stand in different
disjuncts. Boxes that are empty are dropped, and so are disjuncts whose output constraints
contradict each other: a property of which nothing is left holds.

Strict comparisons stay strict where a counterexample is checked; bounds prove the closed ones
impossible, which is more.

A parser of our own, because no kept library serves: the PyPI package `vnnlib` reads VNN-LIB 2.0
from 1.0 on; its last release for 1.0 (0.0.1.post1, 2024) reports neither lines nor nested
disjunctions (an AssertionError), and drops constraints without variables.
"""

from __future__ import annotations

import gc
from pathlib import Path

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.files import read_text, stem
from lirpa_megatron.verify.properties.assembly import Assertions, assemble
from lirpa_megatron.verify.properties.property import Property
from lirpa_megatron.verify.properties.vnnlib2 import is_version_2, parse_query
from lirpa_megatron.verify.properties.vnnlib_formula import Formulas
from lirpa_megatron.verify.properties.vnnlib_syntax import (
    Expression,
    Variable,
    VnnlibError,
    read_expressions,
    shown,
    variable,
)

# Commands of SMT-LIB that say nothing about the property.
_IGNORED = {
    "set-logic", "set-info", "set-option", "check-sat", "get-model", "get-value", "get-info",
    "get-option", "echo",
}


def read_vnnlib(
    path: str | Path, n_in: int | None = None, n_out: int | None = None, network: str = "network"
) -> Property:
    """Reads a property and checks it against the network's sizes.

    Args:
        path: PROP.vnnlib or PROP.vnnlib.gz.
        n_in, n_out: numbers of inputs and outputs of the network; None: not checked.
        network: the network's name, for errors.

    Raises:
        UserError: unreadable file, syntax error (with its line), unbounded input, or numbers of
            variables other than the network's.
    """
    text = read_text(path, "property")
    try:
        prop = parse_vnnlib(text, stem(path))
    except VnnlibError as error:
        raise UserError(f"property {path}, line {error.line}: {error}") from None
    except UserError as error:
        raise UserError(f"property {path}: {error}") from None
    check_sizes(prop, path, 0, n_in, n_out, network)
    return prop


def check_sizes(
    prop: Property, path: str | Path, k: int, n_in: int | None, n_out: int | None, network: str
) -> None:
    """Raises UserError unless the property's k-th network has as many inputs and outputs as the
    file's, which is called `network` in the error."""
    declared_in, declared_out = prop.n_in, prop.n_out
    if prop.wiring is not None:
        declared_in = len(prop.wiring.reads[k])
        declared_out = prop.n_out - len(prop.wiring.handed_on)
    if prop.networks:
        declared_in, declared_out = prop.networks[k].n_in, prop.networks[k].n_out
    sizes = (("input", declared_in, n_in), ("output", declared_out, n_out))
    for kind, declared, expected in sizes:
        if expected is not None and declared != expected:
            raise UserError(
                f"property {path} declares {declared} {kind} variables, "
                f"but {network} has {expected} {kind}s"
            )


def parse_vnnlib(text: str, name: str) -> Property:
    """Parses the text of a property of either version; see `read_vnnlib`."""
    # Large files make millions of small objects and no cycles: looking for those triples the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        return parse_query(text, name) if is_version_2(text) else _parse(text, name)
    finally:
        if collects:
            gc.enable()


def _parse(text: str, name: str) -> Property:
    declared: dict[Variable, int] = {}
    formulas = Formulas(declared)
    assertions = Assertions()
    for command, line in read_expressions(text):
        words = command if isinstance(command, list) else []
        head = words[0][0] if words else command
        if head in ("declare-const", "declare-fun"):
            _declare(words, line, declared)
        elif head == "assert":
            if len(words) != 2:
                raise VnnlibError(line, f"assert takes one formula, found {len(words) - 1}")
            assertions.add(formulas.read(words[1]))
        elif head == "exit":
            break
        elif head == "vnnlib-version":
            raise VnnlibError(line, "vnnlib-version must come first: this is read as VNN-LIB 1.0")
        elif head not in _IGNORED:
            raise VnnlibError(line, f"unknown command {shown(head)}")
    n_in, n_out = (_count(declared, kind) for kind in "XY")
    if not formulas.rows:
        raise UserError("it constrains no output")
    return assemble(name, n_in, n_out, formulas.rows, assertions, "X_{}".format)


def _declare(words: list[Expression], line: int, declared: dict[Variable, int]) -> None:
    """`(declare-const X_0 Real)` or `(declare-fun X_0 () Real)`."""
    values = [value for value, _ in words[1:]]
    if words[0][0] == "declare-fun" and len(values) == 3 and values[1] == []:
        del values[1]
    if len(values) != 2 or not isinstance(values[0], str):
        raise VnnlibError(line, "expected (declare-const NAME Real)")
    found = variable(values[0])
    if found is None:
        raise VnnlibError(line, f"variable {shown(values[0])} is neither X_i nor Y_i")
    if values[1] != "Real":
        raise VnnlibError(
            line, f"{values[0]} has type {shown(values[1])}, only Real is supported"
        )
    if found in declared:
        first = declared[found]
        raise VnnlibError(line, f"{values[0]} is declared twice (first in line {first})")
    declared[found] = line


def _count(declared: dict[Variable, int], kind: str) -> int:
    """Number of variables of a kind, which must be numbered 0 ... n-1."""
    indices = {index for k, index in declared if k == kind}
    for index in range(len(indices)):
        if index not in indices:
            raise UserError(f"{kind}_{index} is not declared, but {kind}_{max(indices)} is")
    if not indices:
        raise UserError(f"no variable {kind}_0 is declared")
    return len(indices)
