"""Servers of llama.cpp's RPC backend, a process each, and a model's layers spread over them.

llama-cpp-python has the backend where it was built with it, and no names for it: these are the C
functions of ggml-rpc.h.
"""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
import time
from typing import Any

_HOST = "127.0.0.1"
_ALL_LAYERS = 10_000
_CPU = 0  # enum ggml_backend_dev_type
_START_TIMEOUT_S = 30.0


class RpcServers:
    """None of them with `num_servers` 0: then the model is this process' own."""

    def __init__(self, num_servers: int, threads: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        endpoints = [self._start(threads) for _ in range(num_servers)]
        self._devices = _devices(endpoints)
        self._shares = (ctypes.c_float * 128)(*[1.0] * num_servers)

    def give_layers(self, params: Any) -> None:
        """Changes the parameters of a model to be loaded."""
        if not self._processes:
            return
        params.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        params.n_gpu_layers = _ALL_LAYERS
        params.tensor_split = ctypes.cast(self._shares, type(params.tensor_split))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self, threads: int) -> str:
        with socket.create_server((_HOST, 0)) as free:
            port = free.getsockname()[1]
        endpoint = f"{_HOST}:{port}"
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.llama_cpp_rpc", endpoint, str(threads)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._processes.append(process)
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                socket.create_connection((_HOST, port), timeout=1.0).close()
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise SystemExit(f"no RPC server at {endpoint}") from None
                time.sleep(0.1)
            else:
                return endpoint


def _devices(endpoints: list[str]) -> Any:
    """A list of them that ends with NULL."""
    devices = (ctypes.c_void_p * (len(endpoints) + 1))()
    for number, endpoint in enumerate(endpoints):
        add = _function("ggml_backend_rpc_add_server", ctypes.c_void_p, [ctypes.c_char_p])
        get = _function(
            "ggml_backend_reg_dev_get", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]
        )
        devices[number] = get(add(endpoint.encode()), 0)
    return devices


def _serve(endpoint: str, threads: int) -> None:
    by_type = _function("ggml_backend_dev_by_type", ctypes.c_void_p, [ctypes.c_int])
    devices = (ctypes.c_void_p * 1)(by_type(_CPU))
    arguments = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
    start = _function("ggml_backend_rpc_start_server", None, [*arguments, ctypes.c_void_p])
    start(endpoint.encode(), None, threads, 1, devices)


def _function(name: str, result: Any, arguments: list[Any]) -> Any:
    from llama_cpp._ggml import libggml

    function = getattr(libggml, name)
    function.restype, function.argtypes = result, arguments
    return function


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
