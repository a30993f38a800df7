#!/usr/bin/env bash
# Makes .venv-megatron-RELEASE ready, once: .venv with another release of megatron-core, for tests.
#
#   tools/setup_megatron.sh 0.19.2
#
# The new environment holds that release alone, in front of .venv, whose torch, auto_LiRPA and tools
# it shares: it takes seconds, and torch stays what it is. triton is added for releases that import
# it, unless torch brought it. tools/setup_env.sh comes first.
#
#   VENV        the environment to share, if not .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

release=$1
venv=${VENV:-.venv}
fail() { printf '%s\n' "MEGATRON=$release: $*" >&2; exit 2; }

supported=$(sed -n 's/.*"megatron-core\([^"]*\)".*/\1/p' setup.py)
"$venv/bin/python" - "$release" "$supported" <<'PYTHON' || fail "supported are releases $supported"
import sys
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

try:
    sys.exit(not SpecifierSet(sys.argv[2]).contains(sys.argv[1]))
except InvalidVersion:
    sys.exit(1)
PYTHON

home=.venv-megatron-$release
ready=$home/ready
triton=triton==3.6.0
wanted=$(printf '%s\n' "$release" "$triton" "$(cat "$venv/ready")")
[ "$(cat "$ready" 2>/dev/null || true)" = "$wanted" ] && exit 0

folder() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
install() {
    "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps \
        --ignore-requires-python --target "$packages" "$1" 2>"$home/pip.log" \
        || { error=$(tail -n 1 "$home/pip.log"); rm -rf "$home"; fail "$error"; }
}

printf '== %s\n' "megatron-core $release in $home"
rm -rf "$home"
"$venv/bin/python" -m venv --without-pip "$home"
packages=$(folder "$home")
# Releases from 0.17 on ask for Python 3.12. They run on 3.10 and 3.11, which is enough for tests.
install "megatron-core==$release"
printf 'import site; site.addsitedir("%s")\n' "$(folder "$venv")" >"$packages/shared.pth"
needed=$("$home/bin/python" -c '
from lirpa_megatron.compat import requirements
print(*requirements.undeclared_and_missing())')
for package in $needed; do
    [ "$package" = triton ] && package=$triton
    printf '== %s\n' "$package, which megatron-core imports and does not declare"
    install "$package"
done
printf '%s\n' "$wanted" >"$ready"
