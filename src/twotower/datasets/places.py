"""Where a workspace keeps what the commands add."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """The files and folders of a workspace."""

    workspace: Path

    @property
    def samples(self) -> Path:
        """What training reads."""
        return self.workspace / "samples"

    @property
    def checkpoints(self) -> Path:
        """Runs of training."""
        return self.workspace / "checkpoints"

    @property
    def versions(self) -> Path:
        """Published versions."""
        return self.workspace / "versions"

    @property
    def deltas(self) -> Path:
        """What was learned since a version, by version."""
        return self.workspace / "deltas"

    @property
    def log(self) -> Path:
        """The event log."""
        return self.workspace / "log"

    @property
    def events(self) -> Path:
        """Joined events, a folder a day."""
        return self.workspace / "events"

    @property
    def shards(self) -> Path:
        """What the joiner made of the event log."""
        return self.workspace / "shards"

    @property
    def feature_store(self) -> Path:
        """What a server has learned of users since the version."""
        return self.workspace / "features"
