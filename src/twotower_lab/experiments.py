"""What is claimed, and the experiments that test it: a table to be read on its own.

An arm is a list of changes to a configuration, `section.key=value` as after `--set`. Its first arm is what the others
of an experiment are compared with in the plot. Everything here is fixed before a run; what a run finds stands in its
report, and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Kind = Literal["train", "channels", "index", "fusion", "feedback", "updates"]

ALONE: Final = ('models.channels=["two_tower"]', "models.rankers=[]")
"""The two towers by themselves, unless an experiment is about more."""


@dataclass(frozen=True)
class WorldData:
    """A simulated world; each seed makes another one, with other users."""

    users: int
    items: int
    days: int
    """Of its log, the last of which is held out; but a feedback loop learns from all and goes on after it."""
    config: str = "demo.toml"
    changes: tuple[str, ...] = ALONE
    seeds: int = 6


@dataclass(frozen=True)
class LogData:
    """A real log; seeds are those of the model, the users stay the same."""

    dataset: str
    folder: str
    """In the folder of data."""
    holdout: str | None
    config: str
    positive: str = "all"
    changes: tuple[str, ...] = ALONE
    seeds: int = 5
    until: str | None = None
    """The last day."""


_ROOM: Final = "samples.vocabulary_room=1"
_NONE_PREFERRED: Final = "train.logit_adjustment=0"
"""It is of a softmax alone, and losses are compared; nor is it what any experiment asks about."""

WORLD, KUAIRAND, MOVIELENS, GLOBO = "world", "kuairand", "movielens", "globo"

DATA: Final[Mapping[str, WorldData | LogData]] = {
    WORLD: WorldData(users=2000, items=1500, days=7),
    "large_world": WorldData(users=2000, items=24_000, days=5, seeds=4),
    "small_world": WorldData(
        users=700,
        items=800,
        days=4,
        seeds=5,
        changes=(*ALONE, "train.epochs=3", "samples.days=7", "index.kind='exact'"),
    ),
    KUAIRAND: LogData("kuairand", "kuairand", "since:2022-05-03", "kuairand.toml", changes=(*ALONE, _NONE_PREFERRED)),
    "stream_world": WorldData(users=2000, items=1500, days=12, seeds=3, changes=(*ALONE, "index.kind='exact'", _ROOM)),
    "long_world": WorldData(
        users=500,
        items=500,
        days=68,
        seeds=3,
        changes=(*ALONE, "index.kind='exact'", "train.epochs=3", "samples.days=7", _ROOM),
    ),
    GLOBO: LogData(
        "globo",
        "globo",
        None,
        "globo.toml",
        changes=(*ALONE, "index.kind='exact'", "samples.vocabulary_room=8", _NONE_PREFERRED),
        seeds=1,
        until="2017-10-10",
    ),
    MOVIELENS: LogData(
        "movielens-1m",
        "ml-1m",
        "time:0.9",
        "movielens.toml",
        changes=(*ALONE, _NONE_PREFERRED),
        positive="4",
        seeds=3,
    ),
}
"""What experiments run on, by name."""


@dataclass(frozen=True)
class Way:
    """How a model goes on after the first days."""

    nightly: Literal["no", "full", "anew"] = "no"
    """`full`: the full update of the day before, at midnight; `anew`: trained as at first, on all days so far."""
    every_min: int | None = None
    """Minutes between two deltas; None = there are none."""
    crowd: Literal["popular", "item_cf"] | None = None
    """In place of the model what was clicked in the hour before."""

    def __str__(self) -> str:
        """In words; nothing where the model stays as it is.

        >>> str(Way("full", 60)), str(Way())
        ('full update every night, deltas every 60 min', '')
        """
        words = {"no": "", "full": "full update every night", "anew": "trained anew every night"}[self.nightly]
        if self.every_min:
            words += f"{', ' if words else ''}deltas every {self.every_min} min"
        return f"`{self.crowd}` of the hour before" if self.crowd else words


@dataclass(frozen=True)
class Arm:
    """One way to do it."""

    changes: tuple[str, ...] = ()
    on: tuple[str, ...] = ()
    """The data that it can run on; empty = all of the experiment's."""
    way: Way = Way()
    """`updates`: how it goes on."""

    @property
    def described(self) -> list[str]:
        """Its changes, and its way in words."""
        return [*self.changes, *([str(self.way)] if str(self.way) else [])]


