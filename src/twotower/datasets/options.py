"""Options of the workspace."""

from pydantic.dataclasses import dataclass

from twotower.schema.options import STRICT, Text


@dataclass(frozen=True, config=STRICT)
class WorkspaceOptions:
    """Where the tables are and everything that the commands add."""

    path: Text = "workspace"
    """Folder with `users.parquet`, `items.parquet` and `events/`; relative to the current folder."""
