"""A worker whose host gets another address tells the scheduler when it dials again."""

from __future__ import annotations

import pytest

from stage_worker import own_address
from stage_worker.own_address import OwnAddress
from stagemesh.addresses import is_of_this_host

# Kept for documentation: no host has it.
FOREIGN = "192.0.2.1"


def test_which_addresses_are_of_this_host() -> None:
    assert is_of_this_host("127.0.0.1")
    assert not is_of_this_host(FOREIGN)


async def test_an_address_that_this_host_lost_is_found_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = iter([f"{FOREIGN}:50052", "127.0.0.1:50052", f"{FOREIGN}:1"])
    monkeypatch.setattr(own_address, "advertised_address", lambda *_: next(found))
    address = OwnAddress("0.0.0.0:50052", "", "127.0.0.1:50050")
    assert await address.now() == f"{FOREIGN}:50052"
    assert await address.now() == "127.0.0.1:50052"
    assert await address.now() == "127.0.0.1:50052"


@pytest.mark.parametrize(
    ("bound", "advertise"), [("0.0.0.0:50052", f"{FOREIGN}:6000"), (f"{FOREIGN}:6000", "")]
)
async def test_what_the_operator_told_stays(bound: str, advertise: str) -> None:
    address = OwnAddress(bound, advertise, "127.0.0.1:50050")
    assert [await address.now() for _ in range(2)] == [f"{FOREIGN}:6000"] * 2
