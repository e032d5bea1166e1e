from concurrent.futures import ThreadPoolExecutor

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect

from core.db.base import Base
from core.db.migrate import upgrade
from core.db.models import Mutex, Node
from core.db.session import Database


class TestUpgrade:
    def test_the_migrations_make_what_the_models_say(self, database: Database) -> None:
        with database.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, Base.metadata) == []

    def test_the_schedulers_mutex_is_there(self, database: Database) -> None:
        with database.read() as session:
            assert session.get_one(Mutex, "scheduler").holder == ""

    def test_hosts_of_the_first_schema_take_work_after_an_upgrade(self, database_url: str) -> None:
        opened = Database(database_url)
        upgrade(opened, "0001")
        columns = "name, id, address, device_kind, devices, host_jobs, healthy, version, last_seen_at"
        values = "'node-a', 'node_1', '127.0.0.1', 'cpu', '[]', 2, true, '0', '2026-01-01 00:00:00'"
        with opened.engine.begin() as connection:
            connection.exec_driver_sql(f"INSERT INTO nodes ({columns}) VALUES ({values})")
        upgrade(opened)
        with opened.read() as session:
            assert session.get_one(Node, "node-a").drained is False
        opened.dispose()

    def test_many_at_once_wait_for_one_another(self, database_url: str) -> None:
        def migrate(_: int) -> None:
            opened = Database(database_url, pool_size=1)
            upgrade(opened)
            opened.dispose()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(migrate, range(4)))
        opened = Database(database_url)
        assert set(inspect(opened.engine).get_table_names()) == {*Base.metadata.tables, "alembic_version"}
        opened.dispose()
