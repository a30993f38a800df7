"""Megatron's mappings over one tensor-parallel group, behind one guard.

Each method is a conjugate pair (p ranks, x the argument, |x| its bytes):

=================  ==========================  ======================  =====================
method             forward                     backward                bytes sent per rank
=================  ==========================  ======================  =====================
copy_to            identity                    all-reduce              0, then 2(p-1)/p |x|
reduce_from        all-reduce                  identity                2(p-1)/p |x|, then 0
gather_rows        all-gather on dim 0         reduce-scatter          (p-1) |x|, both ways
gather_results     all-gather on dim 0         slice                   (p-1) |x|, then 0
reduce_to_rows     reduce-scatter on dim 0     all-gather              (p-1)/p |x|, both ways
split_rows         slice of dim 0              all-gather              0, then (p-1)/p |x|
exchange_rows      all-to-all on dim 0         all-to-all              (p-1)/p |x|, both ways
gather_features    all-gather on the last dim  slice                   (p-1) |x|, then 0
split_features     slice of the last dim       all-gather              0, then (p-1)/p |x|
=================  ==========================  ======================  =====================

`gather_rows` is for a result that each rank uses differently (its gradient is a sum over ranks),
`gather_results` for one that all use alike. `look_up` is a `reduce_from` of rows that one rank has;
`largest` is an all-reduce without a gradient, for which Megatron has no mapping; nor has it one for
`begin_gather_rows` and `begin_reduce_to_rows`, which run while the rank computes.
Bytes are those of ring algorithms.

The guard exists because megatron-core up to 0.18 reduces a *copy* of a non-contiguous tensor and
returns the tensor unreduced, and reduces a contiguous one in place: every tensor handed to a
mapping, forward and backward, is a fresh contiguous one. It also does the ranks' handshake
(`spmd`) and keeps the counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings

from lirpa_megatron.compat import megatron_cpu
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import spmd

# torch renamed them.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Traffic:
    """Counts of collectives: `calls[name]` and `bytes[name]` (sent by this rank)."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def add(self, name: str, sent: float) -> None:
        self.calls[name] += 1
        self.bytes[name] += round(sent)

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


