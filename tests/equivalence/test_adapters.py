"""Adapters give the tokens of the models that they were merged into, whatever else is batched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import TinyAdapter, merged, tiny_adapter
from support.checkpoints import SIZES, TinyModel, prompts, reference_logprobs, tiny_model
from support.greedy import check_greedy
from support.stages import Chain, Live, Wish
from support.thread_ranks import ranked_chain

from stage_worker.adapter_files import adapter_identity
from stagemesh.errors import ProtocolError

# Tokens may part only where the top two are closer than this many times the noise seen.
MIN_MARGIN_OVER_NOISE = 10
ADAPTERS = [
    TinyAdapter("all", seed=1, config={"target_modules": "all-linear"}),
    # Another rank and scaling in one of the matrices of a fused layer, and one of them left out.
    TinyAdapter(
        "patterns",
        targets=("q_proj", "v_proj", "up_proj", "down_proj"),
        rank=2,
        alpha=3.0,
        scaling=3 / 2**0.5,
        ranks={"v_proj": 6},
        scalings={"v_proj": 3 / 6**0.5, "down_proj": 5 / 2**0.5},
        config={
            "use_rslora": True,
            "rank_pattern": {"self_attn.v_proj": 6},
            "alpha_pattern": {"down_proj": 5},
        },
        seed=2,
    ),
    # In few layers, so that some stages have nothing of it; in the type that files usually have.
    TinyAdapter(
        "few-layers",
        layers=(1, 2),
        config={"target_modules": r".*\.(self_attn|mlp)\..*_proj"},
        dtype=torch.bfloat16,
        seed=3,
    ),
]
# Matrices that files have as one are adapted as one; of a mixture of experts, what is beside it.
FUSED = TinyAdapter(
    "fused",
    targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    config={"target_modules": "all-linear"},
)
DENSE_PARTS = TinyAdapter("dense-parts", seed=4)
MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "mlp_only_layers": [1],
}
CASES = [
    (TinyModel("llama", "LlamaConfig", {"attention_bias": True}, 0), ADAPTERS),
    (
        TinyModel("qwen3", "Qwen3Config", {"head_dim": 24, "tie_word_embeddings": True}, 1),
        ADAPTERS,
    ),
    (TinyModel("phi3", "Phi3Config", {"pad_token_id": 0}, 2), [FUSED]),
    (TinyModel("qwen3-moe", "Qwen3MoeConfig", MIXTURE, 3), [DENSE_PARTS]),
]


def name_of(entry: tuple[TinyModel, list[TinyAdapter]]) -> str:
    return entry[0].name


of_one_model = pytest.mark.parametrize("case", CASES[:1], ids=name_of, indirect=True)


@dataclass
class Case:
    """A model, adapters by identity, and what each amounts to; "" is the model alone."""

    directory: Path
    adapters: dict[str, Path]
    references: dict[str, Any]

    def chain(self, num_stages: int = 1, **options: Any) -> Chain:
        return Chain(self.directory, num_stages, adapters=self.adapters, **options)

    def wishes(self, num: int, num_tokens: int, seed: int) -> list[Wish]:
        """Of all adapters and of none, in turn."""
        texts = prompts(num, (5, 19, 33), SIZES["vocab_size"], seed)
        chosen = list(self.references)
        return [
            Wish(text, num_tokens, adapter=chosen[i % len(chosen)]) for i, text in enumerate(texts)
        ]


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model, adapters = request.param
    directory = tmp_path_factory.mktemp("adapters")
    base = tiny_model(model, directory)
    case = Case(directory / model.name, {}, {"": base})
    for adapter in adapters:
        path = tiny_adapter(adapter, base, directory)
        identity = adapter_identity(path)
        case.adapters[identity] = path
        case.references[identity] = merged(adapter, base)
    return case


def check(case: Case, live: Live) -> None:
    check_greedy(case.references[live.wish.adapter], live, MIN_MARGIN_OVER_NOISE)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_32_rows_of_all_adapters_and_of_none_side_by_side(case: Case, num_stages: int) -> None:
    chain = case.chain(num_stages, seed=num_stages)
    lives = chain.run(case.wishes(32, 10, seed=num_stages), chunk=7 if num_stages > 1 else None)
    assert len(lives) == 32
    for live in lives:
        check(case, live)


def test_layers_that_are_split_over_ranks(case: Case) -> None:
    sizes, wishes = (2, 1), case.wishes(8, 10, seed=8)
    with ranked_chain(case.directory, sizes, adapters=case.adapters) as chain:
        for live in chain.run(wishes, chunk=7):
            check(case, live)


@of_one_model
def test_adapters_change_what_is_said(case: Case) -> None:
    """Else all of this would say nothing."""
    (prompt,) = prompts(1, (19,), SIZES["vocab_size"], 9)
    lives = case.chain().run([Wish(prompt, 8, adapter=each) for each in case.references])
    assert len({tuple(live.tokens) for live in lives}) == len(case.references)


@of_one_model
def test_a_row_of_one_adapter_alone(case: Case) -> None:
    for live in case.chain(2).run(case.wishes(4, 12, seed=4), max_rows=1):
        check(case, live)


@of_one_model
def test_a_stage_that_is_rebuilt_has_the_adapter_again(case: Case) -> None:
    """All of its KV anew, from what the stage before has logged."""
    chain = case.chain(3)
    lives = [chain.start(wish) for wish in case.wishes(4, 10, seed=5)]

    def step() -> None:
        rows = [live.row(3, None) for live in lives]
        for live, row, result in zip(lives, rows, chain.execute(rows), strict=True):
            live.take(row, result)

    for _ in range(4):
        step()
    chain.lose([1])
    for live in lives:
        live.first = True
    chain.execute([live.rebuild_row(0, live.computed, range(1, 2), 1) for live in lives])
    for live in lives:
        live.first = False
    for _ in range(6):
        step()
    for live in lives:
        check(case, live)


@of_one_model
@pytest.mark.parametrize(("quantization", "share"), [("int8", 0.2), ("int4-g32", 0.8)])
def test_quantised_weights_get_what_the_adapter_adds(
    case: Case, quantization: str, share: float
) -> None:
    """What the prompts' tokens are said to be is nearer to what the adapter amounts to than that is
    to the model, by far; and rows of none are as they are without adapters, bit for bit."""
    (prompt,) = prompts(1, (60,), SIZES["vocab_size"], 6)
    wishes = [Wish(prompt, 1, prompt_logprobs=True, adapter=each) for each in case.references]
    bare, *lives = case.chain(quantization=quantization).run(wishes)
    (plain,) = Chain(case.directory, quantization=quantization).run(wishes[:1])
    assert bare.prompt_logprobs == plain.prompt_logprobs
    after = torch.tensor(prompt[1:])[:, None]
    base = reference_logprobs(case.references[""], prompt)[:-1].gather(1, after)[:, 0]
    for live in lives:
        merged_model = case.references[live.wish.adapter]
        expected = reference_logprobs(merged_model, prompt)[:-1].gather(1, after)[:, 0]
        got = torch.tensor([token.logprob for token in live.prompt_logprobs])
        error, effect = ((x - expected).abs().mean() for x in (got, base))
        assert error < share * effect, f"{error} of {effect}"


@of_one_model
def test_batch_invariance_is_kept(case: Case) -> None:
    """Bit for bit: alone or among 16, on one stage or three, in one piece or in chunks."""
    wishes = case.wishes(16, 6, seed=7)
    together = case.chain(3, batch_invariant=True).run(wishes, chunk=5)
    alone = case.chain(1, batch_invariant=True).run(wishes[:8], max_rows=1)
    for live, other in zip(alone, together, strict=False):
        assert live.sampled == other.sampled


@of_one_model
def test_an_adapter_that_a_stage_has_not_is_refused(case: Case) -> None:
    chain = case.chain()
    with pytest.raises(ProtocolError, match="adapter 1234 is not loaded here"):
        chain.run([Wish([5, 6], 2, adapter="1234")])


@of_one_model
def test_a_stage_holds_the_matrices_of_its_own_layers_only(case: Case) -> None:
    with_adapters, without = case.chain(5), Chain(case.directory, 5)
    more = [
        one.facts.weight_bytes - other.facts.weight_bytes
        for one, other in zip(with_adapters.stages, without.stages, strict=True)
    ]
    # Of layers 1 and 2 there are three adapters, of the others two.
    assert 0 < more[0] == more[3] == more[4] < more[1] == more[2]
