#!/usr/bin/env bash
# vnnlib 1.0.2 (PyPI), Python 3.11: `vnnlib.compat.transform` keeps one half of an equality.
#
# VNN-LIB 2.0 has `==`. The query itself holds it, and `transform`, which turns a query into boxes
# and polytopes for verifiers, accepts it without a word:
#
#   (== Y[0] 0.5)  becomes the polytope  y <= 0.5   (y >= 0.5 is lost)
#   (== X[0] 0.5)  becomes the box       (-inf, 0.5]
#
# The same output constraint written as two inequalities keeps both rows. A verifier that reads its
# problem through `transform` answers another question: here it would report a violation at y = 0.
# (`!=` is refused with VNNLibException, so an error would have been possible.) Read the AST instead.
#
# Seen:
#   equality on the output: box [(-0.0, 1.0)] polytope [[1.0]] <= [0.5]
#   two inequalities:       box [(-0.0, 1.0)] polytope [[-1.0], [1.0]] <= [-0.5, 0.5]
#   equality on the input:  box [(-inf, 0.5)]
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
UNIT = "(assert (>= X[0] 0.0))\n(assert (<= X[0] 1.0))\n"


def transformed(text):
    (case,) = vnnlib.compat.transform(vnnlib.parse_query_string(HEAD + text))
    (polytope,) = case.output_constraints
    return case.input_box, polytope.coeff_matrix, polytope.rhs


box, rows, right = transformed(UNIT + "(assert (== Y[0] 0.5))\n")
print("equality on the output: box", box, "polytope", rows, "<=", right)
half = rows == [[1.0]] and right == [0.5]
box, rows, right = transformed(UNIT + "(assert (>= Y[0] 0.5))\n(assert (<= Y[0] 0.5))\n")
print("two inequalities:       box", box, "polytope", rows, "<=", right)
both = sorted(zip(rows, right)) == [([-1.0], -0.5), ([1.0], 0.5)]
box, _, _ = transformed("(assert (== X[0] 0.5))\n(assert (<= Y[0] 0.5))\n")
print("equality on the input:  box", box)
open_box = box == [(-math.inf, 0.5)]
sys.exit(0 if half and both and open_box else "changed: equalities are read differently now")
PYTHON
