"""The softmax surrogate of Neighbor GRPO and RC-GRPO-Editing.

arXiv 2511.16955, Eq. 8, 9, 11, and arXiv 2604.09386, Eq. 5, 13-15, B.3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def metric(mask: Tensor, h_in: float, h_out: float, *, sum_to_one: bool = False) -> Tensor:
    """Computes each token's weight in ``d = mean inside / h_in^2 + mean outside / h_out^2``.

    ``mask`` is bool [token]. Eq. B.3.
    """
    weights = torch.zeros(len(mask), dtype=torch.float64)
    for token, inside in enumerate(mask.tolist()):
        area = int(mask.sum()) if inside else int((~mask).sum())
        weights[token] = 1 / (area * (h_in if inside else h_out) ** 2)
    return weights / weights.sum() if sum_to_one else weights


def log_policy(anchor: Tensor, candidates: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Computes ``log softmax_i(-d(x_i, anchor) / temperature)``.

    The probability that an anchor [token, channel] is taken for candidate i.
    """
    distances = torch.stack(
        [
            (weights[:, None] * (candidate - anchor) ** 2 / anchor.shape[1]).sum()
            for candidate in candidates
        ]
    )
    energy = -distances / temperature
    return energy - torch.logsumexp(energy, dim=0)


def loss(
    anchors: list[int],
    states: Tensor,
    candidates: Tensor,
    old_velocity: Tensor,
    new_velocity: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    sigma: float,
    sigma_next: float,
    temperature: float,
    clip: float,
) -> Tensor:
    """Computes the clipped loss at one trained step, averaged over anchors and candidates.

    Both policies come of the one-step train solver.

    Args:
        states: where the step starts; ``candidates``: where the rollout's own solver took it.
        new_velocity: of the anchors, in their order; ``old_velocity``: of every candidate, under
            the behaviour weights.
    """
    total = torch.zeros((), dtype=torch.float64)
    for row, anchor in enumerate(anchors):
        new = log_policy(
            states[anchor] + (sigma_next - sigma) * new_velocity[row],
            candidates,
            weights,
            temperature,
        )
        old = log_policy(
            states[anchor] + (sigma_next - sigma) * old_velocity[anchor],
            candidates,
            weights,
            temperature,
        )
        for index, gain in enumerate(advantages):
            ratio = (new[index] - old[index]).exp()
            total = total - torch.min(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain) / len(
                advantages
            ) / len(anchors)
    return total


def gradient_at_old_weights(
    num_anchors: int,
    candidates: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    sigma: float,
    sigma_next: float,
    temperature: float,
) -> Tensor:
    """Computes the loss's gradient in an anchor's velocity at the old weights.

    With advantages that sum to 0 it is the weighted centroid of the candidates.
    """
    centroid = sum(gain * candidate for gain, candidate in zip(advantages, candidates, strict=True))
    scale = (
        -(sigma_next - sigma)
        * 2
        / (num_anchors * len(advantages) * temperature * candidates.shape[2])
    )
    return scale * weights[:, None] * centroid


def quasi_norm(rewards: Tensor, p: float) -> Tensor:
    """Computes Eq. 11 on centred rewards [candidate], times sqrt(G).

    So that p = 2 is division by the population deviation.
    """
    centred = rewards - rewards.mean()
    return centred / (centred.abs() ** p).sum() ** (1 / p) * len(rewards) ** 0.5


def rc_advantages(rewards: list[Tensor], weights: list[float]) -> list[Tensor]:
    """Computes the advantages of RC-GRPO-Editing (section 3.3 and Eq. 4).

    Every term is z-scored over the minibatch, added, then standardised in its group.

    Args:
        rewards: [candidate, term] of each group of the minibatch.
    """
    pooled = torch.cat(rewards)
    mean, deviation = pooled.mean(dim=0), pooled.std(dim=0, correction=0)
    combined = [
        ((group - mean) / deviation * torch.tensor(weights, dtype=torch.float64)).sum(dim=1)
        for group in rewards
    ]
    return [(group - group.mean()) / group.std(correction=0) for group in combined]


def neighbourhood(
    shared: Tensor, fresh: Tensor, mask: Tensor, inside: float, outside: float
) -> Tensor:
    """Computes ``sqrt(1 - a^2) e + a d_i`` (RC-GRPO-Editing Eq. 10-11).

    With ``inside == outside`` it is Neighbor GRPO's Eq. 7.
    """
    spread = torch.where(mask, inside, outside).double()[:, None]
    return torch.stack([(1 - spread**2).sqrt() * shared + spread * each for each in fresh])
