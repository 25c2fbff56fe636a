"""The published schema of plan.yaml is the code's, and knows every key that a plan has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoplan.cli import main
from autoplan.files.plan import document
from autoplan.files.plan_document import plan_schema
from tests.report.plans import frontier, llama, piped, single

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "docs" / "schema" / "plan.schema.json"


def test_the_published_schema_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    again = "run `autoplan schema -o docs/schema/plan.schema.json --force`"
    assert capsys.readouterr().out == PUBLISHED.read_text(encoding="utf-8"), again


@pytest.mark.parametrize(
    "plan", [frontier(llama()), piped("interleaved-1f1b", chunks=2), single()], ids=["llama", "piped", "single"]
)
def test_the_schema_knows_every_key(plan: Any) -> None:
    schema = plan_schema()
    strangers = list(unknown(json.loads(json.dumps(document(plan))), schema, schema["$defs"]))
    assert strangers == []


def unknown(data: Any, schema: dict[str, Any], definitions: dict[str, Any], place: str = "") -> Any:
    """Places of keys that the schema has no property for, and of required ones that are missing."""
    while "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        of_kind = [option for option in schema["anyOf"] if "$ref" in option or option.get("type") == "object"]
        schema = of_kind[0] if of_kind and isinstance(data, dict) else {}
    if isinstance(data, dict) and "properties" in schema:
        yield from (f"{place}.{key} is missing" for key in schema.get("required", ()) if key not in data)
        for key, value in data.items():
            if key not in schema["properties"]:
                yield f"{place}.{key}"
            else:
                yield from unknown(value, schema["properties"][key], definitions, f"{place}.{key}")
    elif isinstance(data, dict) and isinstance(schema.get("additionalProperties"), dict):
        for key, value in data.items():
            yield from unknown(value, schema["additionalProperties"], definitions, f"{place}.{key}")
    elif isinstance(data, list) and "items" in schema:
        for i, value in enumerate(data):
            yield from unknown(value, schema["items"], definitions, f"{place}.{i}")
