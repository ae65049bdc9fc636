"""Conservative DPO: DPO for labels that are sometimes wrong."""

from dataclasses import dataclass

from nemo_selfpref.algorithms.base import register
from nemo_selfpref.algorithms.dpo import DPO, DPOConfig
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.errors import ConfigError


@dataclass
class CDPOConfig(DPOConfig):
    name: str = "cdpo"
    label_smoothing: float = 0.1


@register("cdpo")
class CDPO(DPO):
    """-(1 - e) logsigmoid(beta h) - e logsigmoid(-beta h), e = label_smoothing (Mitchell 2023)."""

    summary = "DPO that takes each label to be wrong with a given probability"
    paper = "Mitchell 2023"
    config_class = CDPOConfig

    def check(self, cfg: RunConfig) -> None:
        super().check(cfg)
        if self.config.label_smoothing == 0:
            raise ConfigError("algorithm.label_smoothing=0: that is dpo; expected 0 < e < 0.5")
