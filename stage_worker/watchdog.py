"""Finds a device thread that does not come back from a job.

Counts what the job itself takes, not how long it waited. A thread that gets a little of an
overloaded machine is no hanging one: while it uses processor time, that is what counts; while it
uses none, it waits for something (a device, a lock), and the time that passes counts, as far as
this process was awake. Arithmetic cannot be interrupted: all that can be done is to say so and to
end the process.
"""

from __future__ import annotations

from stage_worker.awake_time import looks
from stage_worker.device_thread import DeviceThread
from stage_worker.step_cost import StepCost
from stagemesh.errors import StepTimeout

FIRST_STEP_LIMIT_S = 60.0
"""For the first steps after loading, of which nothing is known, and for what is no step."""
_NUM_FIRST_STEPS = 3
_SLACK = 10.0
# Less than this between two looks is a thread that waits.
_MIN_USED_S = 0.0005


def step_limit_s(cost: StepCost, work: float, min_limit_s: float) -> float:
    """How long a step may compute."""
    if cost.num_observed < _NUM_FIRST_STEPS:
        return max(FIRST_STEP_LIMIT_S, min_limit_s)
    return max(min_limit_s, _SLACK * cost.predict_s(work))


async def watch(device: DeviceThread) -> StepTimeout:
    """Returns once a job has run for longer than it may."""
    job, ran_s, cpu_s = device.running, 0.0, device.cpu_s()
    async for awake_s in looks():
        used_s, cpu_s = device.cpu_s() - cpu_s, device.cpu_s()
        if device.running is not job:
            job, ran_s = device.running, 0.0
            continue
        ran_s += min(used_s, awake_s) if used_s > _MIN_USED_S else awake_s
        limit_s = job.limit_s if job is not None else None
        if job is not None and limit_s is not None and ran_s > limit_s:
            return StepTimeout(
                f"the device has been at work on {job.name} for {ran_s:.1f} s, of "
                f"{limit_s:.1f} s that it may take"
            )
    raise AssertionError("looks have no end")
