"""Further losses of routers as pure functions: size of logits, distance to a target, variation.

Gradients flow through logits and probabilities only. Shape suffixes: T tokens, N experts of the
whole group.
"""

from __future__ import annotations

import torch

from tamoe.loss_totals import widened
from tamoe.topology.errors import InputError


def z_loss(logits_TN: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """Mean square of the logits' log-sum-exp, which keeps logits small (ST-MoE, equation 5).

    Parameters
    ----------
    logits_TN
        ``[T, N]``, before any bias.
    mask_T
        ``[T]``; tokens where it is 0 (padding) are left out. None keeps all.

    Returns
    -------
    torch.Tensor
        Scalar, float32 or wider; 0 where no token is left. ST-MoE weighs it by 0.001.

    Examples
    --------
    >>> round(z_loss(torch.zeros(4, 8)).item(), 4)  # log(8)²
    4.3241
    """
    _check(logits_TN, "logits_TN", mask_T)
    wide_TN, keep_T = widened(logits_TN, mask_T)
    square_T = torch.where(keep_T, wide_TN.logsumexp(1).square(), 0.0)
    return square_T.sum() / keep_T.sum().clamp_min(1)


def target_divergence(
    probs_TN: torch.Tensor, target_N: torch.Tensor, mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """KL divergence of a rank's mean probabilities from its target: 0 exactly at the target.

    Unlike the topology loss it does not look at what was chosen: it steers the probabilities of a
    per-rank gate, and choices as far as they follow.

    Parameters
    ----------
    probs_TN
        ``[T, N]``, rows sum to 1.
    target_N
        ``[N]``, > 0, any scale: a row of ``Plan.target_N``.
    mask_T
        ``[T]``; tokens where it is 0 (padding) are left out. None keeps all.

    Returns
    -------
    torch.Tensor
        Scalar, nats, >= 0: Σ m·log(m/ĉ) over the shares m and ĉ; 0 where no token is left.

    Raises
    ------
    InputError
        Shapes do not fit together.

    Examples
    --------
    >>> target_divergence(torch.tensor([[0.25, 0.75]]), torch.tensor([1.0, 3.0])).item()
    0.0
    """
    _check(probs_TN, "probs_TN", mask_T)
    if target_N.shape != probs_TN.shape[1:]:
        raise InputError(
            f"target_N is {tuple(target_N.shape)} and probs_TN has {probs_TN.shape[1]} experts; "
            f"allowed: one number an expert"
        )
    wide_TN, keep_T = widened(probs_TN, mask_T)
    mean_N = wide_TN.sum(0) / keep_T.sum().clamp_min(1)
    mean_N = mean_N.clamp_min(torch.finfo(mean_N.dtype).tiny)  # at 0 the gradient is not finite
    share_N = (target_N / target_N.sum()).detach().to(mean_N.dtype)
    divergence = (mean_N * (mean_N.log() - share_N.log())).sum()
    return torch.where(keep_T.any(), divergence, 0.0)


def locality_loss(
    probs_TN: torch.Tensor,
    local_N: torch.Tensor,
    mask_T: torch.Tensor | None = None,
    *,
    remote_share: float = 0.01,
) -> torch.Tensor:
    """Divergence of a rank's mean probabilities from sending everything to near experts.

    The locality loss of LocMoE, as far as its text defines it: the KL divergence from the fully
    local distribution. That one is 0 at remote experts, where the divergence is infinite, so
    ``remote_share`` of it is spread evenly over them; the smaller, the stronger the loss. It knows
    no speeds of links and no balance: add a balance loss.

    Parameters
    ----------
    probs_TN
        ``[T, N]``, rows sum to 1.
    local_N
        ``[N]`` bool, True for the experts that are near this rank; at least one.
    mask_T
        ``[T]``; tokens where it is 0 (padding) are left out. None keeps all.
    remote_share
        0 to 1, both excluded.

    Returns
    -------
    torch.Tensor
        Scalar, nats, >= 0; 0 where all experts are near and routing is even.

    Raises
    ------
    InputError
        Shapes do not fit together, no expert is near, or the share is out of range.

    Examples
    --------
    >>> local_N = torch.tensor([True, True, False, False])
    >>> probs_TN = torch.tensor([[0.495, 0.495, 0.005, 0.005]])
    >>> round(locality_loss(probs_TN, local_N).item(), 6)
    0.0
    """
    if not 0 < remote_share < 1:
        raise InputError(f"remote_share is {remote_share}; allowed: between 0 and 1")
    local_N = local_N.bool()
    near = local_N.sum()
    if not local_N.any():
        raise InputError("local_N has no True; allowed: at least one near expert")
    far = len(local_N) - near
    near_share = torch.where(far > 0, 1.0 - remote_share, 1.0) / near
    target_N = torch.where(local_N, near_share, remote_share / far.clamp_min(1))
    return target_divergence(probs_TN, target_N, mask_T)


def squared_variation(value_N: torch.Tensor) -> torch.Tensor:
    """Square of the coefficient of variation, variance over squared mean; 0 where all are equal.

    The unbiased variance, and 0 for a single number, as in the noisy gate of Shazeer et al. (2017).

    Examples
    --------
    >>> squared_variation(torch.tensor([1.0, 3.0])).item()
    0.5
    """
    if value_N.numel() < 2:
        return value_N.new_zeros(())
    return value_N.var() / (value_N.mean().square() + 1e-10)


def _check(values_TN: torch.Tensor, name: str, mask_T: torch.Tensor | None) -> None:
    if values_TN.ndim != 2:
        raise InputError(f"{name} is {tuple(values_TN.shape)}; allowed: (tokens, experts)")
    if mask_T is not None and mask_T.shape != values_TN.shape[:1]:
        raise InputError(
            f"mask_T is {tuple(mask_T.shape)} and {name} has {len(values_TN)} tokens; "
            f"allowed: one number a token"
        )
