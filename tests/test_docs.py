"""The documents are true: their commands run, their Python runs, their YAML loads, their links lead somewhere.

Of every document the fenced blocks are taken in order, in a folder of its own beside the examples, as a reader would:
```python whose first line is `# name.py` is saved as that file; any other is run at the end; ```yaml likewise is saved or loaded;
```bash is run, smaller where it needs more: see tests/followed.py. ```text is what is printed: no command hides in it.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from autoplan import api, cli
from autoplan.files.hardware import load_hardware
from autoplan.files.plan import load_plan
from tests.followed import ROOT, follow, helps

GENERATED = ("zoo.md", "accuracy.md", "planning-speed.md")
DOCUMENTS = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in GENERATED)]
ALL = [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]

Block = tuple[str, str]
"""(language, text)"""


def blocks(document: Path) -> Iterator[Block]:
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        yield match.group(1), match.group(2)


def commands(text: str) -> list[str]:
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def graphs() -> dict[Any, Any]:
    """Captured models, so that each is captured once."""
    return {}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: dict[Any, Any]) -> Path:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    capture = api.inspect

    def inspect(model: Any, *, compute_dtype: str = "bfloat16", **kwargs: Any) -> Any:
        spec = model if isinstance(model, str) else model.spec
        key = (spec, compute_dtype, *sorted(kwargs.items())) if spec.startswith("examples/") else None
        if key not in graphs or key is None:
            graphs[key] = capture(model, compute_dtype=compute_dtype, **kwargs)
        return graphs[key]

    monkeypatch.setattr(api, "inspect", inspect)
    return tmp_path


@pytest.mark.gloo
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_can_be_followed(document: Path, folder: Path) -> None:
    programs = []
    for language, text in blocks(document):
        name = re.match(r"# (\S+\.(py|yaml))\n", text)
        if language in ("python", "yaml") and name:
            (folder / name.group(1)).write_text(text, encoding="utf-8")
        elif language == "python":
            programs.append(text)
        elif language == "yaml":
            (folder / "shown.yaml").write_text(text, encoding="utf-8")
            assert load_plan(folder / "shown.yaml").runs
        elif language == "bash":
            for command in commands(text):
                follow(command)
        else:
            assert language == "text", f"what is a block of '{language}'?"
    for profile in folder.glob("my*.yaml"):
        assert load_hardware(profile).links
    exec("\n".join(programs), {})


def parse(arguments: list[str]) -> None:
    """A command line of autoplan that is not run."""
    name, *rest = arguments
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    group.commands[name].make_context(name, rest, resilient_parsing=False)


@pytest.mark.parametrize("document", ALL, ids=lambda path: path.name)
def test_commands_in_the_text_are_command_lines(document: Path) -> None:
    for language, text in blocks(document):
        hidden = re.findall(r"^\s*(?:\$ )?((?:autoplan|torchrun|pip|make) .*)", text, re.MULTILINE)
        assert language != "text" or not hidden, f"nobody runs '{hidden[0]}'"
    for command in re.findall(r"`autoplan ([a-z]+ [^`]+)`", document.read_text(encoding="utf-8")):
        if "..." not in command:
            parse(shlex.split(command))


def test_programs_that_the_text_names_have_these_flags() -> None:
    """In pages that a program wrote, too."""
    texts = [path.read_text(encoding="utf-8") for path in (*ALL, *(ROOT / "docs").glob("*.md"), ROOT / "Makefile")]
    found = {command for text in texts for command in re.findall(r"`python -m (benchmarks\.[^`]+)`", text)}
    assert found
    for command in found:
        module, *arguments = shlex.split(command.partition(" >")[0])
        helps(module, arguments)


def test_what_is_installed_by_name_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {name for path in ALL for name in re.findall(r"`pip install -e '\.\[(\w+)\]'`", path.read_text(encoding="utf-8"))}
    assert named
    assert named <= set(extras)


@pytest.mark.parametrize("document", ALL, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_troubleshooting_quotes_errors_that_exist() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "autoplan").rglob("*.py"))
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"\*\*`(.+?)`\*\*", text)
    assert len(quoted) > 30
    for sentence in quoted:
        pieces = [piece.strip(" '.:…") for piece in re.split("…", sentence)]
        missing = [piece for piece in pieces if piece and piece not in source]
        assert not missing, f"no error says {missing} any more: {sentence}"


@pytest.mark.parametrize("document", ALL, ids=lambda path: path.name)
def test_documents_name_no_machine(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert not re.search(r"/work/|/root/|/home/|/tmp/|https?://(localhost|127\.)", text)
