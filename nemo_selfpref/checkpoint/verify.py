"""The gate of an export: transformers must compute what we compute.

Log-probs of every vocabulary entry at every position of some prompts are compared between the
trained model and the folder as transformers loads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.megatron.decode import KVDecoder
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.types import TokenIds

PROBES = (
    "What is the capital of France?",
    "List three prime numbers larger than ten.",
    "Write one sentence about the sea.",
    "Translate 'good morning' into Spanish.",
    "if x > 3:\n    print('yes')",
    "Explain, in two steps, how to boil an egg.",
    "2, 4, 8, 16, ... what comes next, and why?",
    "Überprüfe: ist 91 eine Primzahl?",
)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Largest logit difference accepted. bfloat16 keeps 8 bits, so logits near 10 move by 0.05."""


@dataclass(frozen=True)
class Comparison:
    """Difference of two models' last-token logits over some prompts."""

    prompts: int
    max_difference: float
    top1_equal: int

    def check(self, tolerance: float, where: Path) -> None:
        """Raise CheckpointError unless the logits agree."""
        if self.max_difference > tolerance or self.top1_equal != self.prompts:
            raise CheckpointError(
                f"{where}: its logits differ from the trained model's by up to "
                f"{self.max_difference:.3g} (at most {tolerance:g} is accepted); the best token "
                f"agrees for {self.top1_equal} of {self.prompts} prompts. Do not use this folder."
            )


@torch.no_grad()
def policy_logits(policy: Policy, prompts: Sequence[TokenIds]) -> Tensor | None:
    """Next-token logits float32 [N, vocabulary] on the CPU; last pipeline stage only."""
    policy.module.eval()
    logits = KVDecoder(policy).begin(prompts, 0)
    return None if logits is None else logits.cpu()


@torch.no_grad()
def hf_logits(folder: Path, prompts: Sequence[TokenIds]) -> Tensor:
    """The same from a Hugging Face folder."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, dtype="auto"
    ).eval()
    return torch.stack([model(torch.tensor([p])).logits[0, -1].float() for p in prompts])


def compare(ours: Tensor, theirs: Tensor, tie: float = 0.0) -> Comparison:
    """How far two sets of logits [N, vocabulary] lie apart. Their best token counts as ours if our
    logit for it is within `tie` of our best."""
    at_their_best = ours.gather(1, theirs.argmax(-1, keepdim=True))[:, 0]
    return Comparison(
        prompts=ours.shape[0],
        max_difference=float((ours - theirs).abs().max()),
        top1_equal=int((at_their_best >= ours.amax(-1) - tie).sum()),
    )


def verify_export(
    policy: Policy, tokenizer: ChatTokenizer, folder: Path, probes: Sequence[str] = PROBES
) -> Comparison | None:
    """Compare the policy with an exported folder on some prompts. Collective.

    Returns the comparison on the rank that made it, None elsewhere.

    Raises:
        CheckpointError: the logits or the best tokens differ.
    """
    prompts = [tokenizer.encode_prompt([{"role": "user", "content": text}]) for text in probes]
    ours = policy_logits(policy, prompts)
    layout = policy.layout
    if ours is None or layout.tensor_rank or layout.data_rank or layout.context_rank:
        return None
    dtype = policy.module.config.params_dtype
    tolerance = TOLERANCE[dtype]
    # In float32 the best token must be the very same; bfloat16 rounds near-ties either way.
    tie = 0.0 if dtype == torch.float32 else tolerance
    result = compare(ours, hf_logits(folder, prompts), tie)
    result.check(tolerance, folder)
    return result
