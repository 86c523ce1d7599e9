"""Hypothesis strategies for every value of the plan."""

from __future__ import annotations

from hypothesis import strategies as st

from stagemesh import plan
from stagemesh.plan import NOT_FINITE, Epoch, HopTiming, RowResult, Step, StepResult
from stagemesh.sampling import SamplingSpec

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
FEW_U32 = st.lists(U32, max_size=4).map(tuple)
TEXT = st.text(max_size=8)


def real(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


EPOCHS = st.builds(Epoch, U64, U64)
SAMPLINGS = st.builds(
    SamplingSpec,
    temperature=real(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    top_p=real(0.5, 1),
    min_p=real(0, 1),
    repetition_penalty=real(0.5, 1000),
    presence_penalty=real(-2, 2),
    frequency_penalty=real(-2, 2),
    logit_bias=st.dictionaries(U32, real(-100, 100), max_size=3),
    seed=U64,
    min_tokens=st.integers(0, 2**31 - 1),
    stop_token_ids=FEW_U32,
    num_logprobs=st.none() | st.integers(0, 20),
    num_prompt_logprobs=st.none() | st.integers(0, 20),
)
STATES = st.builds(plan.SequenceState, FEW_U32, FEW_U32, SAMPLINGS, U32)
RUNS = st.builds(plan.SequenceRun, U64, U32)
UPDATES = st.builds(plan.BlockUpdate, U32, FEW_U32)
ROWS = st.builds(
    plan.Row,
    sequence_id=U64,
    run=U32,
    start=U32,
    num_tokens=U32,
    token_ids=FEW_U32,
    block_updates=st.lists(UPDATES, max_size=2).map(tuple),
    first_stage=U32,
    end_stage=U32,
    sample_positions=FEW_U32,
    logprob_positions=FEW_U32,
    input_from_log_of_stage=st.none() | U32,
    state=st.none() | STATES,
    first_writing_stage=U32,
)
STEPS = st.builds(
    Step,
    pipeline_id=TEXT,
    epoch=EPOCHS,
    step=U64,
    rows=st.lists(ROWS, max_size=3).map(tuple),
    forget=st.lists(RUNS, max_size=2).map(tuple),
    alone=st.booleans(),
)
TOKENS = st.builds(
    plan.SampledToken,
    position=U32,
    token_id=U32,
    logprob=st.none() | real(-1e9, 0),
    alternatives=st.lists(st.tuples(U32, real(-1e9, 0)), max_size=3).map(tuple),
)
ROW_RESULTS = st.builds(
    RowResult,
    sequence_id=U64,
    run=U32,
    sampled=st.lists(TOKENS, max_size=2).map(tuple),
    prompt_logprobs=st.lists(TOKENS, max_size=2).map(tuple),
    error=st.sampled_from([None, NOT_FINITE]),
)
TIMINGS = st.builds(HopTiming, U32, U64, U64, U64, st.integers(1, 2**63), U64, U64)
RESULTS = st.builds(
    StepResult,
    pipeline_id=TEXT,
    epoch=EPOCHS,
    step=U64,
    rows=st.lists(ROW_RESULTS, max_size=3).map(tuple),
    timings=st.lists(TIMINGS, max_size=3).map(tuple),
)
SUMMARIES = st.builds(
    plan.ModelSummary,
    name=TEXT,
    architecture=TEXT,
    num_layers=U32,
    hidden_size=U32,
    vocab_size=U32,
    max_position=U32,
    layer_bytes=U64,
    embedding_bytes=U64,
    head_bytes=U64,
    structure_hash=TEXT,
    part_hashes=st.dictionaries(TEXT, TEXT, max_size=3),
    dynamic_rope_length=U32,
)
