"""What holds for the project as a whole."""

import ast
import re
import sys
import tomllib
from collections import Counter
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
OURS = {"twotower", "twotower_lab"}
MACHINE_PATHS = re.compile(r"(?<![\w.])/(work|home|root|opt)/")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def test_every_module_says_what_it_is():
    silent = [str(path.relative_to(ROOT)) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_every_folder_of_modules_is_a_package():
    assert not [str(path.parent) for path in SOURCES if not (path.parent / "__init__.py").exists()]


def test_there_is_no_module_for_everything_else():
    assert not [str(path) for path in SOURCES if path.stem in ("utils", "util", "helpers", "common", "misc")]


def test_no_file_names_a_place_of_one_machine():
    files = [path for path in ROOT.glob("*") if path.suffix in (".md", ".toml", ".txt") or path.name == "Makefile"]
    for folder in ("src", "tests", "docs", "examples", "benchmarks", ".ci"):
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted(files)
        if not any(part.endswith(".egg-info") for part in path.parts)
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if MACHINE_PATHS.search(line) and path != Path(__file__)
    ]
    assert not found, "\n".join(found)


def test_every_imported_package_is_declared():
    distributions = packages_distributions()
    extras = [
        requirement
        for name, extra in PROJECT["optional-dependencies"].items()
        if name != "dev"
        for requirement in extra
    ]
    known = declared(PROJECT["dependencies"] + extras)
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - OURS:
                owners = {canonical(name) for name in distributions.get(module, [module])}
                if not owners & known:
                    found.add(f"{path.relative_to(ROOT)}:{node.lineno}: {module}")
    assert not found, "\n".join(sorted(found))


def test_every_dependency_is_pinned_to_a_version_that_the_public_index_has():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert not [line for line in lines if "+" in line]
    assert len(pins) == len(lines)
    extras = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    assert declared(PROJECT["dependencies"] + extras) <= {canonical(name) for name in pins}


def test_no_class_name_stands_twice():
    names = Counter(
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]


def test_lines_of_documentation_are_at_most_120_characters():
    found, fenced = [], False
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("benchmarks/notes/*.md"),
    ]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            fenced ^= line.startswith("```")
            prose = not fenced and not line.lstrip().startswith("|") and not line.startswith("    ")
            if prose and len(line) > 120:
                found.append(f"{path.relative_to(ROOT)}:{number}: {len(line)} characters")
    assert not found, "\n".join(found)
