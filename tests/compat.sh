#!/usr/bin/env bash
# Run the model's tests with the oldest supported transformers and with the newest, each in its own environment.
#
#   tests/compat.sh [FOLDER]      FOLDER keeps the two environments (default: .compat); made if missing
#
# Arguments for pytest go into PYTEST_ARGS. Exit status: 0 if both pass.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.compat}
failed=0

suite() { # NAME REQUIREMENT...
    local name=$1 environment=$folder/$1
    shift
    if [ ! -e "$environment/ready" ]; then
        python3 -m venv "$environment"
        "$environment/bin/pip" install --quiet --upgrade pip
        "$environment/bin/pip" install --quiet -e ".[profile]" peft bitsandbytes hypothesis pytest pytest-timeout "$@"
        touch "$environment/ready"
    fi
    "$environment/bin/python" -c "import torch, transformers
print('$name: transformers', transformers.__version__, 'torch', torch.__version__, flush=True)"
    "$environment/bin/python" -m pytest -p no:cacheprovider ${PYTEST_ARGS:-} tests/modeling tests/families || failed=1
}

suite oldest 'transformers==5.17.*' 'huggingface-hub<2'
suite newest --upgrade --upgrade-strategy only-if-needed transformers
exit $failed
