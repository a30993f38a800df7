#!/usr/bin/env bash
# Makes .venv ready, once. Called by every target of the Makefile.
#
#   TORCH       what pip installs as torch. An exact version, because a looser one may bring
#               gigabytes of CUDA to a machine that already has a CPU build at hand.
#   AUTO_LIRPA  what pip installs as auto_LiRPA: a version, a folder, a git URL.
#   PYTHON      the interpreter that makes .venv.
#
# .venv/ready records what is installed. Values not given are those of the last set-up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ready=.venv/ready
torch=${TORCH:-$(sed -n 1p $ready 2>/dev/null || true)}
torch=${torch:-torch==2.13.0}
auto_lirpa=${AUTO_LIRPA:-$(sed -n 2p $ready 2>/dev/null || true)}
auto_lirpa=${auto_lirpa:-auto_LiRPA==0.3}
wanted=$(printf '%s\n' "$torch" "$auto_lirpa" "$(cksum <setup.py)" "$PWD")
[ "$(cat $ready 2>/dev/null || true)" = "$wanted" ] && exit 0

step() { printf '== %s\n' "$*"; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

rm -f $ready
step "Python environment in .venv"
pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv --clear .venv
step "$torch"
# Unquoted: TORCH may carry options of pip.
# shellcheck disable=SC2086
pip install --quiet $torch
step "lirpa_megatron and what it needs"
# auto_LiRPA out of the way first, or pip reports its pins as conflicts.
pip uninstall --yes --quiet --quiet auto_LiRPA
pip install --quiet --editable '.[test,examples]'
step "$auto_lirpa, without its declared dependencies"
# appdirs and graphviz (0.7.1) are what it imports and nothing else here brings.
# shellcheck disable=SC2086
pip install --quiet --no-deps $auto_lirpa appdirs graphviz
# psutil comes with us; triton is what releases of megatron-core for Python 3.12 import.
for package in $(.venv/bin/python -c '
from lirpa_megatron.compat import requirements
print(*requirements.undeclared_and_missing())'); do
    step "$package, which megatron-core imports and does not declare"
    pip install --quiet "$package"
done
printf '%s\n' "$wanted" >$ready
