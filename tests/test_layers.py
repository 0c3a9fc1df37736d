"""The stages stand in the order in which the data flows, and import only from their left."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "twotower"
ORDER = """
schema < features < logs < datasets < samples < index < towers < channels < evaluate < worlds < train < fusion < publish
< serve < stream < update < console < config < pipeline < cli
"""
STAGES = [word for word in ORDER.split() if word != "<"]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import, those inside functions included; a relative one begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "twotower":
                yield from ((node.lineno, f"twotower.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def violations(stage: str, code: str) -> list[str]:
    """What a file of a stage must not import, as `line: why`."""
    allowed = STAGES[: STAGES.index(stage) + 1]
    found = []
    for line, module in sorted(imported(ast.parse(code))):
        if module.startswith("."):
            found.append(f"{line}: {module} is relative")
        elif module.split(".")[0] == "twotower_lab" and stage != "cli":
            found.append(f"{line}: {stage} imports {module}: only the command line knows the lab")
        elif module.split(".")[0] == "twotower" and module.split(".")[1:2] and module.split(".")[1] not in allowed:
            found.append(f"{line}: {stage} imports {module}, which is not on its left")
    return found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import json\nfrom twotower.schema import columns\nimport twotower.index.build", []),
        ("from twotower.train.loop import train", ["1: index imports twotower.train.loop, which is not on its left"]),
        ("def f():\n    import twotower.cli.main", ["2: index imports twotower.cli.main, which is not on its left"]),
        ("from twotower import serve", ["1: index imports twotower.serve, which is not on its left"]),
        ("from .exact import ExactIndex", ["1: .exact is relative"]),
        ("import twotower_lab.run", ["1: index imports twotower_lab.run: only the command line knows the lab"]),
        ("from twotower.utils import f", ["1: index imports twotower.utils, which is not on its left"]),
    ],
)
def test_an_import_from_the_right_is_seen(code, found):
    assert violations("index", code) == found


def test_every_package_is_a_stage():
    packages = {path.parent.relative_to(SOURCE).parts[0] for path in SOURCE.rglob("*.py") if path.parent != SOURCE}
    assert packages <= set(STAGES)


def test_a_stage_imports_only_from_its_left():
    found = [
        f"{path.relative_to(SOURCE.parents[1])}:{problem}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.parent != SOURCE
        for problem in violations(path.relative_to(SOURCE).parts[0], path.read_text())
    ]
    assert not found, "\n".join(found)
