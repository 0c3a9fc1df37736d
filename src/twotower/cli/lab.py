"""`lab`: hands the line's functions to the experiments, and finds the real logs."""

import os
from pathlib import Path
from typing import Any

from twotower.config.settings import Settings
from twotower.pipeline.line import fusion_of, make_samples, offline_channels, open_served, publish_version, train_model
from twotower.pipeline.places import places
from twotower.pipeline.updating import open_chain, update_full
from twotower.publish.publish import current_path
from twotower.schema.errors import ConfigError
from twotower.update.chain import Chain
from twotower_lab.run import run
from twotower_lab.system import System


def _publish(settings: Settings) -> None:
    publish_version(settings, promoted=True)


def _update_full(settings: Settings) -> None:
    update_full(settings, dry_run=False)


def _open_chain(settings: Settings) -> Chain:
    return open_chain(settings, current_path(places(settings).versions), None)


SYSTEM = System(
    examples=Path(__file__).parent / "examples",
    make_samples=make_samples,
    train=train_model,
    channels=offline_channels,
    fusion=fusion_of,
    publish=_publish,
    served=open_served,
    update_full=_update_full,
    open_chain=_open_chain,
)


def run_lab(name: str, out: Path, seeds: int | None, smoke: bool, data: Path | None, jobs: int) -> dict[str, Any]:
    """Run an experiment, or all, on this system; arguments as of `twotower lab run`.

    Raises:
        ConfigError: no such experiment, a number that cannot be, or `data` is no folder.
    """
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data {data} is no folder: it holds a folder of each real log, such as kuairand")
    words = ["twotower lab run", name, *(["--seeds", str(seeds)] if seeds else []), *(["--smoke"] if smoke else [])]
    command = " ".join([*words, "--jobs", str(jobs), "--out", "DIR"])
    return run(SYSTEM, name, out, seeds=seeds, smoke=smoke, data=data or _real_logs(), jobs=jobs, command=command)


def _real_logs() -> Path | None:
    """Where the real logs are by convention, if they are there."""
    named = os.environ.get("TWOTOWER_DATA")
    folder = Path(named) if named else Path("../shared/data")
    return folder if folder.is_dir() else None
