#!/usr/bin/env bash
# Set-up, then the tests: `bash runs/test.sh`, or with pytest's arguments: `bash runs/test.sh -k dpo`.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
if [ "${VIRTUAL_ENV:-}" = "$PWD/.venv" ] && ! python -c "import sklearn, pyarrow, matplotlib" 2> /dev/null; then
    python -m pip install -q --disable-pip-version-check -r requirements-test.txt  # elsewhere their tests are skipped
fi
python embedded.py > /dev/null
python -m pytest -q --durations=10 "$@"
