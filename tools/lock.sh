#!/usr/bin/env bash
# Writes constraints.txt: one exact version for everything that README's commands install, on Python 3.10 to 3.13.
#
#   tools/lock.sh [REQUIREMENT...]      e.g. tools/lock.sh torch==2.14.1 torchvision==0.29.1
#
# Takes the newest releases that pyproject.toml allows, less what the requirements given here hold back. The build
# tools of packages without a wheel are in it too. Afterwards run tests/compat.sh, which tests the set.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/uv"
"$work/uv/bin/pip" install --quiet uv
printf '%s\n' "hatchling>=1.26,<2" "setuptools" "wheel" >"$work/build.in"
printf '%s\n' "$@" >"$work/held.in"
"$work/uv/bin/uv" pip compile --quiet --universal --python-version 3.10 --prerelease disallow \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --python "$(command -v python3)" \
    --extra dev pyproject.toml "$work/build.in" --constraint "$work/held.in" --output-file "$work/set.txt"
{
    echo "# The tested set: exact versions of all that README's commands install. Made by: tools/lock.sh $*"
    cat "$work/set.txt"
} >"$work/constraints.txt"
mv "$work/constraints.txt" constraints.txt
echo "constraints.txt: $(grep -c == constraints.txt) lines"
