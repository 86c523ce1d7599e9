"""Hidden states as they travel: what is lost on the way, and what must not be."""

from __future__ import annotations

import pytest
import torch
from support.paths import DEMO_MODEL
from support.stages import Chain, Wish

from stage_worker.options import WorkerOptions
from stage_worker.payload import hidden_as_bytes, hidden_from_bytes
from stagemesh.errors import ConfigError, ProtocolError
from stagemesh.frames import hidden_bytes

CPU = torch.device("cpu")
TYPES = ("float32", "bfloat16", "float16", "int8")
# How far a number may be off, by the largest of its token.
ERRORS = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-10, "int8": 0.5 / 127}


def some_hidden(num_tokens: int = 7) -> torch.Tensor:
    """Tokens of very different sizes."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.logspace(-3, 3, num_tokens)[:, None]
    return torch.randn(num_tokens, 64, generator=generator) * sizes


def passed(hidden: torch.Tensor, wire_dtype: str) -> torch.Tensor:
    shape = (hidden.shape[0], hidden.shape[1])
    payload = bytes(hidden_as_bytes(hidden, wire_dtype))
    assert len(payload) == hidden_bytes(wire_dtype, *shape)
    return hidden_from_bytes(payload, wire_dtype, shape, torch.float32, CPU)


@pytest.mark.parametrize("wire_dtype", TYPES)
def test_a_number_is_off_by_little(wire_dtype: str) -> None:
    hidden = some_hidden()
    off = (passed(hidden, wire_dtype) - hidden).abs().amax(dim=1)
    assert (off <= ERRORS[wire_dtype] * 1.001 * hidden.abs().amax(dim=1)).all()


@pytest.mark.parametrize("wire_dtype", TYPES)
def test_what_a_token_becomes_depends_on_it_alone(wire_dtype: str) -> None:
    hidden = some_hidden()
    together = passed(hidden, wire_dtype)
    alone = torch.cat([passed(token[None], wire_dtype) for token in hidden])
    assert torch.equal(together, alone)
    assert torch.equal(passed(together, wire_dtype), together) or wire_dtype == "int8"


@pytest.mark.parametrize("wire_dtype", TYPES)
def test_what_is_not_finite_stays_so(wire_dtype: str) -> None:
    hidden = some_hidden(4)
    hidden[1, 5], hidden[2, 0], hidden[3] = float("nan"), float("inf"), 0.0
    came = passed(hidden, wire_dtype)
    assert torch.isfinite(came).all(dim=1).tolist() == [True, False, False, True]
    assert (came[3] == 0).all()


@pytest.mark.parametrize("wire_dtype", TYPES)
def test_nothing_at_all_and_the_wrong_amount(wire_dtype: str) -> None:
    assert passed(torch.empty(0, 64), wire_dtype).shape == (0, 64)
    with pytest.raises(ProtocolError, match="take"):
        hidden_from_bytes(b"1234", wire_dtype, (1, 64), torch.float32, CPU)


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "int8"])
def test_stages_speak_as_they_are_told(wire_dtype: str) -> None:
    wish = Wish(prompt=[0, 31, 57, 200], max_tokens=12)
    exact = Chain(DEMO_MODEL, 2).run([wish])[0].tokens
    lossy = Chain(DEMO_MODEL, 2, wire_dtype=wire_dtype).run([wish])[0].tokens
    assert len(lossy) == len(exact)
    assert lossy[: len(wish.prompt) + 2] == exact[: len(wish.prompt) + 2]


def test_a_stage_takes_its_own_type_only() -> None:
    chain = Chain(DEMO_MODEL, 2)
    other = Chain(DEMO_MODEL, 2, wire_dtype="bfloat16")
    chain.stages[1] = other.stages[1]
    with pytest.raises(ProtocolError, match=r"float32.*bfloat16"):
        chain.run([Wish(prompt=[0, 31], max_tokens=1)])


def test_a_lossy_wire_and_batch_invariance_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="--wire-dtype"):
        WorkerOptions(model=DEMO_MODEL, batch_invariant=True, wire_dtype="int8")
    WorkerOptions(model=DEMO_MODEL, batch_invariant=True, wire_dtype="float32")
