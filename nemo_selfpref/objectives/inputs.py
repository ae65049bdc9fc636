"""What a loss is given besides the policy's own log-probs, for the rows of one global batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_selfpref.objectives.objective import PairLogps, Pass


@dataclass(frozen=True)
class PassLogps:
    """Response log-prob sums of a pass without gradient, float32 [num_rows] each."""

    chosen: Tensor
    rejected: Tensor

    def of(self, rows: Sequence[int], policy: PairLogps) -> PairLogps:
        """Those of some rows, beside the policy's own of the same rows."""
        index = torch.tensor(rows)
        return PairLogps(
            chosen=self.chosen[index].to(policy.chosen.device),
            chosen_len=policy.chosen_len,
            rejected=self.rejected[index].to(policy.rejected.device),
            rejected_len=policy.rejected_len,
            full_chosen=torch.zeros_like(policy.full_chosen),
            full_chosen_len=policy.full_chosen_len,
        )


@dataclass(frozen=True)
class StepInputs:
    """strength: float32 [num_rows], P(chosen beats rejected). passes: by pass, for all rows."""

    strength: Tensor
    passes: Mapping[Pass, PassLogps] = field(default_factory=dict)
