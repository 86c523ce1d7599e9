"""The short form of `python -m benchmarks.recovery.kills`."""

from __future__ import annotations

import pytest

from benchmarks.recovery.kills import run
from benchmarks.recovery.parts_mesh import PartsMesh

pytestmark = pytest.mark.timeout(240)
SEED = 20261121


async def test_no_request_is_lost_in_eight_random_kills(mesh: PartsMesh) -> None:
    tally = await run(mesh, num_kills=8, streams=12, seed=SEED, kinds=())
    print(tally.summary())
    assert tally.num_kills >= 8
    assert tally.num_streams >= 12
    assert tally.faults == []
