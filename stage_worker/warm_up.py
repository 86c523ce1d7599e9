"""A stage's first step, taken before anybody waits for it.

The first pass through a process's kernels takes many times as long as those after it. A worker that
replaces another would have every stream wait for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stage_worker.tenancy import Joining
from stagemesh.frames import hidden_bytes
from stagemesh.plan import BlockUpdate, Epoch, Row, SequenceState, Span, Step
from stagemesh.sampling import SamplingSpec

if TYPE_CHECKING:
    from stage_worker.executor import StageExecutor
    from stage_worker.ranked_stage import RankedStage

_MAX_TOKENS = 16
_NOBODY = "warm-up"


def warm_up(executor: StageExecutor | RankedStage, span: Span) -> None:
    """Executes a short prompt of nobody; then nothing is held.

    Block 0 is written to, so this comes before the stage has joined an epoch.
    """
    spec, facts = executor.spec, executor.facts
    stage = 0 if span.start == 0 else 1
    num_stages = stage + (1 if span.end == spec.num_layers else 2)
    num_tokens = min(_MAX_TOKENS, facts.block_size_tokens)
    prompt = (0,) * num_tokens
    row = Row(
        sequence_id=0,
        run=0,
        start=0,
        num_tokens=num_tokens,
        token_ids=prompt,
        block_updates=(BlockUpdate(0, (0,)),),
        first_stage=0,
        end_stage=num_stages,
        sample_positions=(num_tokens - 1,),
        state=SequenceState(prompt, (), SamplingSpec(), num_tokens + 1),
    )
    num_bytes = hidden_bytes(executor.wire_dtype, num_tokens, spec.hidden_size) if stage else 0
    executor.join(
        Joining(
            pipeline_id=_NOBODY,
            stage=stage,
            num_stages=num_stages,
            blocks=facts.blocks_for(1),
        )
    )
    step = Step(_NOBODY, Epoch(0, 1), 0, (row,))
    executor.execute(step, bytes(num_bytes), executor.wire_dtype)
    executor.forget()