@dataclass(frozen=True)
class Claim:
    """That one arm is better than others, or greater than nothing."""

    text: str
    better: str
    than: tuple[str, ...] = ()
    """It is to be better than the best of these; empty = its own figure is to be above zero."""
    logged: str | None = "recall@50"
    """Measured against the clicks of the log; None = that cannot be."""
    true: str = "true_recall@50"
    """Measured against what users like by the truth of a world."""
    lower: bool = False
    """Less is better."""


@dataclass(frozen=True)
class Experiment:
    """A question, the arms that answer it, and what is claimed of them."""

    question: str
    why: str
    arms: Mapping[str, Arm]
    claims: tuple[Claim, ...]
    data: tuple[str, ...] = (WORLD, KUAIRAND)
    base: tuple[str, ...] = ()
    """Changes in every arm."""
    kind: Kind = "train"
    """`train`: each arm is a model; `channels`: of one set of models, each channel and their fusion; `index`: of one
    model, several indexes; `fusion`: of one version, rankers behind more or fewer candidates; `feedback`: each arm
    serves a world, day after day; `updates`: of one first model, each arm goes on through the last days in its way."""
    plotted: tuple[tuple[str, str | None], ...] = (("true_recall@50", "recall@50"),)
    """Pairs of measures, by the truth and by the log, that the plot shows."""
    loop_days: int = 0
    """`feedback`: days served after the first log. `updates`: the last days of the log, which are replayed."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further measures that the table of the report has, with what they are."""


_IDS = (
    'features.user={ user_id = { kind = "categorical" }, history = { kind = "sequence", last = 50 } }',
    'features.item={ item_id = { kind = "categorical" } }',
    "features.context={}",
)
_NO_HARD = "samples.negatives.hard_share=0"
_UNCORRECTED = "samples.negatives.uncorrected_for_experiments=true"
_DOWN = 'samples.hot={ form = "sqrt", threshold = 1.0 }'
_UP = 'samples.cold={ form = "sqrt", threshold = 0.5 }'
_POPULARITY = {"pop_pct@50": "mean popularity percentile of the first 50"}
_EXPLORE = "funnel.explore_share=1.0"
_AWAY, _PAIRS = "update.negatives_move=true", "update.negatives_move=false"
_UPDATE_FACTS = {"delta_ms": "processor milliseconds of a delta", "night_s": "processor seconds of a full update"}


def _easy(in_batch: float = 0, uniform: float = 0, clicks: float = 0) -> str:
    return f"samples.negatives.easy={{ in_batch = {in_batch}, uniform = {uniform}, clicks = {clicks} }}"


def _network(name: str) -> tuple[str, ...]:
    return tuple(f'models.{side}_tower={{ network = "{name}", layers = [128, 64] }}' for side in ("user", "item"))


def _found(text: str, better: str, *than: str) -> Claim:
    return Claim(text, better, than, "recall@20", "true_recall@20")


def _late(text: str, better: str, *than: str) -> Claim:
    return Claim(text, better, than, "recall@20, last days", "true_recall@20, last days")


