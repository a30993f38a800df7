"""`lirpa-megatron supports CAPABILITY`: what the VNN-LIB standard's tools ask a verifier for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lirpa_megatron.errors import UserError

NAME = "lirpa_megatron"
_OPSETS, _VERSIONS = ("7", "24"), ("1.0", "2.0")


def _operators() -> Sequence[str]:
    from lirpa_megatron.networks.onnx_import import SUPPORTED_OPS

    return SUPPORTED_OPS.split(", ")


CAPABILITIES: dict[str, Callable[[], Sequence[str]]] = {
    "onnx-opset-versions": lambda: _OPSETS,
    # Bounds are of real arithmetic, or of it up to rounding. Queries with other types are read all
    # the same.
    "onnx-element-types": lambda: ("real",),
    "onnx-operators": _operators,
    "vnnlib-versions": lambda: _VERSIONS,
    "hidden-node-theories": lambda: ("NH",),
    "multiple-input-output-theories": lambda: ("SIO", "MIO"),
    # Two networks are taken, too, but the theories of several have no limit.
    "multiple-network-theories": lambda: ("SNET",),
    "multiple-node-comparison-theories": lambda: ("SNC", "MNC"),
    "arithmetic-complexity-theories": lambda: ("LIN",),
    "optimised-disjunctive-reasoning": lambda: ("false",),
    "serialise-assignments": lambda: ("false",),
}
"""What it prints, line by line."""


def add_capabilities(parser: argparse.ArgumentParser) -> None:
    """One of them may be asked for (`check_asked`: has to be)."""
    asked = parser.add_mutually_exclusive_group()
    for name in CAPABILITIES:
        asked.add_argument(f"--{name}", dest="capability", action="store_const", const=name)


def check_asked(given: Mapping[str, Any]) -> None:
    """Raises UserError unless one is asked for: by then, what does not exist has been named."""
    if "capability" not in given:
        names = ", ".join(f"--{name}" for name in CAPABILITIES)
        raise UserError(f"supports needs what is asked for, one of {names}")
