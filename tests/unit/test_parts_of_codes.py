"""A rank's part of a matrix that files hold quantised: the codes of its outputs and inputs."""

from __future__ import annotations

import pytest
import torch

from stage_worker.quantise import to_int4, to_int8
from stage_worker.sharding import ALL, EVERYTHING, Part
from stage_worker.weight_source import Codes, part_of
from stagemesh.errors import ConfigError

NUM_OUTPUTS, NUM_INPUTS = 12, 192


class CodesOf:
    """A WeightSource of codes in memory."""

    shape = (NUM_OUTPUTS, NUM_INPUTS)

    def __init__(self, codes: Codes, bits: int, group_size: int) -> None:
        self._codes, self.bits, self.group_size = codes, bits, group_size

    def codes(self, start: int, end: int) -> Codes:
        codes = self._codes
        return Codes(codes.values[start:end], codes.scales[start:end], codes.zeros[start:end])

    def dense(self, start: int, end: int) -> torch.Tensor:
        return self.codes(start, end).dense()[:, :NUM_INPUTS]


def source(bits: int) -> CodesOf:
    rows = torch.randn(NUM_OUTPUTS, NUM_INPUTS, generator=torch.Generator().manual_seed(0))
    codes = to_int8(rows) if bits == 8 else to_int4(rows, 64)
    return CodesOf(codes, bits, NUM_INPUTS if bits == 8 else 64)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "part", [Part(slice(3, 9), ALL), Part(ALL, slice(64, 192)), Part(slice(6, 12), slice(0, 64))]
)
def test_codes_and_floats_are_those_of_the_place(bits: int, part: Part) -> None:
    whole = source(bits)
    mine = part_of(whole, part, "w")
    wanted = whole.dense(0, NUM_OUTPUTS)[part.rows, part.columns]
    assert mine.shape == tuple(wanted.shape)
    assert mine.group_size == (mine.shape[1] if bits == 8 else 64)
    assert torch.equal(mine.dense(1, 4), wanted[1:4])
    assert torch.equal(mine.codes(1, 4).dense(), wanted[1:4])


def test_a_group_that_would_be_cut_apart_is_named() -> None:
    with pytest.raises(ConfigError, match=r"o_proj.* every 64 inputs.* cut at 96"):
        part_of(source(4), Part(ALL, slice(96, 192)), "o_proj")
    assert part_of(source(8), Part(ALL, slice(96, 192)), "o_proj").shape == (12, 96)


def test_all_of_a_matrix_is_the_matrix() -> None:
    whole = source(4)
    assert part_of(whole, EVERYTHING, "w") is whole
