"""Certified training: losses on bounds, schedules and regularisers for a Megatron training loop.

    loss_of = CertifiedLoss(model, inputs, num_classes=10)      # once, before Megatron's DDP wraps
    ...
    robust = loss_of(inputs, labels, iteration=i)               # where the loop computed its loss
    (robust.loss.mean() * kappa + natural * (1 - kappa)).backward()
"""

from lirpa_megatron.training.certified import CertifiedBatch, CertifiedLoss
from lirpa_megatron.training.losses import margin_cross_entropy
from lirpa_megatron.training.regularizers import bound_regularizer, ibp_initialization
from lirpa_megatron.training.schedules import Ramp

__all__ = [
    "CertifiedBatch",
    "CertifiedLoss",
    "Ramp",
    "bound_regularizer",
    "ibp_initialization",
    "margin_cross_entropy",
]
