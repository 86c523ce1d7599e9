"""One run of a load as numbers: from its samples, and from what the mesh's stages did meanwhile.

Pure. Latencies are in milliseconds, of whole requests; those cancelled on purpose count for tokens
only, failed ones for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from stagemesh.bench.samples import Sample
from stagemesh.bench.stage_usage import StageUsage
from stagemesh.bench.summary import Objective, Spread, decode_rate, full_rate
from stagemesh.bench.workload import Load, LoadKind


@dataclass(frozen=True, slots=True)
class Setting:
    """What was measured: one cell of a sweep. `stages` and `threads` None: of a running server."""

    load: Load
    prompt: str
    output: str
    stages: int | None = None
    threads: int | None = None

    @property
    def mesh(self) -> str:
        """Such as "2 stages x 1 thread"; empty for a running server."""
        if self.stages is None or self.threads is None:
            return ""
        return f"{_counted(self.stages, 'stage')} x {_counted(self.threads, 'thread')}"

    def __str__(self) -> str:
        mesh = f"{self.mesh}, " if self.mesh else ""
        return f"{mesh}{self.load}, {self.prompt} -> {self.output} tokens"


def _counted(num: int, what: str) -> str:
    return f"{num} {what}" if num == 1 else f"{num} {what}s"


@dataclass(frozen=True, slots=True)
class MeshView:
    """The mesh beside the samples. `step_compute_ms`: of one recent step, over all stages."""

    stages: Sequence[StageUsage]
    num_workers: int
    step_compute_ms: float


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that met the objective: a second, and of all that were not given up."""

    requests_per_s: float
    share: float


@dataclass(frozen=True, slots=True)
class Report:
    """One run. Rates are of the time from its first request until the last has ended.

    `full_tokens_per_s`: while as many requests were under way as were asked for; a closed loop's
    own rate, without its beginning and end. `decode_tokens_per_s`: of a batch, while all of it was
    decoding. `lateness_ms`: from when a request was due until the client sent it, so more than a
    few milliseconds say that the client is the bottleneck; as does `client_cores`, its processor
    time by the wall's.
    """

    setting: Setting
    round: int
    num_requests: int
    num_whole: int
    num_cancelled: int
    num_failed: int
    errors: dict[str, int]
    duration_s: float
    requests_per_s: float
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    full_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None
    lateness_ms: Spread | None
    client_cores: float
    goodput: Goodput | None = None
    num_workers: int | None = None
    tokens_per_s_per_worker: float | None = None
    bubble_share: float | None = None
    wire_bytes_per_token: float | None = None
    hop_ms: float | None = None
    stages: list[StageUsage] = field(default_factory=list)


def make_report(
    setting: Setting,
    samples: Sequence[Sample],
    *,
    client_cpu_s: float,
    objective: Objective,
    mesh: MeshView | None = None,
    round_number: int = 1,
) -> Report:
    """Of at least one sample."""
    whole = [sample for sample in samples if sample.is_whole]
    failed = [sample for sample in samples if sample.error is not None]
    came = [sample for sample in samples if sample.error is None]
    start_s = min(min(sample.due_s, sample.sent_s) for sample in samples)
    duration_s = max(1e-9, max(sample.ended_s for sample in samples) - start_s)
    output_tokens = sum(sample.output_tokens for sample in came)
    prompt_tokens = sum(_prompt_tokens(sample) for sample in came)
    level = round(setting.load.level)
    report = Report(
        setting=setting,
        round=round_number,
        num_requests=len(samples),
        num_whole=len(whole),
        num_cancelled=len(came) - len(whole),
        num_failed=len(failed),
        errors=dict(Counter(sample.error or "" for sample in failed).most_common(10)),
        duration_s=duration_s,
        requests_per_s=len(whole) / duration_s,
        prompt_tokens=prompt_tokens,
        cached_prompt_tokens=sum(sample.cached_prompt_tokens or 0 for sample in came),
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / duration_s,
        total_tokens_per_s=(output_tokens + prompt_tokens) / duration_s,
        full_tokens_per_s=None if setting.load.is_open else full_rate(samples, level),
        decode_tokens_per_s=decode_rate(whole) if setting.load.kind is LoadKind.BATCH else None,
        ttft_ms=_ms(sample.ttft_s for sample in whole),
        tpot_ms=_ms(sample.tpot_s for sample in whole),
        itl_ms=_ms(itl_s for sample in whole for itl_s in sample.itls_s),
        e2e_ms=_ms(sample.e2e_s for sample in whole),
        lateness_ms=_ms(sample.sent_s - sample.due_s for sample in samples),
        client_cores=client_cpu_s / duration_s,
        goodput=_goodput(samples, objective, duration_s),
    )
    return report if mesh is None else _with_mesh(report, mesh)


def _with_mesh(report: Report, mesh: MeshView) -> Report:
    tokens = max(1, report.output_tokens)
    bubbles = [stage.bubble_share for stage in mesh.stages]
    return replace(
        report,
        num_workers=mesh.num_workers,
        tokens_per_s_per_worker=report.output_tokens_per_s / max(1, mesh.num_workers),
        bubble_share=sum(bubbles) / len(bubbles) if bubbles else None,
        wire_bytes_per_token=_bytes_sent(mesh.stages) / tokens if bubbles else None,
        hop_ms=_hop_ms(report, mesh),
        stages=list(mesh.stages),
    )


def _bytes_sent(stages: Iterable[StageUsage]) -> int:
    """Each worker's once, though it may hold stages of two pipelines."""
    return sum({stage.worker: stage.bytes_sent for stage in stages}.values())


def _hop_ms(report: Report, mesh: MeshView) -> float | None:
    """What a lone request's token takes beyond computing, by the messages that a step costs: one
    to each stage and one back. Scheduler, gateway and client are in it."""
    load = report.setting.load
    is_lone = not load.is_open and load.level == 1
    if not is_lone or report.tpot_ms is None or not mesh.stages or not mesh.step_compute_ms:
        return None
    num_stages = 1 + max(stage.stage for stage in mesh.stages)
    return (report.tpot_ms.p50 - mesh.step_compute_ms) / (num_stages + 1)


def _goodput(samples: Sequence[Sample], objective: Objective, duration_s: float) -> Goodput | None:
    judged = [sample for sample in samples if not sample.cancelled]
    if not objective.is_stated or not judged:
        return None
    good = sum(map(objective.is_met_by, judged))
    return Goodput(good / duration_s, good / len(judged))


def _prompt_tokens(sample: Sample) -> int:
    """As the server counted them; as asked for where the client left before it said so."""
    return sample.ask.prompt_tokens if sample.prompt_tokens is None else sample.prompt_tokens


def _ms(values_s: Iterable[float | None]) -> Spread | None:
    return Spread.of([1e3 * value_s for value_s in values_s if value_s is not None])


def median_of(reports: Sequence[Report], number: Callable[[Report], float | None]) -> float | None:
    """Over the rounds of one setting; None where no round has it."""
    values = [value for report in reports if (value := number(report)) is not None]
    spread = Spread.of(values)
    return None if spread is None else spread.p50


def by_setting(reports: Iterable[Report]) -> dict[Setting, list[Report]]:
    """The rounds of each setting, in the order in which settings came first."""
    found: dict[Setting, list[Report]] = {}
    for report in reports:
        found.setdefault(report.setting, []).append(report)
    return found