class Collectives:
    """The collectives of one tensor-parallel group.

    Args:
        group: the model's tensor-parallel process group; None means one rank.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.traffic = Traffic()

    def copy_to(self, x: torch.Tensor) -> torch.Tensor:
        """Identity; its gradient is summed over ranks. x: any shape, replicated."""
        if self.size == 1 or not x.requires_grad:
            return x
        y = mappings.copy_to_tensor_model_parallel_region(x, group=self.group)
        return self._guard_backward(y, "all_reduce", 2 * self._share)

    def reduce_from(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks. x: any shape, a partial sum on each rank."""
        if self.size == 1:
            return x
        self._enter("all_reduce", x, 2 * self._share)
        fresh = x.clone(memory_format=torch.contiguous_format)
        return mappings.reduce_from_tensor_model_parallel_region(fresh, group=self.group)

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """[n, ...] of each rank -> [p n, ...], to be used differently on each rank."""
        return self._gather_rows(x, True)

    def gather_results(self, x: torch.Tensor) -> torch.Tensor:
        """[n, ...] of each rank -> [p n, ...], to be used alike on every rank."""
        return self._gather_rows(x, False)

    def _gather_rows(self, x: torch.Tensor, sum_gradients: bool) -> torch.Tensor:
        if self.size == 1:
            return x
        self._enter("all_gather", x, self.size - 1)
        y = mappings.gather_from_sequence_parallel_region(
            x.contiguous(), tensor_parallel_output_grad=sum_gradients, group=self.group
        )
        backward = ("reduce_scatter", self._share) if sum_gradients else ("slice", None)
        return self._guard_backward(y, *backward)

    def reduce_to_rows(self, x: torch.Tensor) -> torch.Tensor:
        """[p n, ...], a partial sum on each rank -> the rank's [n, ...] of the sum."""
        if self.size == 1:
            return x
        self._enter("reduce_scatter", x, self._share)
        y = mappings.reduce_scatter_to_sequence_parallel_region(x.contiguous(), group=self.group)
        return self._guard_backward(y, "all_gather", self.size - 1)

    def split_rows(self, x: torch.Tensor) -> torch.Tensor:
        """[p n, ...], replicated -> the rank's [n, ...]."""
        if self.size == 1:
            return x
        y = mappings.scatter_to_sequence_parallel_region(x, group=self.group)
        return self._guard_backward(y, "all_gather", self.size - 1)

    def exchange_rows(self, x: torch.Tensor) -> torch.Tensor:
        """[p n, ...], n rows for each rank -> [p n, ...], n rows from each rank, in their order.
        """
        if self.size == 1:
            return x
        self._enter("all_to_all", x, self._share)
        y = mappings.all_to_all(self.group, x.contiguous())
        return self._guard_backward(y, "all_to_all", self._share)

    def begin_gather_rows(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """`gather_rows`, of which the result is asked for later; at once where x has a gradient.

        Returns:
            A function that waits for the result.
        """
        if self.size == 1 or x.requires_grad:
            y = self.gather_rows(x)
            return lambda: y
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        return self._begin("all_gather", x.contiguous(), out, self.size - 1)

    def begin_reduce_to_rows(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The same for `reduce_to_rows`."""
        if self.size == 1 or x.requires_grad:
            y = self.reduce_to_rows(x)
            return lambda: y
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        return self._begin("reduce_scatter", x.contiguous(), out, self._share)

    def _begin(
        self, name: str, x: torch.Tensor, out: torch.Tensor, bytes_per_byte: float
    ) -> Callable[[], torch.Tensor]:
        function = _all_gather if name == "all_gather" else _reduce_scatter
        self._count(name, x, bytes_per_byte)
        under_way = spmd.announce(
            self.group, f"{name} of {tuple(x.shape)} {x.dtype}, begun",
            lambda: function(out, x, group=self.group, async_op=True),
        )

        def finish() -> torch.Tensor:
            under_way.wait()
            return out

        return finish

    def poll(self) -> None:
        """To be called now and then, so that what was begun goes on."""
        spmd.poll(self.group)

    def gather_features(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n/p] of each rank -> [..., n], to be used alike on every rank."""
        if self.size == 1:
            return x
        self._enter("all_gather", x, self.size - 1)
        y = mappings.gather_from_tensor_model_parallel_region(x.contiguous(), group=self.group)
        return self._guard_backward(y, "slice", None)

    def split_features(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n], replicated -> the rank's [..., n/p]."""
        if self.size == 1:
            return x
        y = mappings.scatter_to_tensor_model_parallel_region(x, group=self.group)
        return self._guard_backward(y, "all_gather", self.size - 1)

    def look_up(self, shard: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a table that lies row by row on the ranks, as a vocabulary does.

        Each rank looks up what it has, the others contribute zero (`reduce_from`).

        Args:
            shard: this rank's rows, [V/p, ...].
            ids: int64, replicated, any shape.

        Returns:
            [*ids.shape, ...], replicated.

        Raises:
            UserError: ids that are not whole numbers, or not in the table.
        """
        size = shard.shape[0] * self.size
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise UserError(f"token ids are whole numbers (int64), these are {ids.dtype}")
        if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < size):
            raise UserError(
                f"token ids from {int(ids.min())} to {int(ids.max())}, but the vocabulary has "
                f"{size} entries"
            )
        local = ids.to(shard.device) - self.rank * shard.shape[0]
        own = (local >= 0) & (local < shard.shape[0])
        rows = shard[torch.where(own, local, 0)]
        own = own.reshape(*own.shape, *[1] * (shard.ndim - 1))
        return self.reduce_from(torch.where(own, rows, 0))

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """Largest over ranks; without a gradient. x: any shape, each rank's own."""
        x = x.detach()
        if self.size == 1:
            return x
        self._enter("all_reduce", x, 2 * self._share)
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, op=dist.ReduceOp.MAX, group=self.group)
        return y

    @property
    def _share(self) -> float:
        return (self.size - 1) / self.size

    def _enter(self, name: str, x: torch.Tensor, bytes_per_byte: float) -> None:
        """Agrees with the other ranks on what comes, and counts it."""
        self._count(name, x, bytes_per_byte)
        spmd.handshake(self.group, f"{name} of {tuple(x.shape)} {x.dtype}")

    def _count(self, name: str, x: torch.Tensor, bytes_per_byte: float) -> None:
        ready = megatron_cpu.is_installed() or torch.cuda.is_available()
        if x.device.type == "cpu" and not ready:
            raise UserError(
                "tensor parallelism on a CPU needs Megatron's CPU shim: call "
                "lirpa_megatron.compat.megatron_cpu.install() first"
            )
        self.traffic.add(name, bytes_per_byte * x.numel() * x.element_size())

    def _guard_backward(self, y: torch.Tensor, name: str, factor: float | None) -> torch.Tensor:
        if not y.requires_grad:
            return y
        announce = None if factor is None else lambda g: self._enter(name, g, factor)
        return _FreshGradient.apply(y, announce)


class _FreshGradient(torch.autograd.Function):
    """Identity whose backward hands the mapping before it a fresh contiguous gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, announce: Callable[[torch.Tensor], None] | None
    ) -> torch.Tensor:
        ctx.announce = announce
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.announce is not None:
            ctx.announce(grad)
        return grad.clone(memory_format=torch.contiguous_format), None
