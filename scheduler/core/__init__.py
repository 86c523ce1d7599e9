"""The scheduler's core: requests, blocks, pipelines and plans, without any I/O.

Knows the standard library, the plan and the errors; neither clock, randomness, sockets nor torch.
"""

from scheduler.core.events import EndReason, Finished, Tokens
from scheduler.core.limits import SchedulerLimits
from scheduler.core.pipeline import PipelineFacts
from scheduler.core.request import Request, RequestKey
from scheduler.core.scheduler import SchedulerCore
from scheduler.core.stats import CoreStats, PipelineStats

__all__ = [
    "CoreStats",
    "EndReason",
    "Finished",
    "PipelineFacts",
    "PipelineStats",
    "Request",
    "RequestKey",
    "SchedulerCore",
    "SchedulerLimits",
    "Tokens",
]
