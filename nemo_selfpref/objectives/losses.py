"""The losses, pure: tensors in, unreduced tensors out, no process groups, no reduction.

Inputs are sums of response log-probs, one per pair. Half-precision inputs are computed in
float32; float32 and float64 keep their precision. h is the difference of log-ratios,

    h = [log pi(y+|x) - log pi_ref(y+|x)] - [log pi(y-|x) - log pi_ref(y-|x)].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_LN2 = math.log(2.0)
_SMALLEST_GAP = 1e-10
"""log1mexp treats log-probs above -1e-10 as -1e-10, where its value is -23.03: float32 rounds a
mean log-prob this close to zero to zero anyway, and the gradient there must stay finite."""


def widen(x: Tensor) -> Tensor:
    """Half precision to float32; wider types unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def log_ratio(policy: Tensor, reference: Tensor) -> Tensor:
    """log pi(y|x) - log pi_ref(y|x), shape [B], from two log-prob sums of shape [B]; h is the
    chosen answer's less the rejected one's."""
    return widen(policy) - widen(reference)


def dpo_loss(h: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-logsigmoid(beta h), shape [B] (Rafailov et al. 2023, eq. 7).

    With label smoothing e the pair is flipped with probability e (cDPO):
    -(1 - e) logsigmoid(beta h) - e logsigmoid(-beta h).
    """
    z = beta * widen(h)
    if label_smoothing == 0.0:
        return -logsigmoid(z)
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def ipo_loss(h: Tensor, beta: float) -> Tensor:
    """(h - 1/(2 beta))^2, shape [B] (Azar et al. 2023, eq. 17). The caller decides whether h is
    made of sums or of per-token means."""
    return (widen(h) - 1.0 / (2.0 * beta)) ** 2


def spce_loss(h: Tensor, strength: Tensor, beta: float) -> Tensor:
    """-p logsigmoid(beta h) - (1 - p) logsigmoid(-beta h), shape [B] (Zhai et al. 2024, eq. 8).

    p is strength [B], P(chosen beats rejected), not clipped: a judge may put it below 1/2. p = 1
    is DPO. Misprints of the paper, which its gradient contradicts: eq. 8 lacks the minus, and
    eqs. 6 and 7 lose a parenthesis, so that beta scales the chosen answer's log-ratio only.
    """
    z, p = beta * widen(h), widen(strength)
    return -(p * logsigmoid(z) + (1 - p) * logsigmoid(-z))


def sr_dpo_loss(h: Tensor, delta: Tensor, beta: float, lam: float) -> Tensor:
    """-logsigmoid(beta h - lambda sg[Delta]), shape [B] (Yu et al. 2024, eq. 13, algorithm 1).

    delta [B] is the refined margin, beta times h of the prompt-augmented query (eq. 12); sg stops
    its gradient. lambda = 0 is DPO.
    """
    return -logsigmoid(beta * widen(h) - lam * widen(delta).detach())


def sr_ipo_loss(h: Tensor, delta: Tensor, beta: float, lam: float) -> Tensor:
    """(h - lambda sg[Delta] - 1/(2 beta))^2, shape [B] (Yu et al. 2024, eq. 15, algorithm 2).

    delta [B] as for sr_dpo_loss; what proposition 3.4 derives has no beta in it. The caller
    decides that, and makes both h and delta of sums or both of per-token means. lambda = 0 is IPO.
    """
    return ipo_loss(widen(h) - lam * widen(delta).detach(), beta)


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - exp(a)) for a <= 0, finite with finite gradients as a -> 0 and as a -> -inf."""
    # `where` on the input as well as the output: the branch not taken would otherwise put
    # inf * 0 = nan into the gradient.
    safe = torch.where(a < -_SMALLEST_GAP, a, torch.full_like(a, -_SMALLEST_GAP))
    near = safe > -_LN2
    far = torch.where(near, torch.full_like(safe, -_LN2), safe)
    return torch.where(near, torch.log(-torch.expm1(safe)), torch.log1p(-torch.exp(far)))


def log_odds_difference(mean_chosen: Tensor, mean_rejected: Tensor) -> Tensor:
    """log odds(y+) - log odds(y-), shape [B], from mean per-token log-probs (ORPO, eq. 4)."""
    chosen, rejected = widen(mean_chosen), widen(mean_rejected)
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def orpo_loss(nll: Tensor, log_odds: Tensor, lam: float) -> Tensor:
    """NLL(y+) - lambda logsigmoid(log odds difference), shape [B] (Hong et al. 2024, eq. 6)."""
    return widen(nll) - lam * logsigmoid(widen(log_odds))
