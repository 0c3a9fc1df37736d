"""`init` and `import -c`: from a user's own files to a configuration, and from that to a workspace."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.prompt import Prompt
from rich.table import Table

from twotower.config.load import load, load_import
from twotower.config.start import as_toml, kind_of
from twotower.datasets.files import Overrides, import_files, overridden
from twotower.datasets.propose import Hints, Proposal, propose
from twotower.datasets.workspace import ImportReport
from twotower.schema.errors import ConfigError
from twotower.schema.files import whole_file

CONFIGURATION = "twotower.toml"


def init_files(files: Sequence[Path], out: Path, hints: Hints) -> dict[str, Any]:
    """Look at files, print what becomes of each column, and write the configuration.

    Questions are put on a terminal alone; elsewhere the safer reading is taken, and printed.

    Raises:
        ConfigError: the configuration is there already, or no table has users and items.
        DataError: a file cannot be read.
    """
    path = out / CONFIGURATION
    if path.exists():
        raise ConfigError(f"{path} is there already: give another --out, or remove it first")
    on_terminal = sys.stdin.isatty() and sys.stderr.isatty()
    console = Console(stderr=True)
    proposal = propose(files, hints, (lambda text, answers: _asked(console, text, answers)) if on_terminal else None)
    text = as_toml(proposal, str(out / "workspace"))
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    load(path)
    load_import(path)
    console.print(as_table(proposal))
    for note in proposal.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"next: twotower import -c {path}", err=True)
    return {
        "config": str(path),
        "start": kind_of(proposal),
        "events": proposal.facts.events,
        "users": proposal.facts.users,
        "items": proposal.facts.items,
        "columns": len(proposal.columns),
        "notes": proposal.notes,
    }


def import_configured(config: Path, out: Path | None, options: Overrides) -> ImportReport:
    """Make the workspace of a configuration from the files that it names.

    Raises:
        ConfigError: the configuration has no section `[import]`, or one that does not fit.
        DataError: a file is not what the section says.
    """
    section = overridden(load_import(config), options)
    return import_files(section, out or Path(load(config).workspace.path))


def as_table(proposal: Proposal) -> Table:
    """Each column of the files with three values and what becomes of it."""
    table = Table()
    for heading in ("file", "column", "type", "missing", "values", "becomes"):
        table.add_column(heading, overflow="fold")
    for row in proposal.columns:
        missing = "" if not row.missing else str(row.missing)
        cells = (row.file, row.column, row.type, missing, " · ".join(row.examples), row.becomes)
        table.add_row(*(cell.replace("[", "\\[") for cell in cells))
    return table


def _asked(console: Console, question: str, answers: list[str]) -> str:
    return Prompt.ask(question, choices=answers, default=answers[0], console=console)