EXPERIMENTS: Final[Mapping[str, Experiment]] = {
    "features": Experiment(
        "Are features better than ids alone, and what do they do for new users and new items?",
        "An id has to be clicked before anything is known of it; a feature is known from the first moment.",
        {
            "ids and features": Arm(),
            "ids alone": Arm(_IDS),
            "no id dropout": Arm(("train.id_dropout=0.0",)),
            "id dropout 0.5": Arm(("train.id_dropout=0.5",)),
        },
        (
            Claim("Features and ids find more than ids alone", "ids and features", ("ids alone",)),
            Claim(
                "For new users, features find more than ids alone",
                "ids and features",
                ("ids alone",),
                "new_user recall@50",
                "new_user true_recall@50",
            ),
            Claim(
                "Of new items, features find more than ids alone",
                "ids and features",
                ("ids alone",),
                "new_item recall@50",
                "new_item true_recall@50",
            ),
            Claim(
                "Of new items, more is found when ids are left out more often in training",
                "id dropout 0.5",
                ("no id dropout",),
                "new_item recall@50",
                "new_item true_recall@50",
            ),
        ),
        plotted=(
            ("true_recall@50", "recall@50"),
            ("new_user true_recall@50", "new_user recall@50"),
            ("new_item true_recall@50", "new_item recall@50"),
        ),
    ),
    "losses": Experiment(
        "Which loss finds most: pointwise, pairwise or listwise?",
        "A loss over one pair at a time says nothing of the rest of the catalogue, which retrieval ranks as a whole.",
        {
            "listwise": Arm(),
            "pairwise, hinge": Arm(('train.loss="triplet_hinge"',)),
            "pairwise, logistic": Arm(('train.loss="triplet_logistic"',)),
            "pointwise": Arm(
                (
                    'train.loss="pointwise"',
                    _easy(uniform=1),
                    "samples.negatives.shared=false",
                    "samples.negatives.count=3",
                    "train.pointwise_negatives=3.0",
                )
            ),
        },
        (
            Claim(
                "A listwise loss finds more than pairwise and pointwise ones",
                "listwise",
                ("pairwise, hinge", "pairwise, logistic", "pointwise"),
            ),
            Claim("The pairwise logistic loss finds more than the pointwise one", "pairwise, logistic", ("pointwise",)),
            Claim("The pairwise logistic loss finds more than hinge", "pairwise, logistic", ("pairwise, hinge",)),
        ),
        data=(WORLD, KUAIRAND, MOVIELENS),
        base=(_NO_HARD,),
        facts=_POPULARITY,
    ),
    "hot_and_cold": Experiment(
        "Does it help to take fewer positives of hot items and more of cold ones?",
        "A few items have most of the clicks; left as they are, they are most of what is learned.",
        {
            "as clicked": Arm(),
            "hot down, sqrt": Arm((_DOWN,)),
            "hot down, power .75": Arm(('samples.hot={ form = "power", threshold = 1.0 }',)),
            "hot down, word2vec": Arm(('samples.hot={ form = "word2vec", threshold = 1.0 }',)),
            "cold up, sqrt": Arm((_UP,)),
            "both, sqrt": Arm((_DOWN, _UP)),
        },
        (
            Claim("Down-sampling of hot items finds more", "hot down, sqrt", ("as clicked",)),
            Claim("Over-sampling of cold items finds more", "cold up, sqrt", ("as clicked",)),
            Claim(
                "Both together find more of rare items",
                "both, sqrt",
                ("as clicked",),
                "rare recall@50",
                "rare true_recall@50",
            ),
        ),
        plotted=(("true_recall@50", "recall@50"), ("rare true_recall@50", "rare recall@50")),
        facts=_POPULARITY,
    ),
    "easy_negatives": Experiment(
        "Where should easy negatives come from, and does log q matter?",
        "In-batch negatives are drawn by clicks: without log q, popular items are pushed away for being popular.",
        {
            "in-batch, log q": Arm((_easy(in_batch=1),)),
            "in-batch, no log q": Arm((_easy(in_batch=1), _UNCORRECTED)),
            "uniform": Arm((_easy(uniform=1),)),
            "clicks^.75": Arm((_easy(clicks=1),)),
            "half in-batch, half uniform": Arm((_easy(in_batch=0.5, uniform=0.5),)),
            "in-batch, uniform and clicks^.75": Arm((_easy(in_batch=0.5, uniform=0.25, clicks=0.25),)),
        },
        (
            Claim("With log q, in-batch negatives find more", "in-batch, log q", ("in-batch, no log q",)),
            Claim("In-batch negatives with log q find more than uniform ones", "in-batch, log q", ("uniform",)),
            Claim("clicks^.75 finds more than uniform", "clicks^.75", ("uniform",)),
            Claim(
                "A mixture with uniform ones finds more than in-batch alone",
                "half in-batch, half uniform",
                ("in-batch, log q",),
            ),
            Claim(
                "Of new items, a mixture with uniform ones finds more than in-batch alone",
                "half in-batch, half uniform",
                ("in-batch, log q",),
                "new_item recall@50",
                "new_item true_recall@50",
            ),
        ),
        base=(_NO_HARD,),
        plotted=(("true_recall@50", "recall@50"), ("new_item true_recall@50", "new_item recall@50")),
        facts=_POPULARITY,
    ),
    "shown": Experiment(
        "Is what was shown and not clicked a negative of retrieval?",
        "It came through the whole funnel, among the best there was: as a negative it teaches to avoid good items.",
        {
            "no hard negatives": Arm((_NO_HARD,)),
            "shown ones among the hard": Arm(
                (
                    "samples.negatives.hard_share=0.5",
                    "samples.negatives.impressed_as_negatives_for_experiments=true",
                ),
                on=(WORLD,),  # KuaiRand has no requests, which tell what was shown beside a click
            ),
            "rejected ones alone": Arm(("samples.negatives.hard_share=0.5",), on=(WORLD,)),
            "shown as weak positives": Arm((_NO_HARD, "samples.impressed_weight=0.1")),
        },
        (
            Claim(
                "Shown items as hard negatives find less than no hard ones",
                "no hard negatives",
                ("shown ones among the hard",),
            ),
            Claim(
                "Rejected ones alone find more than with shown ones among them",
                "rejected ones alone",
                ("shown ones among the hard",),
            ),
            Claim("Shown items as weak positives find more", "shown as weak positives", ("no hard negatives",)),
        ),
        facts=_POPULARITY,
    ),
    "hard_negatives": Experiment(
        "How many negatives should be hard ones, and from which stage?",
        "Easy negatives teach the wide view, rejected ones the near one; all hard, and the wide view is lost.",
        {
            "0": Arm((_NO_HARD,)),
            ".25": Arm(("samples.negatives.hard_share=0.25",)),
            ".5": Arm(("samples.negatives.hard_share=0.5",)),
            ".75": Arm(("samples.negatives.hard_share=0.75",)),
            "1": Arm(("samples.negatives.hard_share=1",)),
            ".5, pre-rank rejected": Arm(
                (
                    "samples.negatives.hard_share=0.5",
                    "samples.negatives.hard={ pre_rank_rejected = 1, rank_rejected = 0 }",
                )
            ),
            ".5, rank rejected": Arm(
                (
                    "samples.negatives.hard_share=0.5",
                    "samples.negatives.hard={ pre_rank_rejected = 0, rank_rejected = 1 }",
                )
            ),
        },
        (
            Claim("Half hard ones find more than none", ".5", ("0",)),
            Claim("Half hard ones give better pages than none", ".5", ("0",), "ndcg@20", "page_clicks"),
            Claim("All hard ones find less than half", ".5", ("1",)),
            Claim(
                "Rejects of the pre-ranker teach more than those of the ranker",
                ".5, pre-rank rejected",
                (".5, rank rejected",),
            ),
        ),
        data=(WORLD,),
        plotted=(("true_recall@50", "recall@50"), ("page_clicks", "ndcg@20")),
        facts=_POPULARITY,
    ),
    "networks": Experiment(
        "Is DCN-v2 better than fully connected layers?",
        "Crosses multiply features, which layers can only approximate; two towers have few features each to cross.",
        {"DNN": Arm(_network("dnn")), "DCN-v2": Arm(_network("dcn"))},
        (Claim("DCN-v2 finds more than a DNN", "DCN-v2", ("DNN",)),),
        facts={"train_s": "processor seconds of training"},
    ),
    "late_and_early": Experiment(
        "Is early fusion better than late fusion, and what does it cost?",
        "Where user and item meet in one network it can say more than a cosine; but it must score every item.",
        {
            "two towers": Arm(("models.rankers=[]",)),
            "ranker over everything": Arm(('models.rankers=["rank"]', "funnel.retrieve=10000000")),
            "pre-ranker over everything": Arm(
                ('models.rankers=["pre_rank"]', "funnel.retrieve=10000000", "funnel.pre_rank=10000000")
            ),
            "two towers, ranker": Arm(('models.rankers=["rank"]', "funnel.retrieve=200", "funnel.pre_rank=200")),
            "two towers, pre-ranker, ranker": Arm(("funnel.retrieve=400", "funnel.pre_rank=100")),
            "the same, with the cosine": Arm(("funnel.retrieve=400", "funnel.pre_rank=100", "funnel.cosine=4")),
        },
        (
            Claim("A ranker over everything finds more than two towers", "ranker over everything", ("two towers",)),
            Claim(
                "A ranker behind two towers gives better pages than two towers alone",
                "two towers, ranker",
                ("two towers",),
                "ndcg@20",
                "page_clicks",
            ),
            Claim(
                "A ranker over everything gives better pages than one behind two towers",
                "ranker over everything",
                ("two towers, ranker",),
                "ndcg@20",
                "page_clicks",
            ),
            Claim(
                "The whole funnel gives better pages than two towers and ranker",
                "two towers, pre-ranker, ranker",
                ("two towers, ranker",),
                "ndcg@20",
                "page_clicks",
            ),
            Claim(
                "Where rankers count the towers' cosine too, pages are better than by the two towers alone",
                "the same, with the cosine",
                ("two towers",),
                "ndcg@20",
                "page_clicks",
            ),
            Claim(
                "Over a million items, two towers and ranker cost less than the pre-ranker alone",
                "two towers, ranker",
                ("pre-ranker over everything",),
                "ms, million items",
                "ms, million items",
                lower=True,
            ),
        ),
        base=('models.rankers=["pre_rank", "rank"]', "funnel.cosine=0"),
        kind="fusion",
        plotted=(("true_recall@50", "recall@50"), ("page_clicks", "ndcg@20")),
        facts={
            "ms": "processor milliseconds for a user of this catalogue",
            "ms, million items": "the same over a million items, searched exactly",
        },
    ),
    "channels": Experiment(
        "Do several channels, fused, find more than the best of them alone?",
        "Each channel knows what another does not: the last click, the crowd, the category, the new.",
        {name: Arm() for name in ("fused", "two_tower", "mf", "item_cf", "same_category", "popular")},
        (
            Claim(
                "The fused list finds more than any channel alone",
                "fused",
                ("two_tower", "mf", "item_cf", "same_category", "popular"),
            ),
            Claim(
                "The two towers find more than any other channel",
                "two_tower",
                ("mf", "item_cf", "same_category", "popular"),
            ),
            Claim(
                "The two towers find more of rare items than ItemCF",
                "two_tower",
                ("item_cf",),
                "rare recall@50",
                "rare true_recall@50",
            ),
        ),
        base=('models.channels=["two_tower", "mf", "item_cf", "same_category", "popular"]', "fusion.depth=100"),
        kind="channels",
        plotted=(("true_recall@50", "recall@50"), ("rare true_recall@50", "rare recall@50")),
        facts=_POPULARITY,
    ),
    "index": Experiment(
        "What does an approximate index cost in what is found at the end?",
        "An index is tuned by the share of the exact neighbours that it finds, and may miss those that nobody wants.",
        {
            "exact": Arm(('index.kind="exact"',)),
            ".99": Arm(("index.recall=0.99",)),
            ".95": Arm(("index.recall=0.95",)),
            ".8": Arm(("index.recall=0.8",)),
            ".5": Arm(("index.recall=0.5",)),
        },
        (
            Claim("Exact search finds more than an index of recall .99", "exact", (".99",)),
            Claim("Exact search finds more than an index of recall .8", "exact", (".8",)),
            Claim(
                "An index keeps more of what exact search finds than its own recall says",
                ".8",
                (),
                "spared recall@50",
                "spared true_recall@50",
            ),
        ),
        data=("large_world",),
        kind="index",
        facts={"index_recall@50": "share of the exact neighbours found", "scanned": "lists searched for 50"},
    ),
    "feedback": Experiment(
        "Does popularity bias grow when a system learns from what it showed itself, and what holds it?",
        "What is shown can be clicked, what is clicked is learned, what is learned is shown.",
        {
            "as configured": Arm(),
            "learns no more": Arm(('samples.last_day="2026-01-07"',)),
            "no log q": Arm((_UNCORRECTED,)),
            "exploration": Arm((_EXPLORE,)),
            "hot down": Arm((_DOWN,)),
            "exploration, hot down": Arm((_EXPLORE, _DOWN)),
        },
        (
            Claim("Left alone, exposure becomes more unequal", "as configured", (), None, "gini, growth"),
            Claim(
                "It is the loop that makes it so",
                "as configured",
                ("learns no more",),
                None,
                "gini, growth",
            ),
            Claim("log q holds it", "as configured", ("no log q",), None, "gini, last days", lower=True),
            Claim(
                "An exploration slot holds it", "exploration", ("as configured",), None, "gini, last days", lower=True
            ),
            Claim(
                "Down-sampling of hot items holds it",
                "hot down",
                ("as configured",),
                None,
                "gini, last days",
                lower=True,
            ),
            Claim(
                "Exploration and down-sampling give better pages in the end",
                "exploration, hot down",
                ("as configured",),
                None,
                "page_clicks, last days",
            ),
            Claim(
                "Learning every day gives better pages than learning no more",
                "as configured",
                ("learns no more",),
                None,
                "page_clicks, last days",
            ),
            Claim(
                "The loop finds less and less of what users like",
                "as configured",
                (),
                "recall@50, growth",
                "true_recall@50, growth",
                lower=True,
            ),
            Claim(
                "With exploration, more of what users like is found in the end",
                "exploration",
                ("as configured",),
                "recall@50, last days",
                "true_recall@50, last days",
            ),
        ),
        data=("small_world",),
        base=(_NO_HARD, "funnel.explore_share=0.0", "funnel.retrieve=400", "funnel.pre_rank=400"),
        kind="feedback",
        loop_days=14,
    ),
    "updates": Experiment(
        "What does it bring to learn every night, through the day, or both?",
        "What is wanted changes by the hour; a model of yesterday knows nothing of it, one that only follows the hour "
        "forgets the rest.",
        {
            "frozen": Arm(),
            "nightly": Arm(way=Way("full")),
            "nightly, in order": Arm(("train.order='time'",), way=Way("full")),
            "hourly, pairs": Arm((_PAIRS,), way=Way(every_min=60)),
            "nightly and hourly, pairs": Arm((_PAIRS,), way=Way("full", 60)),
            "hourly": Arm((_AWAY,), way=Way(every_min=60)),
            "nightly and hourly": Arm((_AWAY,), way=Way("full", 60)),
            "popular, last hour": Arm(way=Way(crowd="popular")),
            "ItemCF, last hour": Arm(way=Way(crowd="item_cf")),
        },
        (
            _found("Both updates find more than either", "nightly and hourly", "nightly", "hourly"),
            _found(
                "Both find more than either where only pairs move",
                "nightly and hourly, pairs",
                "nightly",
                "hourly, pairs",
            ),
            _found("Any update finds more than none", "nightly", "frozen"),
            _found("The nightly update finds more than the hourly one", "nightly", "hourly"),
            _found("It does where only pairs move", "nightly", "hourly, pairs"),
            _found("A shuffled day teaches more than one in its order", "nightly", "nightly, in order"),
            _found("More is found where negatives move", "nightly and hourly", "nightly and hourly, pairs"),
            Claim(
                "Both find more than the favourites and the neighbours of the hour before",
                "nightly and hourly",
                ("popular, last hour", "ItemCF, last hour"),
                "recall@20",
                "recall@20",
            ),
        ),
        data=("stream_world", GLOBO),
        kind="updates",
        plotted=(("true_recall@20", "recall@20"),),
        loop_days=6,
        facts=_UPDATE_FACTS,
    ),
    "update_intervals": Experiment(
        "How often should it learn?",
        "The sooner a click is learned, the sooner it helps; the fewer clicks a step has, the more it jumps.",
        {
            "1 day": Arm(way=Way("full", 1440)),
            "5 h": Arm(way=Way("full", 300)),
            "1 h": Arm(way=Way("full", 60)),
            "5 min": Arm(way=Way("full", 5)),
            "1 min": Arm(way=Way("full", 1)),
        },
        (
            _found("Every five hours finds more than every day", "5 h", "1 day"),
            _found("Every hour finds more than every five hours", "1 h", "5 h"),
            _found("Every five minutes finds more than every hour", "5 min", "1 h"),
            _found("Every minute finds more than every five minutes", "1 min", "5 min"),
        ),
        data=("stream_world", GLOBO),
        base=(_AWAY,),
        kind="updates",
        plotted=(("true_recall@20", "recall@20"),),
        loop_days=6,
        facts=_UPDATE_FACTS,
    ),
    "update_tables": Experiment(
        "Should the embeddings of users move through the day, of items, or both?",
        "Where only users move, item vectors stay as they are until the night: less to publish, and less to learn.",
        {
            "none": Arm(),
            "users": Arm(("update.tables=['user_id']",), way=Way(every_min=60)),
            "items": Arm(("update.tables=['item_id']",), way=Way(every_min=60)),
            "users and items": Arm(way=Way(every_min=60)),
            "users and items, pairs": Arm((_PAIRS,), way=Way(every_min=60)),
        },
        (
            _found("Moving users finds more than moving nothing", "users", "none"),
            _found("Moving both finds more than users alone", "users and items", "users"),
            _found("Moving both finds more than items alone", "users and items", "items"),
        ),
        data=("stream_world", GLOBO),
        base=(_AWAY, 'features.user.user_id={ kind = "categorical" }'),
        kind="updates",
        plotted=(("true_recall@20", "recall@20"),),
        loop_days=6,
        facts=_UPDATE_FACTS,
    ),
    "sixty_days": Experiment(
        "Does a model that is only ever updated decay?",
        "Each night begins with the parameters and the optimizer of the night before, never anew: errors may add up, "
        "and accumulators that only grow stop what they slow.",
        {
            "trained anew": Arm(way=Way("anew")),
            "full update": Arm(way=Way("full")),
            "full update, accumulators only grow": Arm(("update.decay=1.0",), way=Way("full")),
            "frozen": Arm(),
        },
        (
            _late("After sixty nights the full update finds more than no update", "full update", "frozen"),
            _late("It finds more than a model trained anew", "full update", "trained anew"),
            _late("It finds more where accumulators decay", "full update", "full update, accumulators only grow"),
            Claim(
                "Embeddings of hot items still move",
                "full update",
                (),
                "hot_moves, last days",
                "hot_moves, last days",
            ),
        ),
        data=("long_world",),
        kind="updates",
        plotted=(("true_recall@20, last days", "recall@20, last days"),),
        loop_days=60,
        facts={
            "hot_moves, last days": "how far hot items' embeddings move in a night, in their lengths, last ten nights",
            "recall@20, growth": "last ten days minus first ten",
            "true_recall@20, growth": "last ten days minus first ten",
        },
    ),
}
"""By the name that `twotower lab run` takes, in the order of the report."""
