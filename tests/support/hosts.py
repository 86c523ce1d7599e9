"""Several hosts on this one: network namespaces, joined by a switch in one of their own.

The machine's own network is not touched, nor do its firewall rules apply. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from google.protobuf import json_format
from support.paths import REPO
from support.waiting import wait_until

from protos import mesh_pb2

_STATUS = """
import sys, grpc
from protos import mesh_pb2, mesh_pb2_grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = mesh_pb2_grpc.SchedulerStub(channel)
    reply = stub.GetStatus(mesh_pb2.GetStatusRequest(), timeout=5)
sys.stdout.buffer.write(reply.SerializeToString())
"""
_STOP_TIMEOUT_S = 20.0
# Made again and again: adding what is there changes nothing.
_TABLE = (
    "add table inet faults;"
    "add chain inet faults input { type filter hook input priority 0; };"
    "add chain inet faults output { type filter hook output priority 0; };"
)


@dataclass
class Host:
    """One namespace with one interface; what runs in it is ended with it."""

    namespace: str
    address: str
    scratch: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: str) -> None:
        """`stagemesh ARGUMENTS` in the background; its log is kept under `name`."""
        with self._log(name).open("ab") as sink:
            self.processes[name] = subprocess.Popen(
                self._inside("-m", "stagemesh.cli.main", *arguments),
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                cwd=REPO,
            )

    def run(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """What `stagemesh ARGUMENTS` prints here."""
        command = self._inside("-m", "stagemesh.cli.main", *arguments)
        done = subprocess.run(
            command, cwd=REPO, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def spawn(self, *arguments: str) -> subprocess.Popen[str]:
        """`stagemesh ARGUMENTS`, whose output the caller reads."""
        command = self._inside("-m", "stagemesh.cli.main", *arguments)
        return subprocess.Popen(
            command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def status(self, scheduler: str) -> mesh_pb2.GetStatusResponse | None:
        """None where no scheduler answers."""
        done = subprocess.run(
            self._inside("-c", _STATUS, scheduler), cwd=REPO, capture_output=True, check=False
        )
        if done.returncode != 0:
            return None
        return mesh_pb2.GetStatusResponse.FromString(done.stdout)

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        """The exit code. All that leads to the command is replaced by it: the pid is its own."""
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(timeout=_STOP_TIMEOUT_S)

    def set_cable(self, plugged_in: bool) -> None:
        """Unplugged, packets vanish; no peer is told."""
        _ip("-n", self.namespace, "link", "set", "eth0", "up" if plugged_in else "down")

    def drop(self, peer: Host, port: int | None = None) -> None:
        """Packets from and to `peer` vanish from now on; with `port`, of connections to it there or
        here only."""
        for chain, where, other in (("input", "saddr", peer), ("output", "daddr", peer)):
            match = f"ip {where} {other.address}"
            if port is None:
                self._nft(f"add rule inet faults {chain} {match} drop")
            else:
                self._nft(f"add rule inet faults {chain} {match} tcp dport {port} drop")
                self._nft(f"add rule inet faults {chain} {match} tcp sport {port} drop")

    def close_port(self, port: int) -> None:
        """Whoever sends to the port is told at once that nobody is there (RST)."""
        self._nft(f"add rule inet faults input tcp dport {port} reject with tcp reset")

    def open_all(self) -> None:
        """As before `drop` and `close_port`."""
        self._nft("flush chain inet faults input; flush chain inet faults output")

    def limit_rate(self, rate: str | None) -> None:
        """What leaves here is no faster than `rate` ("2mbit"); None for no limit. A bucket that
        holds a little more than a packet, and a queue of a second behind it."""
        device = ("-n", self.namespace, "qdisc")
        if rate is None:
            _tc(*device, "del", "dev", "eth0", "root")
        else:
            bucket = ("tbf", "rate", rate, "burst", "16k", "latency", "1s")
            _tc(*device, "replace", "dev", "eth0", "root", *bucket)

    def inside(self, *command: str) -> tuple[str, ...]:
        """The command as one that runs on this host."""
        return ("ip", "netns", "exec", self.namespace, *command)

    def _nft(self, rules: str) -> None:
        done = subprocess.run(
            self.inside("nft", _TABLE + rules), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"nft {rules}: {done.stderr}"

    def logs(self) -> str:
        texts = (path.read_text()[-3000:] for path in sorted(self.scratch.glob("*.log")))
        return "\n".join(texts)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def _inside(self, *arguments: str) -> list[str]:
        """Each host has its own name too, as hosts do: workers are known by it."""
        named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.namespace)
        return [*self.inside(*named), sys.executable, *arguments]

    def _log(self, name: str) -> Path:
        return self.scratch / f"{self.namespace}-{name}.log"


@contextlib.contextmanager
def hosts(num: int, scratch: Path) -> Iterator[list[Host]]:
    """`num` hosts in one network; skips where this machine does not allow that."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and the ip command, for network namespaces")
    label = f"sm-{secrets.token_hex(3)}"
    switch = f"{label}-switch"
    if subprocess.run(["ip", "netns", "add", switch], capture_output=True, check=False).returncode:
        pytest.skip("needs network namespaces, which this machine does not allow")
    made = [Host(f"{label}-{n}", f"10.77.0.{n + 1}", scratch) for n in range(num)]
    try:
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for n, host in enumerate(made):
            _plug_in(host, switch, f"port{n}")
        yield made
    finally:
        for host in made:
            host.end()
        for name in (switch, *(host.namespace for host in made)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _plug_in(host: Host, switch: str, port: str) -> None:
    inside = ("-n", host.namespace)
    _ip("netns", "add", host.namespace)
    pair = ("eth0", "type", "veth", "peer", "name", port, "netns", switch)
    _ip(*inside, "link", "add", *pair)
    _ip("-n", switch, "link", "set", port, "master", "br0", "up")
    _ip(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
    _ip(*inside, "link", "set", "lo", "up")
    _ip(*inside, "link", "set", "eth0", "up")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _tc(*arguments: str) -> None:
    done = subprocess.run(["tc", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"tc {' '.join(arguments)}: {done.stderr}"


def wait_for_stages(
    host: Host, scheduler: str, num_stages: int, timeout_s: float = 60.0
) -> mesh_pb2.GetStatusResponse:
    """Until a pipeline of so many stages serves; its status then, as seen from `host`."""
    seen: list[mesh_pb2.GetStatusResponse] = []

    def serves() -> bool:
        status = host.status(scheduler)
        if status is None:
            return False
        seen.append(status)
        return any(p.serving and len(p.worker_ids) == num_stages for p in status.pipelines)

    wait_until(serves, timeout_s, f"{num_stages} stages to serve")
    return seen[-1]


def describe(status: mesh_pb2.GetStatusResponse) -> str:
    return json_format.MessageToJson(status)
