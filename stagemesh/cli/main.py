"""Which subcommand runs: `stagemesh --help`, `--version`, and one line for whatever goes wrong.

A subcommand's module is imported when it is asked for, so that help needs neither grpc nor torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import stagemesh
from stagemesh.errors import ConfigError, StageMeshError

# name: (module with `run(argv) -> exit code`, help)
COMMANDS = {
    "up": ("stagemesh.cli.up", "start a whole mesh on this host"),
    "demo": ("stagemesh.cli.demo", "start a mesh with the demo model, let it tell a story, stop"),
    "generate": ("stagemesh.cli.generate", "stream a completion to the terminal"),
    "chat": ("stagemesh.cli.chat", "talk with the model"),
    "status": ("stagemesh.cli.status", "show workers, pipelines, queue and speed"),
    "bench": ("stagemesh.cli.bench", "measure how fast a server is"),
    "trace": ("stagemesh.cli.trace", "record what stages do, as a file for Perfetto"),
    "drain": ("stagemesh.cli.drain", "hand the layers of a worker over and end it"),
    "quantize": ("stagemesh.cli.quantize", "write a copy of a model with weights of 8 or 4 bits"),
    "health": ("stagemesh.cli.health", "ask one service whether it serves"),
    "gateway": ("stagemesh.cli.gateway", "run a gateway: text in, text out"),
    "scheduler": ("stagemesh.cli.scheduler", "run the scheduler: who runs next"),
    "worker": ("stagemesh.cli.worker", "run a stage worker: a span of layers on a device"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a failure, 2 for a wrong option, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"stagemesh {stagemesh.__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        print(f"stagemesh: no command {name!r} (see stagemesh --help)", file=sys.stderr)
        return 2
    return _run(name, rest)


def _run(name: str, argv: Sequence[str]) -> int:
    # What gRPC's core notes about connections is no news to a user of the command.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        return int(importlib.import_module(COMMANDS[name][0]).run(argv))
    except StageMeshError as error:
        print(f"stagemesh {name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing more may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: stagemesh COMMAND [OPTIONS]",
            "",
            "Serves a large language model cut into pipeline stages.",
            "",
            *lines,
            "",
            "stagemesh COMMAND --help tells a command's options. Each may also be given as a",
            "STAGEMESH_* variable or in a TOML file (--config FILE, or STAGEMESH_CONFIG).",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
