"""Which coefficients of affine forms are whose: at replicated nodes each rank has some symbols.

==================  ======================  =====================================================
at                  coefficients            on the ranks (n = N/p, rounded up)
==================  ======================  =====================================================
sharded nodes       [1 + N, B, T..., F/p]   all symbols, the rank's own features
replicated nodes    [1 + n, B, T..., F]     the rank's own symbols, all features; the centre, which
                                            comes first, is the same on all ranks
==================  ======================  =====================================================

So an affine form is to its symbols what hidden states are to positions in sequence parallelism: a
gather over symbols leads into a sharded region, a reduce-scatter over symbols out of it, which
together move as much as the all-reduce of forms that all ranks have whole. Symbols come in blocks
(those of the set, then those of each operator's errors), and each block is shared out by itself;
where N does not divide, the last ranks' own coefficients end in zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from lirpa_megatron.forward.ranks import Ranks
from lirpa_megatron.parallel.collectives import Collectives

FEWEST = 2
"""Sets with fewer symbols for each rank stay whole on all ranks."""
ROOM = 2**21
"""Numbers that are gathered at once, of all ranks' symbols."""


class Shares:
    """The ranks' shares of all symbols so far.

    Args:
        collectives: of the model's tensor-parallel group.
        blocks: sizes of the blocks of symbols.

    Attributes:
        ranks: for sums over symbols.
    """

    def __init__(self, collectives: Collectives, blocks: Sequence[int]) -> None:
        self._tp, self.blocks = collectives, list(blocks)
        self.ranks = Ranks(collectives, True)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """A replicated value that multiplies the rank's own coefficients."""
        return self._tp.copy_to(x)

    # --------------------------------------------------------------------------- places

    def _share(self, size: int) -> int:
        return -(-size // self._tp.size)

    def _blocks(self, count: int, own: bool) -> list[tuple[int, int, int]]:
        """(size, first row when whole, first own row) of the blocks that `count` rows have."""
        found, whole, mine = [], 0, 0
        for size in self.blocks:
            if (mine if own else whole) >= count:
                break
            found.append((size, whole, mine))
            whole, mine = whole + size, mine + self._share(size)
        return found

    def own(self, first: int, count: int) -> slice:
        """The rank's rows of some symbols of one block."""
        whole = mine = 0
        for size in self.blocks:
            if first < whole + size:
                break
            whole, mine = whole + size, mine + self._share(size)
        begin = whole + self._tp.rank * self._share(size)
        low, high = max(first, begin), min(first + count, begin + self._share(size))
        return slice(low - begin + mine, max(low, high) - begin + mine)

    @property
    def rows(self) -> int:
        """How many rows a rank has of its own."""
        return sum(self._share(size) for size in self.blocks)

    def first(self, block: int = 0) -> int:
        """The first symbol of a block that is the rank's, counted from the block's first."""
        return min(self._tp.rank * self._share(self.blocks[block]), self.blocks[block])

    # ---------------------------------------------------------------------- one to the other

    def split(self, c: torch.Tensor) -> torch.Tensor:
        """[1 + N, ...], the same on all ranks -> the rank's own [1 + n, ...]."""
        parts = [c[:1]]
        for size, whole, _ in self._blocks(len(c) - 1, False):
            rows = self._padded(c[1 + whole : 1 + whole + size])
            parts.append(self._tp.split_rows(rows))
        return torch.cat(parts)

    def whole(self, c: torch.Tensor) -> torch.Tensor:
        """[1 + n, ...] -> [1 + N, ...] on all ranks, to be used alike by all of them."""
        parts = [c[:1]]
        for size, _, mine in self._blocks(len(c) - 1, True):
            rows = c[1 + mine : 1 + mine + self._share(size)]
            parts.append(self._tp.gather_results(rows)[:size])
        return torch.cat(parts)

    def into_region(
        self, c: torch.Tensor, linear: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The coefficients of L z at a sharded node, those of z gathered some symbols at a time.

        Args:
            c: of z at a replicated node, [1 + n, B, T..., F].
            linear: L on [k, B, T..., F], which gives the rank's own features.

        Returns:
            [1 + N, B, T..., F'].
        """
        centre = linear(self._tp.copy_to(c[:1]))
        blocks = self._blocks(len(c) - 1, True)
        out = centre.new_empty(1 + sum(size for size, *_ in blocks), *centre.shape[1:])
        out[:1] = centre
        for size, whole, mine in blocks:
            share = self._share(size)
            for j, k in self._chunks(share, c, centre):
                got = linear(self._tp.gather_rows(c[1 + mine + j : 1 + mine + j + k]))
                for rank, rows in enumerate(got.unflatten(0, (-1, k))):
                    at = rank * share + j
                    if at < size:
                        rows = rows[: size - at]
                        out[1 + whole + at : 1 + whole + at + len(rows)] = rows
        return out

    def out_of_region(
        self, centre: torch.Tensor, c: torch.Tensor,
        linear: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The coefficients [1 + n, B, T..., F'] of L z at a replicated node.

        Args:
            centre: the first of them, [B, T..., F'].
            c: of z at a sharded node, without its centre, [N, B, T..., F/p].
            linear: the rank's part of L on [k, B, T..., F/p]: a term of a sum over ranks.
        """

        def reduced(size: int, rows: torch.Tensor, j: int, k: int) -> torch.Tensor:
            parts = centre.new_zeros(self._tp.size, k, *centre.shape)
            for rank in range(self._tp.size):
                own = self._rows_of(rank, size, rows, j, k)
                if len(own):
                    parts[rank, : len(own)] = linear(own)
            return self._tp.reduce_to_rows(parts.flatten(0, 1))

        return self._own(centre, c, reduced)

    def gathered(self, centre: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """[1 + n, B, T..., F], all features of the rank's own symbols, for its own features of all
        symbols: an all-to-all.

        Args:
            centre: all features, [B, T..., F].
            c: of all symbols, without their centre, [N, B, T..., F/p].
        """

        def exchanged(size: int, rows: torch.Tensor, j: int, k: int) -> torch.Tensor:
            parts = c.new_zeros(self._tp.size, k, *c.shape[1:])
            for rank in range(self._tp.size):
                own = self._rows_of(rank, size, rows, j, k)
                parts[rank, : len(own)] = own
            got = self._tp.exchange_rows(parts.flatten(0, 1)).unflatten(0, (-1, k))
            return got.movedim(0, -2).flatten(-2)

        return self._own(centre, c, exchanged)

    def _own(self, centre: torch.Tensor, c: torch.Tensor, find: Callable) -> torch.Tensor:
        """`centre`, then what `find` (size of a block, its rows in c, j, k) makes of the j-th and k
        - 1 further own symbols of every rank."""
        blocks = self._blocks(len(c), False)
        count = 1 + sum(self._share(size) for size, *_ in blocks)
        out = centre.new_empty(count, *centre.shape)
        out[0] = centre
        for size, whole, mine in blocks:
            for j, k in self._chunks(self._share(size), c, out):
                rows = c[whole : whole + size]
                out[1 + mine + j : 1 + mine + j + k] = find(size, rows, j, k)
        return out

    def _rows_of(self, rank: int, size: int, rows: torch.Tensor, j: int, k: int) -> torch.Tensor:
        """Rows of a rank's j-th and k - 1 further own symbols of a block."""
        first = rank * self._share(size)
        return rows[first + j : min(first + j + k, first + self._share(size), size)]

    def _chunks(self, share: int, *rows: torch.Tensor) -> list[tuple[int, int]]:
        """(first, number) of a rank's rows at a time; all at once where gradients flow."""
        most = max(x[:1].numel() for x in rows) * self._tp.size
        step = share if torch.is_grad_enabled() else min(share, max(1, ROOM // max(most, 1)))
        return [(j, min(step, share - j)) for j in range(0, share, max(step, 1))]

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        missing = -len(rows) % self._tp.size
        return F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)) if missing else rows

    # -------------------------------------------------------------------------- by tokens

    def by_tokens(
        self, part: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """A function of each token's coefficients of all symbols, each rank for some tokens.

        Args:
            part: the rank's own rows, [n, B, ..., F].
            function: [N, K, F] -> [K], 0 for zeros.

        Returns:
            [B, ...], replicated.
        """
        flat = part.flatten(1, -2)
        moving = self.ranks.total(flat.detach().any(-1).any(0).to(flat)) > 0
        moving = moving.nonzero().flatten()
        found = flat.new_zeros(flat.shape[1])
        size, blocks = self._tp.size, self._blocks(len(part), True)
        step = max(1, ROOM // 2 // max(1, size * len(part) * part.shape[-1])) * size
        for first in range(0, len(moving), step):
            tokens = moving[first : first + step]
            places = F.pad(tokens, (0, -len(tokens) % size), value=int(tokens[-1]))
            sent = flat.index_select(1, places).unflatten(1, (size, -1)).movedim(1, 0)
            got = self._tp.exchange_rows(sent.flatten(0, 1)).unflatten(0, (size, -1))
            rows = [
                got[:, mine : mine + self._share(block)].flatten(0, 1)[:block]
                for block, _, mine in blocks
            ]
            values = self._tp.gather_results(function(torch.cat(rows)))
            found = found.index_put((tokens,), values[: len(tokens)])
        return found.reshape(part.shape[1:-1])
