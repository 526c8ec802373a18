#!/usr/bin/env bash
# Set-up, the linter, then the tests: `bash runs/test.sh`, or with pytest's arguments: `bash runs/test.sh -k dpo`,
# `... -n 0 --pdb`. On a machine with a GPU the tests still run on the CPU, where nothing is compiled;
# `TEST_GPU=0 bash runs/test.sh -n 0` shows them GPU 0, and those for a GPU alone run too.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
missing() {
    ! python -c "import pytest_timeout, xdist, sklearn, pyarrow, matplotlib, nltk, ruff" 2> /dev/null
}
if [ "${VIRTUAL_ENV:-}" = "$PWD/.venv" ] && missing; then
    python -m pip install -q --disable-pip-version-check -r requirements-test.txt
fi
export CUDA_VISIBLE_DEVICES="${TEST_GPU:-}"
workers=(-n 2 --dist=loadfile --no-loadscope-reorder)  # a file's fixtures are made once; conftest.py has the order
if missing; then
    echo "tests: some packages of requirements-test.txt are missing, and the tests that need them are skipped;" \
         "\`python -m pip install -r requirements-test.txt\` installs them" >&2
    python -c "import xdist" 2> /dev/null || workers=()
else
    python -m ruff check .
fi
python -m slam.embedded > /dev/null
python -m pytest -q --durations=10 "${workers[@]}" "$@"
