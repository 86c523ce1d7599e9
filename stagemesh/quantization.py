"""What `--quantization` says: how the weights of which part of a model are held.

    auto          as the files have them
    none          as numbers of --dtype
    int8          8 bits a weight, a scale for each output; activations 8 bits, a scale for each row
    int4-g64      4 bits a weight, a scale and a zero point for each 64 inputs (or 32, or 128)

One scheme for all layers, and after commas what differs: "int4-g64,head=none,0:2=int8". Part of a
pipeline's numerics, so the text has one spelling. Knows nothing of tensors and files.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.errors import ConfigError
from stagemesh.option_values import read_span
from stagemesh.plan import Span

AUTO = "auto"
NONE = "none"
INT8 = "int8"
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64
SCHEMES = (AUTO, NONE, INT8, *(f"int4-g{size}" for size in GROUP_SIZES))


@dataclass(frozen=True, slots=True)
class Quantization:
    """`spans` are layers that differ from `layers`; where two overlap, the later one counts."""

    layers: str = AUTO
    head: str = AUTO
    spans: tuple[tuple[Span, str], ...] = ()

    def of_part(self, part: str) -> str:
        """The scheme of "layer.<i>" or "head"."""
        if part == "head":
            return self.head
        layer = int(part.removeprefix("layer."))
        holding = [scheme for span, scheme in self.spans if span.start <= layer < span.end]
        return holding[-1] if holding else self.layers

    def __str__(self) -> str:
        head = "" if self.head == _default_head(self.layers) else f",head={self.head}"
        spans = (f",{span.start}:{span.end}={scheme}" for span, scheme in self.spans)
        return self.layers + head + "".join(spans)


AS_STORED = Quantization()


def parse_quantization(text: str) -> Quantization:
    """Raises ConfigError that names the option."""
    first, *rest = (word.strip() for word in text.split(","))
    layers = _scheme(first)
    head = _default_head(layers)
    spans: list[tuple[Span, str]] = []
    for word in rest:
        part, equals, scheme = (piece.strip() for piece in word.partition("="))
        if not equals:
            raise ConfigError(f"--quantization: {word!r} must be head=SCHEME or FIRST:END=SCHEME")
        if part == "head":
            head = _scheme(scheme)
        else:
            spans.append((_span(part), _scheme(scheme)))
    return Quantization(layers, head, tuple(spans))


def group_size(scheme: str) -> int:
    """Of "int4-g<size>"."""
    return int(scheme.removeprefix("int4-g"))


def _scheme(name: str) -> str:
    name = name.lower()
    name = f"int4-g{DEFAULT_GROUP_SIZE}" if name == "int4" else name
    if name not in SCHEMES:
        raise ConfigError(f"--quantization must be of {', '.join(SCHEMES)}, not {name!r}")
    return name


def _default_head(layers: str) -> str:
    """Logits suffer most from 4 bits, and the head is a small part of a model that needs them."""
    return INT8 if layers.startswith("int4") else layers


def _span(text: str) -> Span:
    try:
        return read_span(text)
    except ValueError as error:
        raise ConfigError(f"--quantization: {text!r} {error}") from None
