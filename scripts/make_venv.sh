#!/usr/bin/env bash
# Makes a virtual environment with StageMesh in it, editable, at the pinned versions.
#
#   scripts/make_venv.sh .venv worker     what a mesh needs
#   scripts/make_venv.sh .venv dev        that, and what tests and checks need
#
# On Linux the public index has torch with gigabytes of CUDA. Where no NVIDIA GPU is found and the
# index of CPU builds can be reached, torch comes from there; otherwise pip finds one by itself.
set -euo pipefail

venv=$1
extra=$2
cpu_index=https://download.pytorch.org/whl/cpu
cd "$(dirname "$0")/.."

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "StageMesh needs Python 3.11 or later and found none: install one, or name it with" \
        "make PYTHON=/path/to/python3" >&2
    exit 1
}

can_reach() {
    "$venv/bin/python" - "$1" <<'PYTHON' >/dev/null 2>&1
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=5).read(1)
PYTHON
}

# Python compiles what is imported when it is; most of torch and transformers never is.
pip_options=(-c constraints.txt --no-compile)
python=$(find_python)
if [ ! -x "$venv/bin/python" ]; then
    echo "Making the environment $venv with $("$python" --version)"
    "$python" -m venv "$venv" || {
        rm -rf "$venv"
        echo "That Python cannot make environments; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
fi
if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    if can_reach "$cpu_index/torch/"; then
        echo "No NVIDIA GPU here: taking the CPU build of torch from $cpu_index"
        pip_options+=(--extra-index-url "$cpu_index")
    fi
fi
echo "Installing StageMesh and what it needs; the first time this takes a few minutes"
"$venv/bin/python" -m pip install "${pip_options[@]}" --disable-pip-version-check -e ".[$extra]"
