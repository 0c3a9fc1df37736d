"""Options of training, and of the search for settings."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.schema.options import (
    STRICT,
    AtLeastOne,
    NotNegative,
    Positive,
    PositiveReal,
    Rate,
    Text,
    Threads,
    Whole,
)


@dataclass(frozen=True, config=STRICT)
class TrainOptions:
    """How the towers are trained."""

    loss: Literal["pointwise", "triplet_hinge", "triplet_logistic", "sampled_softmax", "corrected_log_q", "bsl"] = (
        "sampled_softmax"
    )
    """The loss that is minimised."""
    temperature: PositiveReal = 0.07
    """Divides the cosine in a softmax: `sampled_softmax`, `corrected_log_q`, `bsl`."""
    positive_temperature: PositiveReal | None = None
    """`bsl`: divides the positive's cosine; absent = as `temperature`."""
    margin: PositiveReal = 0.4
    """`triplet_hinge`: how much nearer than a negative a positive should be."""
    sigma: PositiveReal = 10.0
    """`triplet_logistic`: multiplies the difference of the cosines."""
    scale: AtLeastOne = 10.0
    """`pointwise`: initial scale of the cosine; the scale is learned."""
    pointwise_negatives: PositiveReal = 3.0
    """`pointwise`: weight of all negatives of a positive, where the positive weighs 1."""
    logit_adjustment: NotNegative = 0.0
    """`sampled_softmax`, `corrected_log_q`, `bsl`: how strongly popular items are preferred at serving time. Candidates
    are ordered by log P(item | user) + `logit_adjustment` x log P(item); two more numbers in all vectors carry this.
    Choose it on a validation part, from 0 to 0.6. With `half_life_days`, older clicks count less here too."""
    batch_size: Positive = 4096
    """Positives in a step."""
    epochs: Positive = 10
    """Passes over the positives in the bootstrap; a full update is always one."""
    seed: Whole = 0
    """Seed of the initial weights, the order of rows and everything else that is drawn."""
    learning_rate: Rate = 0.001
    """Learning rate of the networks (Adam)."""
    table_learning_rate: Rate = 0.05
    """Learning rate of the embedding tables (row-wise Adagrad)."""
    schedule: Literal["constant", "linear"] = "constant"
    """`linear`: both rates fall to zero over the whole run."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of the networks."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a tower's hidden units left out in training."""
    id_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of ids that training replaces by the unknown id, so that features alone place new users and items."""
    horizon: Whole = 0
    """A training row's history leaves out up to this many of its latest clicks, a number drawn evenly. 0 teaches what
    is clicked next, more teaches what is clicked later too. For data with time."""
    half_life_days: PositiveReal | None = None
    """Days before the latest request after which a positive counts half; absent = age does not matter."""
    order: Literal["shuffled", "time"] = "shuffled"
    """Order of the positives of an epoch. `time`: as they were clicked, so that the latest are learned last; for data
    with time."""
    checkpoint_s: PositiveReal = 60.0
    """Seconds between checkpoints that a killed run resumes from."""
    threads: Threads = 2
    """Threads that compute a step."""

    @property
    def is_softmax(self) -> bool:
        """The loss estimates a softmax over the catalogue: negatives are corrected for how often each is drawn."""
        return self.loss in ("sampled_softmax", "corrected_log_q", "bsl")

    def __post_init__(self) -> None:
        """Refuse a logit adjustment of a loss that is no softmax."""
        if self.logit_adjustment and not self.is_softmax:
            raise ValueError(
                f"logit_adjustment = {self.logit_adjustment:g} is for a softmax, and the loss is "
                f"{self.loss}: set it to 0"
            )


@dataclass(frozen=True, config=STRICT)
class Span:
    """The values that a key may take: `{ low = 0.05, high = 0.2, log = true }` or `{ choices = [64, 128] }`."""

    low: Annotated[float, Field(allow_inf_nan=False)] | None = None
    high: Annotated[float, Field(allow_inf_nan=False)] | None = None
    log: bool = False
    """Values are drawn evenly on a logarithmic scale."""
    whole: bool = False
    """Whole numbers only."""
    choices: list[Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what is neither a range nor a list.

        Raises:
            ValueError: no range, an empty one or list, both, or a logarithm of numbers below 0.
        """
        ranged = self.low is not None and self.high is not None
        if self.choices is not None:
            if not self.choices or self.low is not None or self.high is not None:
                raise ValueError("give low and high, or choices that are not empty")
        elif not ranged:
            raise ValueError("give low and high, or choices that are not empty")
        elif not (self.low or 0) < (self.high or 0):
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}")
        elif self.log and (self.low or 0) <= 0:
            raise ValueError(f"log needs numbers above 0, and low = {self.low:g}")


@dataclass(frozen=True, config=STRICT)
class TuneOptions:
    """What `twotower train --trials N` tries, and how it judges."""

    space: dict[str, Span] = field(default_factory=dict)
    """Keys of this file, such as `"train.temperature"`, with the values that they may take. Without any, only the
    number of epochs is chosen."""
    holdout: Text | None = None
    """What of the training events is validation, for `twotower fuse` too: `time:Q`, `since:DAY`, `leave-one-out`,
    `pause:DAYS` or, without time, `random:SHARE`; absent = as the workspace's own hold-out was cut."""
    metric: Annotated[str, Field(pattern=r"^(recall|ndcg|hit)@[1-9]\d{0,5}$")] = "recall@50"
    """The metric that is maximised: `recall@K`, `ndcg@K` or `hit@K`."""
    patience: Positive = 3
    """Early stopping: a trial ends after this many epochs that were no better than its best."""
    seed: Whole = 0
    """Seed of the search."""
