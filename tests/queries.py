"""Queries of VNN-LIB 2.0 for tests, and points evaluated by what a property means."""

from __future__ import annotations

import platform
from fractions import Fraction

import pytest

from lirpa_megatron.verify.properties.vnnlib import parse_vnnlib

# The parser has wheels for this alone (setup.py says more).
needs_parser = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="vnnlib 1.0.2 has no wheel for this machine"
)


def tensor(kind, name, shape, dtype="real"):
    return f"  (declare-{kind} {name} {dtype} [{','.join(map(str, shape))}])\n"


def network(name, inputs, outputs, more="", dtype="real"):
    """Text of a network's declaration: inputs and outputs by name, with their shapes."""
    tensors = [tensor("input", n, shape, dtype) for n, shape in inputs.items()]
    tensors += [tensor("output", n, shape, dtype) for n, shape in outputs.items()]
    return f"(declare-network {name}\n{more}{''.join(tensors)})\n"


def box(name, lower, upper):
    """Assertions of bounds on the elements of a tensor of one dimension."""
    return "".join(
        f"(assert (and (>= {name}[{i}] {low!r}) (<= {name}[{i}] {high!r})))\n"
        for i, (low, high) in enumerate(zip(lower, upper, strict=True))
    )


def query(networks, assertions):
    return f"(vnnlib-version <2.0>)\n{networks}{assertions}"


def one(unsafe, lower=(0.0, -1.0), upper=(1.0, 1.0), n_out=2, dtype="real"):
    """A query of one network, X to Y, over a box, whose outputs must not satisfy `unsafe`."""
    declared = network("f", {"X": [len(lower)]}, {"Y": [n_out]}, dtype=dtype)
    return query(declared, f"{box('X', lower, upper)}(assert {unsafe})\n")


def parsed(text):
    return parse_vnnlib(text, "test")


def is_violated(prop, x, y):
    """Whether declared inputs x with outputs y violate the property, by its definition."""
    x, y = ([Fraction(float(v)) for v in values] for values in (x, y))
    point = list(x)
    if prop.wiring is not None:
        point, declared = [None] * prop.n_in, iter(x)
        for reads in prop.wiring.reads:
            for variable in reads:
                value = next(declared)
                if point[variable] not in (None, value):
                    return False  # inputs that must be equal are not
                point[variable] = value
        y = y + [point[i] for i in prop.wiring.handed_on]
    return any(
        all(interval.holds(v) for interval, v in zip(region.box, point, strict=True))
        and any(
            all(prop.rows[row].allows(prop.rows[row].slack(y)) for row in disjunct)
            for disjunct in region.disjuncts
        )
        for region in prop.regions
    )
