"""The live model is what is compared with: its own forward against the graph of bounds.

A certificate is worth something only if it is about the module that the caller runs. So this module
is run as it is on the clean input, once when a BoundedModule is built and once in every
`compute_bounds`, and its output compared with the graph's value there. In the good case that is one
forward pass and one comparison; only where the ends differ are the submodules compared, one by one.

Whether a difference is rounding is decided in two steps. Up to `QUICK` units in the last place of
the largest output it is. Beyond, both sides are run again in float64, where rounding is 1e-16 and a
wrong function is as wrong as before: they must agree to `PRECISE` (a share of the largest output).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lirpa_megatron.adapters import hooks
from lirpa_megatron.adapters.live.control_flow import FollowValues, ReadsValues
from lirpa_megatron.adapters.live.modules import live
from lirpa_megatron.adapters.live.signature import changed, objects_of, same_objects, signature
from lirpa_megatron.adapters.live.submodules import (
    Records,
    difference,
    first_difference,
    record,
    record_facade,
    values,
)
from lirpa_megatron.adapters.live.undisturbed import undisturbed
from lirpa_megatron.adapters.traceable import traceable
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.compat.full_precision import full_precision
from lirpa_megatron.crown.clean_values import value_at
from lirpa_megatron.errors import LiveModelError, SPMDError, UserError
from lirpa_megatron.operators.parameters import widened
from lirpa_megatron.parallel import spmd
from lirpa_megatron.parallel.collectives import Collectives
from lirpa_megatron.parallel.foreign import agreed_collectives

QUICK = 64
"""Units in the last place (of the largest output) that pass for rounding without a second look."""
PRECISE = 1e-9
"""Share of the largest output by which both sides may differ in float64: Megatron's fused GELU has
a constant of eight digits, which makes 1e-10."""
SINGLE = 1e-5
"""The same where Megatron computes in float32 whatever it is given (L2Norm)."""
LOOSE = 1e3
"""Units in the last place of 1 + the largest output by which the graph's own rounding, in the
number type of the bounds, may differ from the model in float64: as in `clean_output_check`."""


class LiveCheck:
    """Compares a model with its graph of bounds.

    Attributes:
        seconds: that checks took in the last call of `compute_bounds` (or in building).
        total_seconds: that all checks took.
        forward_seconds: of `seconds`, the forward passes of the live model.
        runs: forward passes of the live model that checks took.
        difference: the largest found so far, as a share of the largest output.

    Args:
        model: the caller's module.
        facade: what the graph was traced from.
        tp: the model's collectives.
        every: in training, of so many calls the first is looked at.
    """

    def __init__(
        self, model: nn.Module, facade: nn.Module, tp: Collectives, every: int = 1
    ) -> None:
        self.model, self.facade, self.tp = hooks.unwrapped(model), facade, tp
        self.every = every
        self.live = live(model, tp)
        self.modes = {module: module.training for module in self.model.modules()}
        self.signature = signature(facade, self.model)
        self._objects: list[Any] = []
        self.seconds = self.total_seconds = self.forward_seconds = self.difference = 0.0
        self.runs = self._training_calls = 0
        self.inputs: tuple[Any, ...] = ()
        self.due, self._once = True, None

    def at_example(self, bounded: Any, inputs: Any) -> None:
        """The first comparison, at the example input that the graph was built with."""
        self.inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        given = plain(self.inputs, bounded.device)
        with auto_lirpa.running(given), full_precision(bounded.device), undisturbed(self.model):
            value = value_at(bounded, given)
            self.compare(value, first=True)

    def begin(self, x: Any, in_training: bool, wanted: bool = True) -> None:
        """A call of `compute_bounds` begins; sets `due`.

        Args:
            x: its inputs; None: those of the last call.
            in_training: gradients are recorded: one call of `every` is looked at.
            wanted: False where the options have switched the check off.
        """
        if x is not None:
            self.inputs = x
        if self._once is None:
            self.seconds = self.forward_seconds = 0.0
        self.due = wanted and (True if self._once is None else self._once)
        if in_training:
            self.due &= self._training_calls % self.every == 0
            self._training_calls += 1

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """Calls in the block are about the same inputs: one comparison is enough."""
        self._once, self.seconds, self.forward_seconds = True, 0.0, 0.0
        try:
            yield
        finally:
            self._once = None

    def unchanged(self) -> None:
        """Refuses a model that was changed since its graph was built: hooks, config, attributes,
        parameters replaced by others (new values of the same parameters are fine).

        Raises:
            LiveModelError: naming the module and what changed.
            NotImplementedError: what no graph could be built of, by name.
        """
        with self._timed():
            objects = objects_of(self.model)
            if same_objects(objects, self._objects):
                return
            with _in_modes(self.modes):
                facade = traceable(self.model, self.tp)
            found = changed(self.signature, signature(facade, self.model))
        if found is not None:
            raise LiveModelError(f"{found} since the BoundedModule was built: build it again")
        self._objects = objects

    def compare(self, value: torch.Tensor, first: bool = False) -> None:
        """Runs the live model on the clean inputs and compares.

        Every rank of the group calls it, inside of a `spmd.guard`.

        Args:
            value: the graph's output there, the rank's own features where it is sharded.
            first: whether to look for values of the input that decide what is computed.

        Raises:
            LiveModelError: they differ, or the model raises; on every rank.
        """
        with self._timed():
            inputs = self._where_the_model_is(self.inputs)
            value = value.detach()
            self._once = None if self._once is None else False
            y = self._run(inputs, FollowValues(inputs) if first else contextlib.nullcontext())
            share = max(spmd.gather_objects(difference(y, value), self.tp.group))
        if share <= QUICK * torch.finfo(value.dtype).eps:
            self.difference = max(self.difference, share)
            return
        error = self._second_look(inputs, value, y)
        if error is not None:
            raise error
        self.difference = max(self.difference, share)

    def value(self, inputs: Sequence[Any]) -> torch.Tensor:
        """The live model's output at inputs, for the same ranks to call together."""
        return self._run(self._where_the_model_is(inputs), contextlib.nullcontext())

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self.seconds += spent
            self.total_seconds += spent

    def _where_the_model_is(self, inputs: Sequence[Any]) -> list[Any]:
        like = next(itertools.chain(self.model.parameters(), self.model.buffers()), None)
        plain = _plain(inputs)
        if like is None:
            return plain
        return [x.to(like.device) if isinstance(x, torch.Tensor) else x for x in plain]

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with undisturbed(self.model, self.modes), agreed_collectives(self.tp.group):
            yield

    def _run(self, inputs: list[Any], follow: Any) -> torch.Tensor:
        self.runs += 1
        try:
            with widened(self.model), self._running(), follow:
                begin = time.perf_counter()
                y = self.live(*inputs)
                self.forward_seconds += time.perf_counter() - begin
                return _first_tensor(y)
        except (SPMDError, UserError):
            raise
        except ReadsValues as found:
            raise LiveModelError(
                f"{type(self.model).__name__}: control flow depends on values of the input "
                f"({found}), but a graph of bounds covers only one case: use torch.where, or bound "
                "each case separately (check_live=False skips this check)"
            ) from None
        except Exception as error:
            raise LiveModelError(
                f"the model's own forward raises {type(error).__name__} on the clean input, so "
                f"bounds cannot be compared with it: {_line(error)} (check_live=False skips the "
                "comparison)"
            ) from error

    # --------------------------------------------------------------- a second look

    def _second_look(
        self, inputs: list[Any], value: torch.Tensor, y: torch.Tensor
    ) -> LiveModelError | None:
        """The error, or None if the difference is rounding."""
        precise = self._recorded(inputs, torch.float64)
        mine, theirs, ours = precise or self._recorded(inputs, None) or ((y, {}), {}, value)
        end, records = mine
        limit = self._limit(end.dtype)
        eps = torch.finfo(value.dtype).eps
        exact = end if value.dtype == torch.float64 or precise is None else end.to(value.dtype)
        graph_is_off = difference(exact, value, floor=1.0) > (
            LOOSE * eps if value.dtype != torch.float64 else limit
        )
        facade_is_off = difference(end, ours) > limit
        found = None
        if graph_is_off or facade_is_off:
            position = getattr(self.model, "position", None)
            found = first_difference(records, theirs, limit, self.tp, position)
        places = spmd.gather_objects((graph_is_off or facade_is_off, found), self.tp.group)
        if not any(off for off, _ in places):
            return None
        named = [place for _, place in places if place is not None]
        if named:
            _, name, text = min(named)
            return LiveModelError(
                f"{name}: the model itself computes {text}; it is the first module that differs, "
                "so the bounds would be of another function: see what changes its output (hooks, "
                "replaced methods, a patched class)"
            )
        text = values(y, value)
        name = type(self.model).__name__
        return LiveModelError(
            f"{name}: the model itself computes {text}, though its submodules agree: the graph of "
            "bounds is of another function (a value that was fixed when it was built, control flow "
            "that depends on the input, or an operator that is bounded wrongly)"
        )

    def _limit(self, dtype: torch.dtype) -> float:
        if dtype != torch.float64:
            return LOOSE * torch.finfo(dtype).eps
        single = any(type(m).__name__ == "L2Norm" for m in self.model.modules())
        return SINGLE if single else PRECISE

    def _recorded(self, inputs: list[Any], dtype: torch.dtype | None) -> Any:
        """Runs of the live model and of the facade with their submodules' outputs, in a number
        type (None: their own): ((end, records), records of the facade, its end); None if a run
        fails."""
        cast = _cast_to(self.model, dtype) if dtype else widened(self.model)
        if dtype:
            inputs = [
                x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for x in inputs
            ]
        try:
            with cast, self._running(), contextlib.ExitStack() as stack:
                records: Records = {}
                record(self.model, records, stack)
                end = _first_tensor(self.live(*inputs))
                self.runs += 1
            cast = _cast_to(self.model, dtype) if dtype else widened(self.model)
            with cast, undisturbed(self.model), contextlib.ExitStack() as stack:
                theirs: Records = {}
                record_facade(self.facade, theirs, stack)
                ours = _first_tensor(self.facade(*inputs))
        except SPMDError:
            raise
        except Exception:
            return None
        return (end, records), theirs, ours


