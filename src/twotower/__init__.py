"""Open two-tower retrieval: from click logs to a served, continuously updated candidate list.

The functions here are the stages of the command line, for Python. A stage is imported when one of its functions is first
used, so that `import twotower` takes milliseconds and PyTorch is loaded only when something trains.

    import twotower as tt

    tt.import_tables("workspace", clicks, holdout="time:0.9")
    settings = tt.load({"train": {"epochs": 5}}, workspace="workspace")
    tt.run(settings)
    tt.open_version(settings).retrieve([1, 2, 3], k=10).to_pandas()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twotower.config.load import load
    from twotower.config.settings import Settings
    from twotower.pipeline.data import import_tables, simulate
    from twotower.pipeline.line import build_samples, evaluate_model, publish_version, run, train_model
    from twotower.pipeline.serving import run_server
    from twotower.pipeline.versions import PublishedVersion, Recommendations, Vectors, open_version

__all__ = [
    "PublishedVersion",
    "Recommendations",
    "Settings",
    "Vectors",
    "build_samples",
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

_MODULES = {
    "config.load": ("load",),
    "config.settings": ("Settings",),
    "pipeline.data": ("import_tables", "simulate"),
    "pipeline.line": ("build_samples", "evaluate_model", "publish_version", "run", "train_model"),
    "pipeline.serving": ("run_server",),
    "pipeline.versions": ("PublishedVersion", "Recommendations", "Vectors", "open_version"),
}
_HOMES = {name: f"twotower.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'twotower' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
