"""The loss on bounds that a Megatron training loop calls where it called its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lirpa_megatron.adapters.margins import TokenMargins
from lirpa_megatron.bounded_module import BoundedModule
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.options import check_method
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import spmd
from lirpa_megatron.parallel.pipeline import guard
from lirpa_megatron.problem.margins import classification_margins, next_token_margins
from lirpa_megatron.training.losses import margin_cross_entropy
from lirpa_megatron.training.reductions import leave_sums_to_megatron


@dataclass
class CertifiedBatch:
    """What the bounds say about a batch."""

    # upper bound of the cross-entropy [B], replicated; gradients flow to the parameters
    loss: torch.Tensor
    # lower bound of the margin over the strongest rival [B], replicated, without a graph
    margin: torch.Tensor

    @property
    def certified(self) -> torch.Tensor:
        """[B] bool: the label wins on the whole set."""
        return self.margin > 0


class CertifiedLoss:
    """Robust cross-entropy over a set around each input, on the sharded model.

    The bound graph is built once and shares the model's parameters. Nothing is copied: after an
    optimizer step the bounds use the new weights, and the model's `state_dict` is unchanged. Build
    it before Megatron's DistributedDataParallel wraps the model. Bounds ignore dropout, whatever
    mode the model is in.

    Gradients are those that Megatron's `finalize_model_grads` expects. Where it sums a parameter's
    gradient over tensor-parallel ranks (norms of queries and keys; with sequence_parallel, the
    weights of norms and the biases of row-parallel layers), each rank has its share; elsewhere
    each rank has the complete gradient.

    Every rank of the tensor-parallel group, on all pipeline stages, makes the same calls, and calls
    `backward` on the loss that it is given; data-parallel replicas make their own.

    Args:
        model: a classifier with logits [B, K] as output, such as BERT with its binary head or an
            MLP; or a GPTModel (a BertModel with its 'lm' head), or a view of one, for the next
            token. With bfloat16 parameters, the bounds are float32.
        inputs: example inputs: (x,) for a classifier, the result of `perturb_tokens` for tokens.
            Make new ones for each step: building the graph writes to the parameters that these
            depend on.
        num_classes: K; None for a language model.
        vocab_size: entries from here on only pad the vocabulary; None: none do.
        method: "IBP", "CROWN-IBP", "CROWN", "forward" or "forward+backward".
        bound_opts: as for `BoundedModule`.

    Raises:
        UserError: a method that cannot be used for training, sizes that do not match.
        NotImplementedError: a model that cannot be bounded, by name.
    """

    def __init__(
        self, model: nn.Module, inputs: Sequence[torch.Tensor], *,
        num_classes: int | None = None, vocab_size: int | None = None,
        method: str = "CROWN-IBP", bound_opts: Mapping[str, Any] | None = None,
    ) -> None:
        self.method, self.num_classes, self.vocab_size = check_method(method), num_classes, None
        if self.method in ("CROWN-Optimized", "auto"):
            raise UserError(f"method {self.method} cannot be used for training: choose CROWN")
        inputs, bounded_model = tuple(inputs), model
        if num_classes is None:
            if not isinstance(model, TokenMargins):
                bounded_model = next_token_margins(model, gather_output=False)
            if bounded_model.gather_output or bounded_model.targets is not None:
                raise UserError(
                    "give the model, or next_token_margins of it with gather_output=False"
                )
            self.vocab_size = vocab_size
            inputs += (torch.zeros(len(inputs[0]), dtype=torch.long, device=inputs[0].device),)
        modes = {module: module.training for module in model.modules()}
        model.eval()  # dropout is not part of the function that is bounded
        try:
            self.bounded = BoundedModule(bounded_model, inputs, bound_opts)
        finally:
            for module, training in modes.items():
                module.training = training
        self.bounded.train()
        leave_sums_to_megatron(self.bounded, model)
        self._tp = self.bounded.context.collectives

    def __call__(
        self, inputs: Sequence[torch.Tensor], labels: torch.Tensor, *,
        crown_share: float = 1.0, iteration: int | None = None,
    ) -> CertifiedBatch:
        """The loss of a batch.

        Args:
            inputs: (x,) with x a BoundedTensor [B, ...], or what `perturb_tokens` gives.
            labels: classes or target tokens, int64 [B].
            crown_share: beta in beta CROWN + (1 - beta) IBP, a mixture of lower bounds (CROWN-IBP,
                Zhang et al., ICLR 2020); ignored for method "IBP".
            iteration: for error messages.

        Raises:
            UserError: labels that do not match, a share outside [0, 1].
            FloatingPointError: a bound is NaN or infinite, with the layer's name and the
                iteration; on every rank of the group.
        """
        if not 0 <= crown_share <= 1:
            raise UserError(f"crown_share is {crown_share}: give a number from 0 to 1")
        with guard(self.bounded.pipeline, self._tp.group, "the certified loss"):
            methods = {"IBP": 1 - crown_share, self.method: crown_share}
            if self.method == "IBP":
                methods = {"IBP": 1.0}
            shares = {method: share for method, share in methods.items() if share > 0}
            lower = sum(
                share * self._lower(inputs, labels, method, iteration)
                for method, share in shares.items()
            )
            own, tp = self._rivals(lower, labels), self._tp if self.num_classes is None else None
            with torch.no_grad():
                margin = lower if own is None else lower.masked_fill(~own, torch.inf)
                margin = margin.amin(-1)
                if tp is not None:
                    margin = -tp.largest(-margin)
            return CertifiedBatch(margin_cross_entropy(lower, own, tp), margin)

    def _lower(
        self, inputs: Sequence[torch.Tensor], labels: torch.Tensor, method: str,
        iteration: int | None,
    ) -> torch.Tensor:
        """Lower bounds of the margins [B, K-1], or of the rank's part of them [B, V/p]."""
        C = None
        if self.num_classes is None:
            inputs = (*inputs, labels)
        else:
            C = classification_margins(labels, self.num_classes).to(inputs[0])
        lower, _ = self.bounded.compute_bounds(
            tuple(inputs), C=C, method=method, bound_upper=method == "IBP"
        )
        # The host's nodes have the bounds of inner layers until the next call.
        bad = None if lower.isfinite().all() else self._first_bad()
        found = [each for each in spmd.gather_objects(bad, self._tp.group) if each is not None]
        if found:
            at = "" if iteration is None else f" at iteration {iteration}"
            raise FloatingPointError(
                f"the bounds of {min(found)[1]} are not finite{at}: lower the radius or the "
                "learning rate, or begin with a smaller radius"
            )
        return lower

    def _first_bad(self) -> tuple[int, str]:
        """Place in the graph and name of the first layer whose bounds are not finite."""
        layer = "the input"
        nodes = self.bounded.named_nodes().values()
        for index, node in enumerate(nodes):
            for x in node.inputs:
                if isinstance(x, auto_lirpa.BoundParams):
                    layer = f"layer {x.ori_name.rpartition('.')[0]}"
            known = auto_lirpa.known_bounds(node) if node.perturbed else None
            if known is not None and not all(b.isfinite().all() for b in known):
                return index, layer
        return len(nodes), "the output"

    def _rivals(self, lower: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        """Entries of the rank's vocabulary that the target competes with [B, V/p]."""
        if self.num_classes is not None:
            return None
        count = lower.shape[-1]
        entries = torch.arange(count, device=lower.device) + self._tp.rank * count
        size = count * self._tp.size if self.vocab_size is None else self.vocab_size
        if not 1 <= size <= count * self._tp.size:
            raise UserError(
                f"vocab_size is {size}, but there are margins over {count * self._tp.size} entries"
            )
        return (entries != labels.to(lower.device).unsqueeze(-1)) & (entries < size)
