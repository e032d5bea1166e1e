"""This host in the cluster: registers its devices and stays visible."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import structlog
from sqlalchemy.exc import SQLAlchemyError

import core
from core.clock import utcnow
from core.db.models import Node
from core.db.session import Database
from core.ids import new_id
from core.scheduler.inventory import Inventory, detect, inspect_host
from core.settings import Settings

log = structlog.get_logger(__name__)

_DETECT_EVERY_S = 60.0


def report(database: Database, settings: Settings, inventory: Inventory) -> None:
    """Write this host's row."""
    with database.write() as session:
        node = session.get(Node, settings.node_name)
        if node is None:
            node = Node(name=settings.node_name, id=new_id("node"))
            session.add(node)
        node.address = settings.node_address
        node.device_kind = inventory.device_kind
        node.devices = inventory.as_rows()
        node.host_jobs = settings.host_jobs
        node.healthy, node.reason = inventory.healthy, inventory.reason
        node.version = core.__version__
        node.last_seen_at = utcnow()


class Beacon(threading.Thread):
    """Reports this host again and again, through database outages."""

    def __init__(self, database: Database, settings: Settings) -> None:
        super().__init__(name="node-beacon", daemon=True)
        self._database, self._settings = database, settings

    def run(self) -> None:
        """Loop until the process ends."""
        inventory, detected = inspect_host(self._settings), time.monotonic()
        stack_problem = None if inventory.healthy else inventory.reason
        while True:
            try:
                report(self._database, self._settings, inventory)
            except SQLAlchemyError as error:
                log.warning("node.report.failed", error=str(error).splitlines()[0])
            time.sleep(self._settings.node_ttl_s / 5)
            if time.monotonic() - detected > _DETECT_EVERY_S:
                inventory, detected = detect(self._settings), time.monotonic()
                if stack_problem is not None and inventory.healthy:
                    inventory = replace(inventory, healthy=False, reason=f"{stack_problem} (as of the worker's start)")
