import contextlib
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from api.auth import write_private
from api.serve import _is_loopback
from tests.services import REPOSITORY, kill_home, start_temper, stop_process, wait_until


def children(process: "subprocess.Popen[bytes]", module: str) -> list[int]:
    found = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie has no command line either
            if module in child.cmdline():
                found.append(child.pid)
    return found


@pytest.mark.slow
class TestServe:
    @pytest.fixture
    def home(self, tmp_path: Path) -> Path:
        home = tmp_path / "home"
        home.mkdir()
        return home

    def start(self, home: Path, *arguments: str) -> "subprocess.Popen[bytes]":
        command = ["serve", "--home", str(home), "--port", "0", *arguments]
        return start_temper(command, home=home, environment={}, output=home / "serve.out")

    def url(self, home: Path, process: "subprocess.Popen[bytes]") -> str:
        file = home / "server.json"

        def there() -> bool:
            assert process.poll() is None, (home / "serve.out").read_text()
            return file.exists() and file.stat().st_size > 0

        wait_until(there, timeout_s=120, what="server.json")
        told = json.loads(file.read_text())
        assert told["pid"] == process.pid
        return str(told["url"])

    def test_restarts_what_dies_and_stops_all_on_term(self, home: Path) -> None:
        process = self.start(home)
        try:
            url = self.url(home, process)
            output = (home / "serve.out").read_text()
            assert url in output
            assert output.count((home / "admin.key").read_text().strip()) == 1

            for module in ("api.serve", "worker"):
                (old,) = children(process, module)
                os.kill(old, signal.SIGKILL)
                wait_until(partial(restarted, process, module, old), timeout_s=120, what=f"a new {module}")
            wait_until(lambda: answers(f"{url}/readyz"), timeout_s=120, what="readiness after the restarts")

            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 0
            assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in family)
            assert "no job runs" in (home / "serve.out").read_text()
            assert not (home / "server.json").exists()
        finally:
            stop_process(process)
            kill_home(home)

    def test_a_second_one_on_its_home_is_refused_and_its_children_end_with_it_even_when_it_is_killed(
        self, home: Path
    ) -> None:
        process = self.start(home)
        try:
            self.url(home, process)
            command = [sys.executable, "-m", "api.cli", "serve", "--home", str(home), "--port", "0"]
            second = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY, check=False)
            assert second.returncode != 0
            assert "another" in second.stderr
            family = psutil.Process(process.pid).children()
            process.kill()
            process.wait()
            psutil.wait_procs(family, timeout=120)
            assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in family)
        finally:
            stop_process(process)
            kill_home(home)


def restarted(process: "subprocess.Popen[bytes]", module: str, old: int) -> bool:
    return any(new != old for new in children(process, module))


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=20).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


class TestExposure:
    @pytest.mark.parametrize("command", ["serve", "api"])
    def test_embedded_mode_refuses_other_addresses(self, tmp_path: Path, command: str) -> None:
        environment = {**os.environ, "TEMPER_HOME": str(tmp_path)}
        run = subprocess.run(
            [sys.executable, "-m", "api.cli", command, "--host", "0.0.0.0", "--port", "0"],
            capture_output=True, text=True, timeout=120, cwd=REPOSITORY, env=environment, check=False,
        )  # fmt: skip
        assert run.returncode != 0
        assert "loopback" in run.stderr
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("host", "loopback"),
        [
            ("127.0.0.1", True),
            ("127.8.0.1", True),
            ("::1", True),
            ("localhost", True),
            ("0.0.0.0", False),
            ("::", False),
            ("node-a", False),
        ],
    )
    def test_knows_loopback(self, host: str, loopback: bool) -> None:
        assert _is_loopback(host) is loopback


class TestWritePrivate:
    def test_replaces_what_was_there_and_is_nobody_elses(self, tmp_path: Path) -> None:
        path = tmp_path / "admin.key"
        path.write_text("old")
        path.chmod(0o644)
        write_private(path, "new")
        assert path.read_text() == "new"
        assert path.stat().st_mode & 0o777 == 0o600
        assert list(tmp_path.iterdir()) == [path]
