"""A whole configuration: the sections that the stages define, under their names."""

from dataclasses import field

from pydantic.dataclasses import dataclass

from twotower.channels.options import ModelsOptions
from twotower.datasets.options import WorkspaceOptions
from twotower.evaluate.options import EvaluateOptions
from twotower.features.options import Features
from twotower.fusion.options import FusionOptions
from twotower.index.options import IndexOptions
from twotower.samples.options import EngineOptions, SamplesOptions
from twotower.schema.options import STRICT
from twotower.serve.options import FunnelOptions, ServeOptions
from twotower.stream.options import StreamOptions
from twotower.towers.options import PreRankOptions, RankOptions
from twotower.train.options import TrainOptions, TuneOptions
from twotower.update.options import UpdateOptions


@dataclass(frozen=True, config=STRICT)
class Settings:
    """A whole configuration: one section a stage."""

    workspace: WorkspaceOptions = field(default_factory=WorkspaceOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    features: Features = field(default_factory=Features)
    samples: SamplesOptions = field(default_factory=SamplesOptions)
    models: ModelsOptions = field(default_factory=ModelsOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    pre_rank: PreRankOptions = field(default_factory=PreRankOptions)
    rank: RankOptions = field(default_factory=RankOptions)
    tune: TuneOptions = field(default_factory=TuneOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    fusion: FusionOptions = field(default_factory=FusionOptions)
    index: IndexOptions = field(default_factory=IndexOptions)
    serve: ServeOptions = field(default_factory=ServeOptions)
    funnel: FunnelOptions = field(default_factory=FunnelOptions)
    stream: StreamOptions = field(default_factory=StreamOptions)
    update: UpdateOptions = field(default_factory=UpdateOptions)
