"""What the README says exists: commands, settings, and specs that the service accepts.

`python -m tests.test_readme` writes the tables of settings and metrics.
"""

import json
import re

import pytest
import yaml
from pydantic_core import PydanticUndefined

from api.cli import app
from core.settings import Settings
from core.specs import SPECS
from core.specs.events import TRAINING_METRICS
from tests.services import REPOSITORY

README = REPOSITORY / "README.md"
_TABLE = re.compile(r"(<!-- (settings|metrics):[^>]*-->\n).*?(<!-- /(?:settings|metrics) -->)", re.DOTALL)


def settings_table() -> str:
    lines = ["| variable | default | what |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "host name" if name == "node_name" else "" if field.default in (None, ()) else f"`{field.default}`"
        assert field.default is not PydanticUndefined or name == "node_name"
        assert field.description, f"setting {name} has no description"
        lines.append(f"| `TEMPER_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def metrics_table() -> str:
    rows = [f"| `{name}` | {text} |" for name, text in TRAINING_METRICS.items()]
    return "\n".join(["| metric | what |", "|---|---|", *rows]) + "\n"


TABLES = {"settings": settings_table, "metrics": metrics_table}


def with_tables(text: str) -> str:
    return _TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def cli_commands() -> set[str]:
    named = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    return named | {str(group.name) for group in app.registered_groups}


class TestReadme:
    def test_the_tables_are_up_to_date(self) -> None:
        text = README.read_text()
        assert [found[2] for found in _TABLE.finditer(text)] == ["metrics", "settings"]
        assert text == with_tables(text), "run: python -m tests.test_readme"

    def test_every_command_shown_exists(self) -> None:
        shown = set(re.findall(r"(?:^|\s|`)temper ([a-z]+)", README.read_text()))
        assert {"serve", "api", "worker", "submit", "doctor"} <= shown <= cli_commands()

    def test_every_make_target_shown_exists(self) -> None:
        targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
        assert set(re.findall(r"`?\bmake ([a-z]+)(?: +#|`| TORCH)", README.read_text())) <= targets

    def test_every_variable_named_is_a_setting_or_the_clients(self) -> None:
        names = {f"TEMPER_{name.upper()}" for name in Settings.model_fields} | {"TEMPER_URL", "TEMPER_API_KEY"}
        assert set(re.findall(r"TEMPER_[A-Z_]+", README.read_text())) <= names

    def test_the_jobs_of_the_tour_are_accepted(self) -> None:
        tour, *others = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
        jobs = list(yaml.safe_load_all(tour))
        assert [job["kind"] for job in jobs] == ["conversion", "dataset", "training", "evaluation", "conversion"]
        for job in [*jobs, *(job for text in others for job in yaml.safe_load_all(text))]:
            spec = re.sub(r'"\$\w+"', '"job_01k0a2b3c4d5e6f7g8h9j0kmnp"', json.dumps(job["spec"]))
            SPECS[job["kind"]].model_validate_json(spec)

    @pytest.mark.parametrize("body", re.findall(r"-d '(\{.*?\})'", README.read_text(), re.DOTALL))
    def test_the_bodies_of_the_curl_examples_are_accepted(self, body: str) -> None:
        job = json.loads(body)
        SPECS[job["kind"]].model_validate_json(json.dumps(job["spec"]))


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