def plain(inputs: Any, device: Any) -> list[Any]:
    """The inputs of a module on a device, as ordinary tensors."""
    inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    return [x.to(device) for x in _plain(inputs)]


def _plain(inputs: Sequence[Any]) -> list[Any]:
    """Inputs as ordinary tensors, without what may happen to them."""
    return [
        x.detach().as_subclass(torch.Tensor) if isinstance(x, torch.Tensor) else x for x in inputs
    ]


def _first_tensor(y: Any) -> torch.Tensor:
    while isinstance(y, (tuple, list)) and y:
        y = y[0]
    if isinstance(y, dict) and y:
        return _first_tensor(next(iter(y.values())))
    if not isinstance(y, torch.Tensor):
        raise UserError(f"the model returns a {type(y).__name__}, not a tensor")
    return y.detach()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _in_modes(modes: dict[nn.Module, bool]) -> Iterator[None]:
    given = {module: module.training for module in modes}
    try:
        for module, training in modes.items():
            module.training = training
        yield
    finally:
        for module, training in given.items():
            module.training = training


@contextlib.contextmanager
def _cast_to(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Floating parameters and buffers hold numbers of another type for a block."""
    kept = {
        t: t.data for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()
    }
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        for tensor, data in kept.items():
            tensor.data = data.to(dtype)
        yield
    finally:
        torch.set_default_dtype(before)
        for tensor, data in kept.items():
            tensor.data = data
