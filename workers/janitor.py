"""The janitor: gives back at once what a killed process held. ``python -m shmbroker.workers.janitor DIRECTORY``"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shmbroker.janitor import Janitor
from shmbroker.workers import common


def serve(worker: common.Worker) -> None:
    """Watch until told to leave."""
    kill = worker.config.runtime.stopped_lock_holder == "kill"
    janitor = Janitor(worker.region, worker.log, kill_stopped_holder=kill)
    while not worker.stopping:
        worker.region.worker_beat(worker.role)
        janitor.turn()
    janitor.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Work as the janitor of a directory; returns an exit code of ``workers/common.py``."""
    return common.run("janitor", serve, argv)


if __name__ == "__main__":
    sys.exit(main())
