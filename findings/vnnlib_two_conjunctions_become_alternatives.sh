#!/usr/bin/env bash
# vnnlib 1.0.2 (PyPI), Python 3.11: `vnnlib.compat.transform` makes "or" of two assertions.
#
# The assertions of a VNN-LIB file hold together. Where two of them are conjunctions, one about
# inputs and one about outputs,
#
#   (assert (and (>= X[0] 0.0) (<= X[0] 1.0)))
#   (assert (and (>= Y[0] 0.5) (<= Y[0] 0.7)))
#
# `transform` returns two cases, of which a verifier has to look at each: an unbounded box with the
# output constraints, and the box [0, 1] with no output constraint at all (which any network
# satisfies). With the input bounds as two assertions of their own the same query is one case, the
# right one. Read the AST instead, or write one inequality per assertion.
#
# Seen:
#   two conjunctions: box [(-inf, inf)] rows 2
#   two conjunctions: box [(-0.0, 1.0)] rows 0
#   inputs apart:     box [(-0.0, 1.0)] rows 2
#
# Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check vnnlib==1.0.2
"$folder/venv/bin/python" - <<'PYTHON'
import math
import sys

import vnnlib
import vnnlib.compat

HEAD = """(vnnlib-version <2.0>)
(declare-network N
  (declare-input X float32 [1])
  (declare-output Y float32 [1])
)
"""
OUTPUTS = "(assert (and (>= Y[0] 0.5) (<= Y[0] 0.7)))\n"


def cases(title, text):
    found = []
    for case in vnnlib.compat.transform(vnnlib.parse_query_string(HEAD + text)):
        rows = sum(len(polytope.rhs) for polytope in case.output_constraints)
        print(title, "box", case.input_box, "rows", rows)
        found.append((case.input_box, rows))
    return found


together = cases(
    "two conjunctions:", "(assert (and (>= X[0] 0.0) (<= X[0] 1.0)))\n" + OUTPUTS
)
apart = cases("inputs apart:    ", "(assert (>= X[0] 0.0))\n(assert (<= X[0] 1.0))\n" + OUTPUTS)
split = together == [([(-math.inf, math.inf)], 2), ([(0.0, 1.0)], 0)]
right = apart == [([(0.0, 1.0)], 2)]
sys.exit(0 if split and right else "changed: assertions are joined differently now")
PYTHON
