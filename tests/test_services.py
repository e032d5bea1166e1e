"""The servers that the tests rely on do what the tests expect of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis as redis_client
from sqlalchemy import create_engine, text

from tests.services import RedisServer, kill_home, processes_of_home


class TestDatabases:
    def test_a_fresh_database_is_empty_and_writable(self, database_url: str) -> None:
        engine = create_engine(database_url)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE t (n INTEGER)"))
            connection.execute(text("INSERT INTO t VALUES (1)"))
            assert connection.execute(text("SELECT n FROM t")).scalars().all() == [1]
        engine.dispose()


class TestRedis:
    def test_a_stop_loses_what_was_stored_and_a_start_answers_on_the_same_port(self, redis: RedisServer) -> None:
        url = redis.url
        with redis_client.Redis.from_url(url) as client:
            client.set("k", "v")
        redis.stop()
        with redis_client.Redis.from_url(url) as client, pytest.raises(redis_client.ConnectionError):
            client.ping()
        redis.start()
        with redis_client.Redis.from_url(url) as client:
            assert redis.url == url
            assert client.get("k") is None

    def test_each_test_gets_it_running_and_empty(self, redis: RedisServer) -> None:
        with redis_client.Redis.from_url(redis.url) as client:
            assert client.dbsize() == 0
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


class TestHomes:
    def test_a_detached_grandchild_is_found_by_its_home_and_killed(self, tmp_path: Path) -> None:
        start = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)"
        subprocess.run([sys.executable, "-c", start], env={**os.environ, "TEMPER_HOME": str(tmp_path)}, check=True)
        assert len(processes_of_home(tmp_path)) == 1
        kill_home(tmp_path)
        assert processes_of_home(tmp_path) == []
