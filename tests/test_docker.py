"""What can be known of the images without an engine to build them: that they name things that exist, pinned, and do not run as root."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.doctor import SUPPORTED
from core.settings import Settings
from tests.services import REPOSITORY

DOCKER = REPOSITORY / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of each logical line."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def named_settings() -> set[str]:
    return {f"TEMPER_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
class TestDockerfiles:
    def test_every_line_is_an_instruction(self, dockerfile: Path) -> None:
        known = {
            "FROM",
            "ARG",
            "ENV",
            "RUN",
            "WORKDIR",
            "COPY",
            "USER",
            "VOLUME",
            "EXPOSE",
            "HEALTHCHECK",
            "CMD",
            "ENTRYPOINT",
        }
        assert {word for word, _ in instructions(dockerfile)} <= known

    def test_the_base_image_is_pinned_to_a_version(self, dockerfile: Path) -> None:
        (base,) = [rest for word, rest in instructions(dockerfile) if word == "FROM"]
        assert re.fullmatch(r"[\w./]+:\d+\.\d+[\w.\-]*", base)

    def test_it_does_not_run_as_root(self, dockerfile: Path) -> None:
        users = [rest for word, rest in instructions(dockerfile) if word == "USER"]
        assert users == ["temper"]

    def test_everything_copied_exists_and_reaches_the_build(self, dockerfile: Path) -> None:
        ignored = dockerfile.with_name(dockerfile.name + ".dockerignore").read_text().splitlines()
        for word, rest in instructions(dockerfile):
            for source in rest.split()[:-1] if word == "COPY" else ():
                assert (REPOSITORY / source).exists()
                assert f"!{source}" in ignored

    def test_it_is_checked_for_health_and_starts_temper(self, dockerfile: Path) -> None:
        found = dict(instructions(dockerfile))
        assert "HEALTHCHECK" in found
        assert found["CMD"] in {'["temper", "api"]', '["temper", "worker"]'}

    def test_it_sets_only_settings_that_exist(self, dockerfile: Path) -> None:
        assert set(re.findall(r"\bTEMPER_\w+", dockerfile.read_text())) <= named_settings()


class TestNpuImage:
    def test_its_versions_are_a_supported_combination(self) -> None:
        text = (DOCKER / "worker.npu.Dockerfile").read_text()
        (row,) = SUPPORTED
        assert f"cann:{row.cann.lower()}-" in text
        assert f"torch=={row.torch} " in text
        assert f"torch_npu=={row.torch_npu} " in text


class TestCompose:
    def test_every_image_is_pinned(self) -> None:
        images = [service["image"] for service in SERVICES.values() if "image" in service]
        assert images
        assert all(re.fullmatch(r"\w+:\d+\.\d+[\w.\-]*", image) for image in images)

    def test_everything_built_has_its_dockerfile(self) -> None:
        built = [service["build"]["dockerfile"] for service in SERVICES.values() if "build" in service]
        assert sorted(REPOSITORY / path for path in built) == DOCKERFILES

    def test_what_others_wait_for_is_checked_for_health(self) -> None:
        for service in SERVICES.values():
            for name, how in service.get("depends_on", {}).items():
                assert how == {"condition": "service_healthy"}
                image = SERVICES[name].get("build", {}).get("dockerfile")
                assert "healthcheck" in SERVICES[name] or "HEALTHCHECK" in (REPOSITORY / image).read_text()

    def test_redis_evicts_nothing(self) -> None:
        command = SERVICES["redis"]["command"]
        assert command[command.index("--maxmemory-policy") + 1] == "noeviction"

    def test_only_the_api_is_published_and_only_to_this_machine(self) -> None:
        published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
        assert published == {"api": ["127.0.0.1:8400:8400"]}

    def test_no_password_is_written_down(self) -> None:
        assert re.findall(r"PASSWORD\S*[:=]\s*(?!\$\{)\w+", (DOCKER / "compose.yml").read_text()) == []

    def test_it_sets_only_settings_that_exist(self) -> None:
        names = {name for service in SERVICES.values() for name in service.get("environment", {})}
        assert {name for name in names if name.startswith("TEMPER_")} <= named_settings()
