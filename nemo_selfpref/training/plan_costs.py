"""Operations of a model on sequences of a mean length, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_selfpref.config.model_schema import ArchitectureConfig, Recompute
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.training.plan_method import Asked, Training
from nemo_selfpref.training.plan_weights import parameters


@dataclass(frozen=True)
class Rates:
    """What is given or assumed; None: worked out."""

    rows: int
    prompt_tokens: int
    """Mean tokens of a prompt."""
    answer_tokens: int
    mfu: float
    """Share of the device's peak that computing reaches, waiting and sending left out."""
    tokens_per_second: float | None = None
    """Sampled tokens a second of one device."""
    disk: float = 2e9
    """Bytes a second that the run's file system takes."""


class Costs:
    """Operations of one model on sequences of the mean length."""

    def __init__(self, cfg: RunConfig, arch: ArchitectureConfig, rates: Rates) -> None:
        self.cfg, self.arch, self.rates = cfg, arch, rates
        self.weights, self.active = parameters(arch)

    def layers(self, tokens: float, length: float) -> float:
        """Forward operations of all layers on tokens of sequences of that length: 2 a weight, and
        causal attention's products."""
        channels = self.arch.num_attention_heads * self.arch.kv_channels
        attention = 2 * self.arch.num_layers * channels * length
        return tokens * (2 * self.active + attention)

    def head(self, targets: float) -> float:
        return 2 * self.arch.hidden_size * self.arch.vocab_size * targets

    def trained(self, training: Training, rows: float) -> tuple[float, float, float]:
        """Tokens, model operations and computed operations of training on some rows."""
        r, sides = self.rates, 2 if training.paired else 1
        length = r.prompt_tokens + r.answer_tokens
        shared = training.paired and self.cfg.model.share_prompts
        tokens = rows * (r.prompt_tokens * (1 if shared else sides) + r.answer_tokens * sides)
        targets = rows * sides * r.answer_tokens
        layers, head = self.layers(tokens, length), self.head(targets)
        again = layers if self.cfg.model.recompute_granularity is Recompute.full else 0.0
        passes = len(training.live) * (layers + head)
        # The head computes its logits again in the backward pass.
        return tokens, 3 * (layers + head), 3 * layers + 4 * head + again + passes

    def asked(self, asked: Asked, times: float) -> float:
        """Operations of reading prompts, judging and scoring; sampled tokens left out."""
        length = self.rates.prompt_tokens + self.rates.answer_tokens
        return self.layers(asked.read * times, length) + self.head(
            (asked.judgements + asked.scored * self.rates.answer_tokens) * times
        )
