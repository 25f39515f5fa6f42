"""The scales that other systems give the same balance loss."""

from __future__ import annotations

from tamoe.topology.errors import InputError

CONVENTIONS = ("tamoe", "deepspeed", "transformers", "fastmoe")


def convention_factor(convention: str, *, top_k: int, num_ranks: int = 1) -> float:
    """What a loss of :mod:`tamoe.functional` is multiplied by to stand in another system's scale.

    Parameters
    ----------
    convention
        - ``"tamoe"``: 1 at even routing.
        - ``"deepspeed"``: ``topkgating``, which divides by k, so 1 at even routing as well. Its
          top-1 and top-2 gates count first choices only: pass ``expert_index_TK[:, :1]``.
        - ``"transformers"``: ``load_balancing_loss_func`` sums over the k slots: k at even
          routing. It pools all layers; the factor holds for one layer.
        - ``"fastmoe"``: GShardGate squares the experts *of one worker*: 1/W² at even routing under
          W workers. It counts first choices only: pass ``expert_index_TK[:, :1]``.
    top_k
        k, >= 1.
    num_ranks
        W, ranks of the expert-parallel group, >= 1. Only ``"fastmoe"`` depends on it.

    Returns
    -------
    float
        theirs / ours. To reproduce a published weight, use ours times weight times this.

    Raises
    ------
    InputError
        The convention is unknown or a number is below 1.

    Examples
    --------
    >>> convention_factor("transformers", top_k=2)
    2.0
    >>> convention_factor("fastmoe", top_k=2, num_ranks=8)
    0.015625
    """
    if convention not in CONVENTIONS:
        raise InputError(
            f"convention is {convention!r}; allowed: {', '.join(map(repr, CONVENTIONS))}"
        )
    for name, value in (("top_k", top_k), ("num_ranks", num_ranks)):
        if value < 1:
            raise InputError(f"{name} is {value}; allowed: >= 1")
    if convention == "transformers":
        return float(top_k)
    return 1.0 / num_ranks**2 if convention == "fastmoe" else 1.0
