#!/usr/bin/env bash
# Makes environments from nothing, runs the demo and the tests in each, and prints one line for each.
#
#   tests/compat.sh [tested|lowest|newest]...      all three by default
#
#   tested   the versions in constraints.txt, as README's commands install them
#   lowest   the lowest versions that pyproject.toml allows, on Python 3.10 where there is one
#   newest   what `pip install 'pmod-cli[all]'` gets today, without constraints.txt
#
# COMPAT (default .compat) is the folder of environments, logs and demos; PYTHON and PYTHON_LOWEST are the
# interpreters; PYTEST_ARGS goes to pytest. An environment is removed before and after its run, or kept after it if
# KEEP is set. Exit status: 0 if all pass.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(mkdir -p "${COMPAT:-.compat}" && cd "${COMPAT:-.compat}" && pwd)
python=${PYTHON:-python3}
lowest=${PYTHON_LOWEST:-$(python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null || echo "$python")}
failed=0

# Fits in about ten minutes on two cores; the pages' own tests do not depend on versions of packages.
tests=(tests --ignore=tests/docs)

install() { # NAME: into $folder/NAME
    local environment=$folder/$1
    case $1 in
    tested)
        "$python" -m venv "$environment"
        PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
            "$environment/bin/pip" install --quiet --editable '.[dev]'
        ;;
    newest)
        "$python" -m venv "$environment"
        # An empty file in place of any constraint that this machine's pip is set to.
        PIP_CONSTRAINT=/dev/null "$environment/bin/pip" install --quiet --upgrade pip
        PIP_CONSTRAINT=/dev/null "$environment/bin/pip" install --quiet --editable '.[dev]'
        ;;
    lowest)
        "$lowest" -m venv "$environment"
        "$environment/bin/pip" install --quiet uv
        "$environment/bin/uv" pip compile --quiet --resolution lowest-direct --prerelease disallow --no-annotate \
            --no-header --python "$environment/bin/python" --extra dev --output-file "$folder/lowest.txt" pyproject.toml
        PIP_CONSTRAINT=/dev/null "$environment/bin/pip" install --quiet --requirement "$folder/lowest.txt"
        PIP_CONSTRAINT=/dev/null "$environment/bin/pip" install --quiet --no-deps --editable .
        ;;
    esac
}

versions() { # NAME
    "$folder/$1/bin/python" - <<'PYTHON'
import platform
from importlib.metadata import version

names = "torch torchvision transformers accelerate datasets peft lmms-eval filelock numpy".split()
print(f"python {platform.python_version()},", ", ".join(f"{name} {version(name)}" for name in names))
PYTHON
}

run() { # NAME: one line on stdout, everything else in $folder/NAME.log
    local name=$1 log=$folder/$1.log state=passed started
    rm -rf "${folder:?}/$name" "$folder/$name-demo"
    : >"$log"
    install "$name" >>"$log" 2>&1 || { echo "$name: FAILED, cannot be installed; see $log"; return 1; }
    started=$SECONDS
    "$folder/$name/bin/pmod" demo --output "$folder/$name-demo" >>"$log" 2>&1 || state="FAILED (demo)"
    local demo=$((SECONDS - started))
    # shellcheck disable=SC2086
    "$folder/$name/bin/python" -m pytest -p no:cacheprovider -n 2 --dist loadfile ${PYTEST_ARGS:-} "${tests[@]}" \
        >>"$log" 2>&1 || state="FAILED (tests)"
    echo "$name: $state; demo in $demo s; $(grep -aE '^[0-9]+ (passed|failed)' "$log" | tail -n 1); $(versions "$name")"
    [ -n "${KEEP:-}" ] || rm -rf "${folder:?}/$name" "$folder/$name-demo"
    [ "$state" = passed ]
}

[ $# -gt 0 ] || set -- tested lowest newest
for name; do
    case $name in
    tested | lowest | newest) run "$name" || failed=1 ;;
    *)
        echo "tests/compat.sh: no environment '$name'; there are tested, lowest, newest" >&2
        exit 2
        ;;
    esac
done
exit $failed
