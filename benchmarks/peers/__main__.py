"""StageMesh beside other engines on one checkpoint, in turn, with ratios.

    python -m benchmarks.peers --peers transformers,ctranslate2 --dtype float32 --work /tmp/peers

The first time it makes an environment for each peer and converts the checkpoint, which takes
minutes and gigabytes (--prepare does only that); the next time it begins to measure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import OURS, PEERS, REPO, Environments
from benchmarks.peers.make_model import SIZES
from benchmarks.peers.protocol import BATCHES, DECODE_PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS
from benchmarks.peers.side_by_side import EngineFailed, EngineProcess, Measured, Wanted, compare
from stagemesh.bench import machine

# What a user would call the same precision; a peer that has none of them is left out.
_DTYPES: dict[str, dict[str, str]] = {
    "float32": dict.fromkeys(("transformers", "ctranslate2", "openvino", "llama_cpp"), "float32"),
    "int8": {"ctranslate2": "int8", "openvino": "int8", "llama_cpp": "q8_0"},
    "int4": {"openvino": "int4", "llama_cpp": "q4_0"},
}


def main() -> int:
    args = _parser().parse_args()
    environments = Environments(args.work.resolve(), args.size)
    environments.make_model()
    wanted = Wanted(args.batches, args.prompt_tokens, args.new_tokens, args.prefill, args.rounds)
    found: list[dict[str, Any]] = []
    failed = []
    for dtype in args.dtype.split(","):
        for peer in args.peers.split(","):
            peer_dtype = _DTYPES[dtype].get(peer)
            if peer_dtype is None:
                print(f"{peer} has no {dtype}", file=sys.stderr)
                continue
            try:
                found += _one(environments, peer, (dtype, peer_dtype), wanted, args)
            except (subprocess.CalledProcessError, EngineFailed) as error:
                print(f"{peer} {dtype}: {error}", file=sys.stderr)
                failed.append(peer)
    if args.out is not None:
        told = {"machine": machine.facts(sys.argv), "found": found}
        args.out.write_text(json.dumps(told, indent=2) + "\n")
    return 1 if failed else 0


def _one(
    environments: Environments,
    peer: str,
    dtypes: tuple[str, str],
    wanted: Wanted,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One peer at one precision beside ours; its row is printed as soon as it is known."""
    dtype, peer_dtype = dtypes
    environments.make_venv(peer)
    environments.convert(peer, peer_dtype)
    if args.prepare:
        return []
    options = (
        *("--model", str(environments.model)),
        *("--threads", str(args.threads), "--stages", str(args.stages)),
    )
    out = str(environments.converted(peer, peer_dtype))
    serve = environments.command(peer, "serve", *options, "--dtype", peer_dtype, "--out", out)
    lone = ("--lone-threads", str(args.lone_threads))
    ours = environments.command(OURS, "serve", *options, *lone, "--dtype", dtype)
    with EngineProcess(serve, args.threads) as theirs, EngineProcess(ours, args.threads) as mesh:
        measured = compare(theirs, mesh, wanted, _tell)
    print(_table(f"{peer} {peer_dtype}", f"stagemesh {dtype}", measured), flush=True)
    return [
        {
            "peer": peer,
            "peer_dtype": peer_dtype,
            "dtype": dtype,
            "peer_versions": _versions(environments, peer),
            "our_versions": _versions(environments, OURS),
            **each.as_dict(),
        }
        for each in measured
    ]


def _tell(measured: Measured) -> None:
    peer, ours = measured.peer[-1], measured.ours[-1]
    print(f"{measured.what}: {peer:.1f} and {ours:.1f} tokens/s", file=sys.stderr, flush=True)


def _versions(environments: Environments, peer: str) -> dict[str, str]:
    done = subprocess.run(
        environments.command(peer, "versions"),
        cwd=REPO,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    told: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return told


def _table(peer: str, ours: str, measured: list[Measured]) -> str:
    lines = [
        "",
        f"| tokens/s, median of {len(measured[0].peer)} | {peer} | {ours} | ratio | of rounds |",
        "|---|---|---|---|---|",
    ]
    for each in measured:
        ratios = [b / a for a, b in zip(each.peer, each.ours, strict=True)]
        lines.append(
            f"| {each.what} | {statistics.median(each.peer):.1f} | "
            f"{statistics.median(each.ours):.1f} | {each.ratio:.2f} | "
            f"{min(ratios):.2f} to {max(ratios):.2f} |"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--dtype", default="float32", help="float32,int8,int4")
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stages", type=int, default=1, help="processes, each with its threads")
    parser.add_argument(
        "--lone-threads",
        type=int,
        default=0,
        help="of a StageMesh stage while the other stages have nothing to do",
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--prompt-tokens", type=int, default=DECODE_PROMPT_TOKENS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--prefill", type=int, default=PREFILL_TOKENS)
    parser.add_argument(
        "--prepare", action="store_true", help="make what the first time needs, and end"
    )
    default = Path(tempfile.gettempdir(), "stagemesh-peers")
    parser.add_argument("--work", type=Path, default=default, help=f"[{default}]")
    parser.add_argument("--out", type=Path, help="a JSON file with every round")
    return parser


if __name__ == "__main__":
    sys.exit(main())
