"""A supervisor whose runner is a given script: `python -m tests.worker.supervise LEASE_ID SCRIPT`."""

import os
import signal
import sys
from pathlib import Path

from core.db.session import Database
from core.settings import Settings
from worker.launch import Launch, Part
from worker.supervisor import Supervisor, claim


def main(lease_id: str, script: str) -> None:
    settings = Settings()
    database = Database(settings.sqlalchemy_url, pool_size=2)
    task = claim(database, settings, lease_id)
    assert task is not None

    def build(part: Part, attempt_dir: Path, **_: object) -> Launch:
        return Launch((sys.executable, script, str(attempt_dir)), dict(os.environ), through_torchrun=False)

    supervisor = Supervisor(database, settings, task, build_command=build)
    signal.signal(signal.SIGTERM, supervisor.drain)
    supervisor.run()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
