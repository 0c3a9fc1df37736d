"""Open two-tower retrieval: from click logs to a served, continuously updated candidate list.

The functions here are the stages of the command line, for Python. A stage is imported when one of its functions is
first used, so that `import twotower` takes milliseconds and PyTorch is loaded only when something trains.

    import twotower as tt

    tt.import_tables("workspace", clicks, holdout="time:0.9")
    settings = tt.load({"train": {"epochs": 5}}, workspace="workspace")
    tt.run(settings)
    tt.open_version(settings).retrieve([1, 2, 3], k=10).to_pandas()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twotower.channels.retriever import Candidates, Queries, Retriever
    from twotower.config.load import load
    from twotower.config.settings import Settings
    from twotower.pipeline.data import import_tables, simulate
    from twotower.pipeline.fuse import fuse as choose_fusion
    from twotower.pipeline.line import build_samples, evaluate_model, publish_version, train_model
    from twotower.pipeline.line import evaluate_channels_of as evaluate_channels
    from twotower.pipeline.line import run_line as run
    from twotower.pipeline.serving import serve as run_server
    from twotower.pipeline.versions import PublishedVersion, Recommendations, Vectors, open_version
    from twotower.samples.read import Samples
    from twotower.towers.losses import Scores

__all__ = [
    "Candidates",
    "PublishedVersion",
    "Queries",
    "Recommendations",
    "Retriever",
    "Samples",
    "Scores",
    "Settings",
    "Vectors",
    "build_samples",
    "choose_fusion",
    "evaluate_channels",
    "evaluate_model",
    "import_tables",
    "load",
    "open_version",
    "publish_version",
    "run",
    "run_server",
    "simulate",
    "train_model",
]

_HOMES = {
    "Candidates": "channels.retriever.Candidates",
    "PublishedVersion": "pipeline.versions.PublishedVersion",
    "Queries": "channels.retriever.Queries",
    "Recommendations": "pipeline.versions.Recommendations",
    "Retriever": "channels.retriever.Retriever",
    "Samples": "samples.read.Samples",
    "Scores": "towers.losses.Scores",
    "Settings": "config.settings.Settings",
    "Vectors": "pipeline.versions.Vectors",
    "build_samples": "pipeline.line.build_samples",
    "choose_fusion": "pipeline.fuse.fuse",
    "evaluate_channels": "pipeline.line.evaluate_channels_of",
    "evaluate_model": "pipeline.line.evaluate_model",
    "import_tables": "pipeline.data.import_tables",
    "load": "config.load.load",
    "open_version": "pipeline.versions.open_version",
    "publish_version": "pipeline.line.publish_version",
    "run": "pipeline.line.run_line",
    "run_server": "pipeline.serving.serve",
    "simulate": "pipeline.data.simulate",
    "train_model": "pipeline.line.train_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'twotower' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, attribute = _HOMES[name].rpartition(".")
    value = getattr(import_module(f"twotower.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
