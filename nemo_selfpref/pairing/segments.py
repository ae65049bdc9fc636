"""Segment-level supervision: regenerate one stretch of a good answer, keep the rest (SAPO, 3).

An answer y is cut into A, B and C; the policy sees the prompt and A and writes B' in the place of
B; the rejected answer is A + B' + C. Token ids in, token ids out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import floor

from nemo_selfpref.types import TokenIds

TAIL = 3
"""Tokens, the end token among them, that stay behind a segment whose start is drawn."""


@dataclass(frozen=True)
class Segment:
    """The tokens of y that are regenerated: A = y[:start], B = the next `length`, C = the rest."""

    start: int
    length: int


def plan_segment(
    response_len: int,
    prompt_len: int,
    segment_len: int,
    max_length: int,
    max_prompt_length: int,
    draw: float,
) -> Segment:
    """Where to regenerate, all lengths in tokens.

    With n = response_len (end token included) and g = min(segment_len, n), the start is uniform on
    {0 .. min(n - 3 - g, max_length - min(prompt_len, max_prompt_length) - g)} if n - 3 - g > 0,
    so that prompt, A and B' fit max_length; `draw` in [0, 1) picks it. A shorter answer starts at
    0, and so does one whose prompt leaves no room: one of at most segment_len tokens is then
    regenerated whole.
    """
    length = min(segment_len, response_len)
    top = response_len - TAIL - length
    if top <= 0:
        return Segment(0, length)
    room = max_length - min(prompt_len, max_prompt_length) - length
    return Segment(floor(draw * (max(min(top, room), 0) + 1)), length)


def splice(
    response: TokenIds, segment: Segment, generated: Sequence[int], stop_ids: Collection[int]
) -> TokenIds:
    """A + B' + C, B' being the first `segment.length` of the generated tokens.

    A stop token inside B' ends the answer there: it is kept, what follows it and C are not.

    The end token of A + B' + C is the one C brings. A segment that reaches the end of the answer
    leaves no C, so where its B' has no stop token neither has the result: it was cut off by the
    budget, and the policy is to learn from it as it is. A B' that is shorter than the segment and
    has no stop token (an engine at its length limit) is followed by C like any other.
    """
    inserted = tuple(generated[: segment.length])
    kept = response[: segment.start]
    for place, token in enumerate(inserted):
        if token in stop_ids:
            return kept + inserted[: place + 1]
    return kept + inserted + response[segment.start + segment.length :]
