"""`python -m stage_worker.template PATH`: stage workers that start at once.

Importing torch takes seconds of a core; here it is done once, and each worker is forked from this
process, which computes nothing and has no device. What a library reads while it is imported holds
for all of them, so a worker of another environment is refused and has to be executed.
"""

from __future__ import annotations

import gc
import os
import sys

from stage_worker.__main__ import main as run_worker
from stagemesh.fork_server import ForkServer, listen
from stagemesh.supervision import Supervisor, end_with_parent


def main() -> int:
    supervisor = Supervisor.from_environment(os.environ)
    # Workers are children of this thread, so they end with it, and it with whoever started it.
    end_with_parent()
    _import_all()
    # What is there now is never looked through again, so that its pages stay shared.
    gc.collect()
    gc.freeze()
    server = ForkServer(listen(sys.argv[1]), supervisor.link if supervisor else None)
    if supervisor is not None:
        supervisor.report_ready({})
    arguments = server.run()
    return 0 if arguments is None else run_worker(arguments)


def _import_all() -> None:
    """What a worker imports once it knows what it has to do."""
    import stage_worker.adapter_files
    import stage_worker.executor
    import stage_worker.identity
    import stage_worker.ranked_stage
    import stage_worker.server  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
