import threading
from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import update
from sqlalchemy.exc import StatementError

from core.clock import utcnow
from core.db.models import Mutex
from core.db.session import Database


class TestWrite:
    def test_an_exception_undoes_everything(self, database: Database) -> None:
        def take_and_fail() -> None:
            with database.write() as session:
                session.execute(update(Mutex).values(holder="me"))
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            take_and_fail()
        with database.read() as session:
            assert session.get_one(Mutex, "scheduler").holder == ""

    def test_read_then_write_by_many_threads_loses_no_update(self, database: Database) -> None:
        def append(letter: str) -> None:
            for _ in range(5):
                with database.write() as session:
                    row = session.get_one(Mutex, "scheduler", with_for_update=True)
                    row.holder += letter

        threads = [threading.Thread(target=append, args=(letter,)) for letter in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with database.read() as session:
            assert sorted(session.get_one(Mutex, "scheduler").holder) == sorted("abcd" * 5)


class TestUtcDateTime:
    def test_times_come_back_in_utc_whatever_zone_they_had(self, database: Database) -> None:
        moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=8)))
        with database.write() as session:
            session.execute(update(Mutex).values(expires_at=moment))
        with database.read() as session:
            found = session.get_one(Mutex, "scheduler").expires_at
        assert found == moment
        assert found.utcoffset() == timedelta(0)
        assert found < utcnow()

    def test_a_naive_time_is_refused(self, database: Database) -> None:
        with pytest.raises(StatementError, match="naive time"), database.write() as session:
            session.execute(update(Mutex).values(expires_at=datetime(2026, 1, 1)))  # noqa: DTZ001  (the point of the test)
