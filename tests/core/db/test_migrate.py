from concurrent.futures import ThreadPoolExecutor

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect

from core.db.base import Base
from core.db.migrate import upgrade
from core.db.models import Mutex
from core.db.session import Database


class TestUpgrade:
    def test_the_migrations_make_what_the_models_say(self, database: Database) -> None:
        with database.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, Base.metadata) == []

    def test_the_schedulers_mutex_is_there(self, database: Database) -> None:
        with database.read() as session:
            assert session.get_one(Mutex, "scheduler").holder == ""

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
