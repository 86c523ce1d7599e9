#!/usr/bin/env bash
# All tests, by the interpreter that is named. What only computes runs on all cores at once, file by
# file, and beside it what mostly waits for containers. What runs meshes has the machine to itself:
# two meshes at a time were no faster on two cores.
set -u -m # a job of its own can be interrupted
python=$1
code=0

run() {
    "$python" -m pytest "$@"
    case $? in
    0) ;;
    2) exit 130 ;; # interrupted
    *) code=1 ;;
    esac
}

log=$(mktemp)
"$python" -m pytest tests/compose >"$log" 2>&1 &
containers=$!
finish() {
    if [ -n "$containers" ]; then
        kill -INT "$containers" 2>/dev/null
        wait "$containers"
    fi
    rm -f "$log"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

run --numprocesses auto --maxprocesses 8 --dist loadfile tests/unit tests/simulation tests/equivalence
wait "$containers" || code=1
containers=
cat "$log"
run tests/integration tests/chaos
exit "$code"
