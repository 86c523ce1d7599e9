"""What at least two parts of StageMesh need: the plan, errors, rpc, options, logs, model spec.

Knows nothing of gateway, scheduler and stage_worker.
"""

__version__ = "0.1.0"
