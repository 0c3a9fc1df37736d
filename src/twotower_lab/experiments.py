"""What is claimed, and the experiments that test it: the classes of the table in `experiments.toml`.

Everything there is fixed before a run. What a run finds stands in its report and nowhere else.
"""

import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import field
from importlib.resources import files
from typing import Any, Final, Literal

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

Kind = Literal["train", "index", "fusion", "ranking", "feedback", "updates"]

_STRICT = ConfigDict(extra="forbid")

EVERYWHERE: Final = ('models.channels=["two_tower"]', "models.rankers=[]", "evaluate.context=false")
"""Changes of every arm, before its own: the two towers alone, and users who are asked without a context."""


@dataclass(frozen=True, config=_STRICT)
class WorldData:
    """A simulated world; each seed makes another one, with other users."""

    users: int
    items: int
    days: int
    """Days of its log. The last one is held out, but a feedback loop learns from all of them and continues after."""
    config: str = "demo.toml"
    changes: tuple[str, ...] = ()
    seeds: int = 6

    def __str__(self) -> str:
        """In words, for reports."""
        return f"simulated, {self.users} users, {self.items} items, {self.days} days"


@dataclass(frozen=True, config=_STRICT)
class LogData:
    """A real log; seeds are those of the model, the users stay the same."""

    dataset: str
    folder: str
    """Its folder in the folder of data."""
    config: str
    holdout: str | None = None
    positive: str = "all"
    until: str | None = None
    """The last day that is imported."""
    changes: tuple[str, ...] = ()
    seeds: int = 5

    def __str__(self) -> str:
        """In words, for reports."""
        return f"{self.dataset}, held out {self.holdout}, positive {self.positive}"


@dataclass(frozen=True, config=_STRICT)
class Way:
    """How a model continues after the first days."""

    nightly: Literal["no", "full", "anew"] = "no"
    """`full`: the full update of the day before, at midnight; `anew`: trained as at first, on all days so far."""
    every_min: int | None = None
    """Minutes between two deltas; None = there are none."""
    crowd: Literal["popular", "item_cf"] | None = None
    """In place of the model: this channel, fitted to the clicks of the hour before."""

    def __str__(self) -> str:
        """In words; nothing where the model stays as it is.

        >>> str(Way("full", 60)), str(Way())
        ('full update every night, deltas every 60 min', '')
        """
        if self.crowd:
            return f"`{self.crowd}` of the hour before"
        night = {"no": [], "full": ["full update every night"], "anew": ["trained anew every night"]}[self.nightly]
        return ", ".join([*night, *([f"deltas every {self.every_min} min"] if self.every_min else [])])


@dataclass(frozen=True, config=_STRICT)
class Arm:
    """One way to do it."""

    changes: tuple[str, ...] = ()
    """Changes of the configuration, as after `--set`."""
    on: tuple[str, ...] = ()
    """The data that it can run on; empty = all data of the experiment."""
    channel: str = "two_tower"
    """`train`: the channel whose lists are judged, `fused` or `ease`. `ranking`: what orders the impressions."""
    way: Way = Way()
    """`updates`: how the model continues."""

    @property
    def described(self) -> list[str]:
        """Its changes, and its way in words."""
        return [*self.changes, *([str(self.way)] if str(self.way) else [])]


@dataclass(frozen=True, config=_STRICT)
class Claim:
    """That one arm is better than others, or its figure above zero."""

    text: str
    better: str
    than: tuple[str, ...] = ()
    """It must be better than the best of these; empty = its own figure must be above zero."""
    logged: str | None = "recall@50"
    """The measure against the clicks of the log; empty = there is none."""
    true: str = "true_recall@50"
    """The measure against what users like by the truth of a world."""
    lower: bool = False
    """Less is better."""

    def measured(self, world: bool) -> dict[str, str]:
        """The measures on a world or on a log by kind, `true` and `logged`; the first one judges the claim."""
        kinds = {"true": self.true} if world else {}
        return kinds | ({"logged": self.logged} if self.logged and self.logged not in kinds.values() else {})


@dataclass(frozen=True, config=_STRICT)
class Experiment:
    """A question, the arms that answer it, and what is claimed of them."""

    question: str
    why: str
    arms: Mapping[str, Arm]
    """The first one is what the others are compared with in the plot."""
    claims: tuple[Claim, ...]
    data: tuple[str, ...] = ("world", "kuairand")
    base: tuple[str, ...] = ()
    """Changes in every arm."""
    kind: Kind = "train"
    """`train`: each arm is a channel of a configuration; `index`: one model, several indexes; `fusion`: one version,
    rankers behind more or fewer candidates; `ranking`: orders of held-out impressions; `feedback`: each arm serves a
    world, day after day; `updates`: each arm continues one first model through the last days in its way."""
    plotted: tuple[tuple[str, str | None], ...] = (("true_recall@50", "recall@50"),)
    """Pairs of measures, by the truth and by the log, that the plot shows."""
    ks: tuple[int, ...] = (50,)
    """Cut-offs of recall."""
    groups: tuple[Literal["thirds", "scenes"], ...] = ()
    """Further groups of held-out clicks, see `twotower_lab.groups`."""
    loop_days: int = 0
    """`feedback`: days served after the first log. `updates`: the last days of the log, which are replayed."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further measures that the table of the report has, with what they are."""


def _read() -> tuple[dict[str, WorldData | LogData], dict[str, Experiment]]:
    """The table: an arm may be written as its list of changes alone, or all of them as the product of `axes`."""
    table: dict[str, Any] = tomllib.loads((files("twotower_lab") / "experiments.toml").read_text(encoding="utf-8"))
    for experiment in table["experiments"].values():
        axes = [list(axis.items()) for axis in experiment.pop("axes", {}).values()]
        arms = {
            ", ".join(name for name, _ in cell): [change for _, changes in cell for change in changes]
            for cell in itertools.product(*axes)
            if cell
        }
        arms |= experiment.get("arms", {})
        experiment["arms"] = {name: arm if isinstance(arm, dict) else {"changes": arm} for name, arm in arms.items()}
    data = TypeAdapter(dict[str, WorldData | LogData]).validate_python(table["data"])
    return data, TypeAdapter(dict[str, Experiment]).validate_python(table["experiments"])


DATA, EXPERIMENTS = _read()
"""What experiments run on, and the experiments in the order of the report, by the names of `twotower lab run`."""
