"""The benchmarks are run by hand: what they take from the package must still be there."""

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    "script",
    [str(path.relative_to(BENCHMARKS)) for folder in ("", "soak") for path in (BENCHMARKS / folder).glob("*.py")],
)
def test_a_benchmark_finds_what_it_imports(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str((BENCHMARKS / script).parent))
    runpy.run_path(str(BENCHMARKS / script), run_name="imported")
