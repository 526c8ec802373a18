#!/usr/bin/env bash
# Set-up, then the tests: `bash runs/test.sh`, or with pytest's arguments: `bash runs/test.sh -k dpo`.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
python embedded.py > /dev/null
python -m pytest -q --durations=10 "$@"
