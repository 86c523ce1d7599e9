"""`stagemesh quantize MODEL OUT`: a copy of a model whose weights take 8 or 4 bits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stagemesh.cli.worker import require_worker_extra
from stagemesh.options import check_options, option, parse_options
from stagemesh.quantization import parse_quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    model: Path = option(help="directory of the model", positional=True)
    out: Path = option(help="directory to write, new or empty", positional=True)
    scheme: str = option(
        "int8", help="int8, int4-g32, int4-g64, int4-g128; parts that differ: int4-g64,head=none"
    )

    def __post_init__(self) -> None:
        check_options(self)
        parse_quantization(self.scheme)


def run(argv: Sequence[str]) -> int:
    """Raises what is wrong with the options or the model."""
    options = parse_options(
        QuantizeOptions,
        argv,
        prog="stagemesh quantize",
        description="Writes a copy of a model whose weights take 8 or 4 bits.",
    )
    require_worker_extra()
    from stage_worker.quantise_checkpoint import quantise_checkpoint

    scheme = parse_quantization(options.scheme)
    num_bytes = quantise_checkpoint(options.model, options.out, scheme, _tell)
    print(f"{options.out}: {num_bytes / 2**20:.1f} MiB, {scheme}")
    return 0


def _tell(part: str) -> None:
    print(f"  {part}", file=sys.stderr)
