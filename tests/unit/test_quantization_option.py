"""What --quantization may say, and what it means for each part."""

from __future__ import annotations

import pytest

from stagemesh.errors import ConfigError
from stagemesh.quantization import AS_STORED, SCHEMES, group_size, parse_quantization


@pytest.mark.parametrize("name", SCHEMES)
def test_one_scheme_for_all(name: str) -> None:
    parsed = parse_quantization(name)
    assert str(parsed) == name
    assert parsed.of_part("layer.7") == name
    assert parsed.of_part("head") == ("int8" if name.startswith("int4") else name)


def test_parts_that_differ() -> None:
    parsed = parse_quantization(" INT4, head = none, 0:2=int8,1:3=none ")
    assert str(parsed) == "int4-g64,head=none,0:2=int8,1:3=none"
    assert [parsed.of_part(f"layer.{i}") for i in range(4)] == ["int8", "none", "none", "int4-g64"]
    assert parsed.of_part("head") == "none"
    assert parse_quantization(str(parsed)) == parsed
    assert parse_quantization("auto") == AS_STORED
    assert group_size("int4-g32") == 32


@pytest.mark.parametrize("text", ["", "int5", "int8,head", "int8,2:1=none", "int8,head=fp4", "g64"])
def test_what_is_wrong_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--quantization"):
        parse_quantization(text)
