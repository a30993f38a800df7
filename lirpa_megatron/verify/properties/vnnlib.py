"""VNN-LIB 1.0 properties.

The subset of SMT-LIB that VNN-LIB 1.0 defines, and what its files have in practice: `declare-const`
of real X_i and Y_j, and `assert` of trees of `and`, `or`, `not` over comparisons of linear
expressions (chains too). Inputs may be constrained one variable at a time only (boxes), but
different boxes may stand in different disjuncts. Boxes that are empty are dropped, and so are
disjuncts whose output constraints contradict each other: a property of which nothing is left holds.

Strict comparisons stay strict where a counterexample is checked; bounds prove the closed ones
impossible, which is more.

A parser of our own, because no kept library serves: the PyPI package `vnnlib` reads VNN-LIB 2.0
from 1.0 on; its last release for 1.0 (0.0.1.post1, 2024) reports neither lines nor nested
disjunctions (an AssertionError), and drops constraints without variables.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.files import read_text, stem
from lirpa_megatron.verify.properties.contradictions import contradict
from lirpa_megatron.verify.properties.property import Interval, Property, Region
from lirpa_megatron.verify.properties.vnnlib_formula import Box, Dnf, Formulas, conjunction
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
_EVERYTHING = Interval()


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
    for kind, found, expected in (("input", prop.n_in, n_in), ("output", prop.n_out, n_out)):
        if expected is not None and found != expected:
            raise UserError(
                f"property {path} declares {found} {kind} variables, "
                f"but {network} has {expected} {kind}s"
            )
    return prop


def parse_vnnlib(text: str, name: str) -> Property:
    """Parses the text of a property; see `read_vnnlib`."""
    # Large files make millions of small objects and no cycles: looking for those triples the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        return _parse(text, name)
    finally:
        if collects:
            gc.enable()


def _parse(text: str, name: str) -> Property:
    declared: dict[Variable, int] = {}
    formulas = Formulas(declared)
    assertions: list[Dnf] = []
    for command, line in read_expressions(text):
        words = command if isinstance(command, list) else []
        head = words[0][0] if words else command
        if head in ("declare-const", "declare-fun"):
            _declare(words, line, declared)
        elif head == "assert":
            if len(words) != 2:
                raise VnnlibError(line, f"assert takes one formula, found {len(words) - 1}")
            assertions.append(formulas.read(words[1]))
        elif head == "exit":
            break
        elif head == "vnnlib-version":
            raise VnnlibError(line, "this is a file of VNN-LIB 2.0, only 1.0 is read")
        elif head not in _IGNORED:
            raise VnnlibError(line, f"unknown command {shown(head)}")
    n_in, n_out = (_count(declared, kind) for kind in "XY")
    if not formulas.rows:
        raise UserError("it constrains no output")
    regions = _regions(n_in, assertions)
    prop = Property(name, n_in, n_out, tuple(formulas.rows), regions)
    if not regions:
        return replace(prop, vacuous="no input satisfies the constraints on inputs")
    return _without_contradictions(prop)


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


def _regions(n_in: int, assertions: list[Dnf]) -> tuple[Region, ...]:
    """The disjuncts of the whole file, those of the same box together."""
    # Nearly all assertions are single constraints on one input: keep them out of the product.
    common: Box = {}
    rows: list[int] = []
    for dnf in assertions:
        if len(dnf) == 1:
            for index, interval in dnf[0][0].items():
                common[index] = interval.meet(common.get(index, _EVERYTHING))
            rows += dnf[0][1]
    if any(interval.is_empty() for interval in common.values()):
        return ()
    inner = [
        [choice for choice in dnf if not _is_empty(choice[0], common)]
        for dnf in assertions if len(dnf) != 1
    ]
    disjuncts: dict[tuple, list[tuple[int, ...]]] = {}
    for box, more in conjunction(inner, 1, within=common):
        key = tuple(sorted(box.items()))
        disjuncts.setdefault(key, []).append(tuple(sorted({*rows, *more})))
    regions = []
    around = [common.get(index, _EVERYTHING) for index in range(n_in)]
    for key, unsafe in disjuncts.items():
        box = list(around)
        for index, interval in key:
            box[index] = box[index].meet(interval)
        for index, interval in enumerate(box):
            for side in ("lower", "upper"):
                if getattr(interval, side) is None:
                    raise UserError(f"X_{index} has no {side} bound")
        regions.append(Region(tuple(box), tuple(unsafe)))
    return tuple(regions)


def _is_empty(box: Box, common: Box) -> bool:
    return any(
        interval.meet(common.get(index, _EVERYTHING)).is_empty() for index, interval in box.items()
    )


def _without_contradictions(prop: Property) -> Property:
    """Without the disjuncts that no outputs satisfy."""
    known: dict[tuple[int, ...], bool] = {}
    regions = []
    for region in prop.regions:
        kept = []
        for disjunct in region.disjuncts:
            if disjunct not in known:
                known[disjunct] = contradict(prop.rows[row] for row in disjunct)
            if not known[disjunct]:
                kept.append(disjunct)
        if kept:
            regions.append(replace(region, disjuncts=tuple(kept)))
    if not regions:
        reason = "no outputs satisfy the constraints on outputs, which contradict each other"
        return replace(prop, regions=(), vacuous=reason)
    return replace(prop, regions=tuple(regions))
