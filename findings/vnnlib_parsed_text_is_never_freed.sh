#!/usr/bin/env bash
# vnnlib 1.0.2 (PyPI), Python 3.11: what `parse_query_string` has parsed is never freed.
#
# A query that is parsed, and whose tree is then deleted, leaves memory behind each time: about 22
# bytes for each character of its text. (The parser's own syntax tree, from which the typed tree that
# Python sees is made, has no owner.) The files of VNN-COMP 2026 have up to 124 MB: each costs a
# program that reads several of them 2.7 GB for good, besides the tree itself. Parse large files in a
# process that ends.
#
# Seen (20,000 assertions, 460 kB, parsed and deleted ten times):
#   resident memory grows by 10.1 MB each time, 22 bytes a character
#
# Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check vnnlib==1.0.2
"$folder/venv/bin/python" - <<'PYTHON'
import gc
import resource
import sys

import vnnlib

TEXT = """(vnnlib-version <2.0>)
(declare-network N
  (declare-input X float32 [2])
  (declare-output Y float32 [2])
)
""" + "(assert (<= X[0] 0.5))\n" * 20_000


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def parse_and_delete():
    query = vnnlib.parse_query_string(TEXT)
    assert len(query.assertions) == 20_000
    del query
    gc.collect()


for _ in range(3):  # what is allocated once
    parse_and_delete()
before = resident()
for _ in range(10):
    parse_and_delete()
each = (resident() - before) / 10
print(f"resident memory grows by {each / 1e6:.1f} MB each time, "
      f"{each / len(TEXT):.0f} bytes a character")
sys.exit(0 if each > 5 * len(TEXT) else "changed: memory is freed now")
PYTHON
