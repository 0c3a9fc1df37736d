"""The system as the lab calls it: the commands of the line, handed in by the command line, which alone wires stages."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.channels.retriever import Retriever
from twotower.config.settings import Settings
from twotower.fusion.fuse import Fusion
from twotower.publish.version import Version
from twotower.samples.read import Samples
from twotower.update.chain import Chain


@dataclass(frozen=True)
class System:
    """Functions of a configuration; top-level ones, so that worker processes can be told of them."""

    examples: Path
    """Folder of the example configurations."""
    make_samples: Callable[[Settings], Any]
    """Samples out of the workspace, into it."""
    train: Callable[[Settings], Any]
    """A checkpoint of each trained channel."""
    channels: Callable[[Settings, Samples], dict[str, Retriever]]
    """The latest checkpoints and the counted channels as evaluation asks them."""
    fusion: Callable[[Settings], Fusion]
    publish: Callable[[Settings], Any]
    """A version, promoted."""
    served: Callable[[Settings], Version]
    """The promoted version, opened."""
    update_full: Callable[[Settings], Any]
    """The full update of the days that are due."""
    open_chain: Callable[[Settings], Chain]
    """The chain of deltas of the promoted version, to learn on."""
