"""Auxiliary losses of routers as pure functions of tensors, and the scales of other systems.

Loss, balance and topology losses are 1 at even routing, whatever the number of ranks, experts,
choices and tokens. None needs a gate of tamoe.
"""

from tamoe.balance import (
    balance_loss as balance_loss,
    group_balance_loss as group_balance_loss,
    pooled_balance_loss as pooled_balance_loss,
    sequence_balance_loss as sequence_balance_loss,
    topology_loss as topology_loss,
)
from tamoe.conventions import (
    CONVENTIONS as CONVENTIONS,
    convention_factor as convention_factor,
)
from tamoe.loss_totals import expert_counts as expert_counts
from tamoe.router_losses import (
    locality_loss as locality_loss,
    squared_variation as squared_variation,
    target_divergence as target_divergence,
    z_loss as z_loss,
)
