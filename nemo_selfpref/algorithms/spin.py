"""Self-play fine-tuning: the data's answer over the last iteration's own (SPIN, sections 4 and 6).

Iteration t samples an answer to every prompt from the policy as it stands, and trains DPO on those
pairs and the ones of iteration t-1, against the policy the iteration began with. SPIN tends towards
the data's own distribution: where the starting policy is better than the data, it loses.
"""

from dataclasses import dataclass, field, replace

from nemo_selfpref.algorithms.base import Algorithm, RunContext, check_positive, register
from nemo_selfpref.algorithms.candidates import sampled_by
from nemo_selfpref.algorithms.reference import (
    ITERATED,
    ReferenceConfig,
    check_reference,
    train_settings,
)
from nemo_selfpref.config.schema import RefMode, RunConfig
from nemo_selfpref.objectives.objective import DPOObjective
from nemo_selfpref.pairing.builders import PairLimits, target_over_sample
from nemo_selfpref.types import Demonstration, PreferencePair, WeightSet


@dataclass
class SPINConfig(ReferenceConfig):
    name: str = "spin"
    iterations: int = 4
    beta: float = 0.1
    last_beta: float = 5.0
    """beta of the last of several iterations."""
    lr_factors: list[float] = field(default_factory=lambda: [1.0, 1.0, 0.2])
    """Each iteration's share of model.optim.lr; further ones take the last."""
    keep_previous: bool = True
    """Train on the pairs of the iteration before as well."""
    ref: RefMode = RefMode.last


@register("spin")
class SPIN(Algorithm):
    summary = "the data's answer over the policy's own, iteration after iteration"
    paper = "Chen et al. 2024"
    config_class = SPINConfig

    def check(self, cfg: RunConfig) -> None:
        for name in ("iterations", "beta", "last_beta"):
            check_positive(f"algorithm.{name}", getattr(self.config, name))
        for factor in self.config.lr_factors or [0.0]:
            check_positive("algorithm.lr_factors", factor)
        check_reference(self.config, ITERATED)

    def asked_weights(self) -> frozenset[WeightSet]:
        return frozenset({WeightSet.POLICY})

    def run(self, run: RunContext) -> None:
        cfg, demos = self.config, run.demonstrations()
        previous: list[PreferencePair] = []
        for t in range(cfg.iterations):
            pairs = _pairs(run, demos, t)
            last = t == cfg.iterations - 1 and t > 0
            factor = cfg.lr_factors[min(t, len(cfg.lr_factors) - 1)]
            optim = replace(run.cfg.model.optim, lr=run.cfg.model.optim.lr * factor)
            run.train(
                f"policy-{t}" if t < cfg.iterations - 1 else "policy",
                previous + pairs,
                DPOObjective(cfg.last_beta if last else cfg.beta),
                replace(train_settings(cfg), optim=optim),
            )
            previous = pairs if cfg.keep_previous else []


def _pairs(run: RunContext, demos: list[Demonstration], iteration: int) -> list[PreferencePair]:
    samples = run.sample(f"answer-{iteration}", [(d.id, d.prompt_ids) for d in demos])
    limits, known = PairLimits(run.cfg.data.max_length), sampled_by(run, iteration=iteration)
    pairs, report = target_over_sample(demos, samples, limits, f"@{iteration}", lambda _: known)
    run.note(f"pairs {iteration}", report)
    return pairs
