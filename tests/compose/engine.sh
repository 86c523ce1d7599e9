#!/usr/bin/env bash
# A Docker engine and a base image for the compose tests, on machines that lack one or both.
#
#   engine.sh install   packages, for faults of networks too (Debian, Ubuntu; needs root)
#   engine.sh start     an engine, unless one answers
#   engine.sh base      the image that the Dockerfile starts from, unless it is here or can be pulled
#   engine.sh stop      the engine that `start` started, and nothing else
#
# Where no image can be pulled, `base` makes one under the same name: Debian's Python 3.11 from a
# package mirror, the wheels of constraints.txt as this machine's pip finds them, and a pip
# configuration that knows these wheels only. The Dockerfile is then built as users build it, and
# the build needs no network.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
STATE=${STAGEMESH_ENGINE_DIR:-/var/tmp/stagemesh-engine}
BASE_IMAGE=python:3.11-slim-bookworm
DEBIAN_IMAGE=stagemesh-test-debian
PYTHON=${PYTHON:-python3}

answers() { docker info >/dev/null 2>&1; }

install_packages() {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        docker.io docker-compose debootstrap iptables nftables >/dev/null
}

start() {
    if answers; then
        echo "a Docker engine answers"
        return
    fi
    command -v dockerd >/dev/null || { echo "no dockerd here: run '$0 install'" >&2; exit 1; }
    mkdir -p "$STATE"
    nohup dockerd >"$STATE/dockerd.log" 2>&1 </dev/null &
    local pid=$!
    for _ in $(seq 120); do
        if answers; then
            echo "$pid" >"$STATE/dockerd.pid"
            echo "started a Docker engine (pid $pid, log $STATE/dockerd.log)"
            remove_leftovers
            return
        fi
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.5
    done
    tail -n 20 "$STATE/dockerd.log" >&2
    echo "the Docker engine did not start" >&2
    exit 1
}

# Of tests that were killed: an engine starts their containers again, for ever.
remove_leftovers() {
    local mine=(--filter label=com.docker.compose.project --filter name=stagemesh-test-)
    docker ps -aq "${mine[@]}" | xargs -r docker rm -f -v >/dev/null
    docker network ls -q "${mine[@]}" | xargs -r docker network rm >/dev/null
    docker volume ls -q "${mine[@]}" | xargs -r docker volume rm >/dev/null
}

stop() {
    [ -f "$STATE/dockerd.pid" ] || { echo "no engine of ours is running"; return; }
    local pid
    pid=$(cat "$STATE/dockerd.pid")
    rm -f "$STATE/dockerd.pid"
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ] || return 0
    kill "$pid"
    for _ in $(seq 60); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.5
    done
    echo "the Docker engine (pid $pid) does not end" >&2
    exit 1
}

has_image() { docker image inspect "$1" >/dev/null 2>&1; }

base() {
    local made="" wanted
    wanted=$({ requirements; grep -v '^#' "$REPO/constraints.txt"; } | sha256sum | cut -c1-16)
    if has_image "$BASE_IMAGE"; then
        made=$(docker image inspect -f '{{index .Config.Labels "stagemesh.wheels"}}' "$BASE_IMAGE")
        if [ -z "$made" ] || [ "$made" = "$wanted" ]; then
            echo "$BASE_IMAGE is here"
            return
        fi
    elif timeout 300 docker pull -q "$BASE_IMAGE" >/dev/null 2>&1; then
        echo "pulled $BASE_IMAGE"
        return
    fi
    has_image "$DEBIAN_IMAGE" || make_debian
    make_base "$wanted"
}

make_debian() {
    local root
    root=$(mktemp -d)
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm \
        "$root" >"$root.log" 2>&1 || { tail -n 20 "$root.log" >&2; exit 1; }
    rm -rf "$root"/var/cache/apt "$root"/var/lib/apt/lists
    tar -C "$root" -c . | docker import - "$DEBIAN_IMAGE" >/dev/null
    rm -rf "$root" "$root.log"
}

make_base() { # the label that the image gets
    local context
    context=$(mktemp -d)
    requirements >"$context/requirements.txt"
    "$PYTHON" -m pip download -qq --disable-pip-version-check --only-binary :all: --python-version 3.11 \
        -d "$context/wheels" -c "$REPO/constraints.txt" -r "$context/requirements.txt"
    cat >"$context/Dockerfile" <<DOCKERFILE
FROM $DEBIAN_IMAGE
COPY wheels /wheels
RUN printf '[global]\nno-index = true\nfind-links = /wheels\n' >/etc/pip.conf
LABEL stagemesh.wheels=$1
CMD ["python3"]
DOCKERFILE
    docker build -q -t "$BASE_IMAGE" "$context" >/dev/null
    rm -rf "$context"
    echo "made $BASE_IMAGE"
}

# Whatever the Dockerfile's pip will ask for, the build backend included.
requirements() {
    "$PYTHON" - "$REPO/pyproject.toml" <<'PYTHON'
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    content = tomllib.load(file)
project = content["project"]
print(*content["build-system"]["requires"], sep="\n")
print(*project["dependencies"], *project["optional-dependencies"]["worker"], sep="\n")
PYTHON
}

case ${1:-} in
    install) install_packages ;;
    start | base | stop) "$1" ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2 ;;
esac
