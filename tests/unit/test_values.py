"""Values are told apart by what they hold, and have no room for anything else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stagemesh.plan import SampledToken


def test_equal_values_are_one_in_a_set() -> None:
    token = SampledToken(4, 7)
    assert {token, SampledToken(4, 7), replace(token, position=5)} == {token, SampledToken(5, 7)}


def test_a_field_that_was_not_declared_cannot_be_set() -> None:
    with pytest.raises(AttributeError):
        SampledToken(4, 7).text = "seven"  # type: ignore[attr-defined]
