"""Recomputed activations: the same gradients, the attention run again in the backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import in_precision

from nemo_selfpref.config.model_schema import Recompute
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.data.batching import collate
from nemo_selfpref.megatron.attention import PackedCoreAttention
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import SFTObjective

ROWS = [((5, 6, 7), (8, 9, 2)), ((5, 6), (8, 11, 12, 2))]
LAYERS = 4


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", [Recompute.selective, Recompute.full])
def test_recomputing(
    policy: Policy,
    kind: Recompute,
    share: bool,
    llama_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0
    attend = PackedCoreAttention.forward

    def counted(self: PackedCoreAttention, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(PackedCoreAttention, "forward", counted)
    rows = [ROWS[0], (ROWS[0][0], ROWS[1][1])]

    def gradients(made: Policy) -> list[torch.Tensor]:
        batch = collate(rows, [0, 1], paired=False, share_prompts=share)
        made.train_batch([batch], SFTObjective(), StepInputs(torch.ones(2)))
        return [p.main_grad.clone() for p in made.module.parameters()]  # type: ignore[attr-defined]

    plain = gradients(policy)
    assert calls == LAYERS
    other = in_precision(policy, Precision.fp32, llama_folder, recompute_granularity=kind)
    again = gradients(other)
    assert calls == 3 * LAYERS
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
