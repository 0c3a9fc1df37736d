"""The snippets of the documentation run, and give what their comments say."""

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DOCS = Path(__file__).parents[1] / "docs"
OF_A_WORKSPACE = {"python.md"}
"""Its snippet needs a workspace: the notebook of the examples is the same, and runs."""
SNIPPETS = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in sorted(DOCS.glob("*.md"))
    if path.name not in OF_A_WORKSPACE
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL))
]


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs_and_gives_what_its_comments_say(code: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    lines = code.splitlines()
    for statement in ast.parse(code).body:
        if not isinstance(statement, ast.Expr):
            exec(compile(ast.Module([statement], []), "snippet", "exec"), names)
            continue
        value = eval(compile(ast.Expression(statement.value), "snippet", "eval"), names)
        comment = lines[(statement.end_lineno or 1) - 1][statement.end_col_offset or 0 :].partition("#")[2].strip()
        try:
            said = ast.literal_eval(comment.rpartition(": ")[2])
        except (SyntaxError, ValueError):
            continue
        assert plain(value) == (pytest.approx(said, rel=1e-4) if isinstance(said, float) else said), comment
