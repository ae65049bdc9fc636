from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_selfpref.data.batching import collate
from nemo_selfpref.megatron.cpu_shim import device_scope
from nemo_selfpref.megatron.decode import KVDecoder
from nemo_selfpref.megatron.policy import Policy

PROMPTS = [(5,), (9, 8, 7, 6, 5, 4, 3), (11, 12, 13)]


@torch.no_grad()
def full_logits(policy: Policy, sequence: tuple[int, ...]) -> Tensor:
    """Logits of the next token after a whole sequence, without any cache."""
    batch = collate([((), sequence)], [0], paired=False)
    with device_scope():
        _, hidden = policy.forward(policy.module, batch)
    return hidden[-1, 0] @ policy.module.output_weight().t()


@torch.no_grad()
def decode(policy: Policy, steps: int) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """Greedy decoding of PROMPTS; the sequences and every step's logits."""
    decoder = KVDecoder(policy)
    logits = decoder.begin(PROMPTS, steps)
    sequences, seen = list(PROMPTS), []
    for _ in range(steps):
        assert logits is not None
        seen.append(logits)
        tokens = logits.argmax(-1)
        sequences = [(*s, t) for s, t in zip(sequences, tokens.tolist(), strict=True)]
        logits = decoder.advance(tokens)
    return sequences, seen


def test_cached_logits_equal_the_full_forward_at_every_token(policy: Policy) -> None:
    steps = 12
    sequences, seen = decode(policy, steps)
    for row, prompt in enumerate(PROMPTS):
        for step in range(steps):
            prefix = sequences[row][: len(prompt) + step]
            exact = full_logits(policy, prefix)
            torch.testing.assert_close(seen[step][row], exact, rtol=1e-5, atol=1e-5)
            assert sequences[row][len(prompt) + step] == int(exact.argmax())


@torch.no_grad()
def test_keep_goes_on_with_the_rows_that_stay(policy: Policy) -> None:
    decoder = KVDecoder(policy)
    decoder.begin(PROMPTS, 4)
    decoder.advance(torch.tensor([20, 21, 22]))
    decoder.keep(torch.tensor([2, 1]))
    logits = decoder.advance(torch.tensor([30, 31]))
    assert logits is not None and logits.shape == (2, 500)
    for row, sequence in enumerate([(*PROMPTS[2], 22, 30), (*PROMPTS[1], 21, 31)]):
        torch.testing.assert_close(logits[row], full_logits(policy, sequence), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_begin_starts_afresh(policy: Policy) -> None:
    decoder = KVDecoder(policy)
    first = decoder.begin(PROMPTS, 3)
    decoder.advance(torch.tensor([20, 21, 22]))
    again = decoder.begin(PROMPTS, 3)
    assert first is not None and again is not None
    assert torch.equal(first, again)


def test_logits_are_float32_over_the_whole_vocabulary(policy: Policy) -> None:
    with torch.no_grad():
        logits = KVDecoder(policy).begin(PROMPTS, 0)
    assert logits is not None
    assert logits.shape == (3, 500) and logits.dtype == torch.float32


def test_advance_needs_a_beginning(policy: Policy) -> None:
    with pytest.raises(AssertionError):
        KVDecoder(policy).advance(torch.tensor([1]))


def test_share_hands_back_the_tokens_of_a_single_stage(policy: Policy) -> None:
    tokens = torch.tensor([4, 5])
    assert KVDecoder(policy).share(tokens, 2) is tokens
