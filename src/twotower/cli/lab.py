"""`lab`: hands the line's functions to the experiments."""

from pathlib import Path

from twotower.cli.line import fusion_of, make_samples, offline_channels, open_served, publish_version, train_model
from twotower.config.settings import Settings
from twotower.lab.system import System


def _publish(settings: Settings) -> None:
    publish_version(settings, promoted=True)


SYSTEM = System(
    examples=Path(__file__).parent / "examples",
    make_samples=make_samples,
    train=train_model,
    channels=offline_channels,
    fusion=fusion_of,
    publish=_publish,
    served=open_served,
)
