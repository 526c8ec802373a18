# Sourced by the other scripts: leaves `python` as one that has the pinned requirements.
# An active environment that has the packages is used as it is; otherwise .venv is made, once.
cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." || return

# Two cores are soon oversubscribed by the TTS workers and torch's threads; waiting threads must not spin.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" TOKENIZERS_PARALLELISM=false

have_packages() {
    "$1" - <<'PY' 2>/dev/null
from importlib.metadata import version
import re
for file in ("requirements.txt", "requirements-embedded.txt"):
    for line in open(file):
        if m := re.match(r"([\w-]+)==(\S+)", line):
            found = version(m[1]).split("+")[0]
            # The user's own environment may have other versions of the libraries, but not of the weights.
            assert found == m[2] or file == "requirements.txt"
PY
}

if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && have_packages python; then
    echo "set-up: using the active environment $(python -c 'import sys; print(sys.prefix)')"
else
    stamp=".venv/installed-$(cat requirements.txt requirements-embedded.txt | sha256sum | cut -c1-12)"
    if [ ! -e "$stamp" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed" >&2; return 1; }
        echo "set-up: installing into .venv"
        { [ -e .venv/bin/python ] || python3 -m venv .venv; } &&
            .venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt &&
            .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements-embedded.txt &&
            touch "$stamp" || { echo "set-up: the packages are not all there; the same command tries again" >&2; return 1; }
    fi
    export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
    echo "set-up: using .venv"
fi
