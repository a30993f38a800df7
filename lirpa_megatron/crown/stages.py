"""A BoundedModule that is one stage of a pipeline: what it does besides bounding its own graph.

Every stage runs auto_LiRPA's code on its own graph. Where that comes to the model's output, the
last stage bounds it, and each of the others serves the stage above until that is done
(`stage_service`). So a loop of alpha-CROWN runs on all stages alike, each with alpha of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.affine_forms import InputSet
from lirpa_megatron.crown.alpha_rows import rows_with_alpha
from lirpa_megatron.crown.clean_output_check import clean_is_inside
from lirpa_megatron.crown.graph import Passes
from lirpa_megatron.crown.stage_below import FarInputs, FarSet, StageBelow
from lirpa_megatron.crown.stage_gradients import Handed, in_place_of
from lirpa_megatron.crown.stage_service import StageService
from lirpa_megatron.errors import UserError
from lirpa_megatron.operators import is_elementwise
from lirpa_megatron.parallel.checksums import check_same, checksums
from lirpa_megatron.parallel.pipeline import DOWN, UP, Pipeline

_UNAVAILABLE = "return_A", "needed_A_dict", "final_node_name"
"""Arguments of `compute_bounds`."""


class Stages:
    """This stage of a pipeline, for one BoundedModule.

    Args:
        pipeline: of this rank.
        group: its tensor-parallel group.

    Attributes:
        below: what is asked of the stage below; None on the first.
        relaxes_rows: whether an operator of any stage does (`Operator.relaxes_rows`).
        widest_below: most numbers of one sample that a row has on the stages below: on a rank that
            has its own features of a sharded node, and on one that has all of them.
        clean_inside: whether the clean input of a call is known to be among those bounded.
    """

    def __init__(self, pipeline: Pipeline, group: dist.ProcessGroup | None) -> None:
        self.pipeline = pipeline
        self.below = None if pipeline.is_first else StageBelow(pipeline, group)
        self.relaxes_rows = self.clean_inside = False
        self.widest_below = 0, 0

    # ------------------------------------------------------------------ building

    def check_alike(self, values: Mapping[str, str]) -> None:
        """Refuses stages that were built with other options or configs.

        Args:
            values: what must be the same on all stages.
        """
        found = self.pipeline.agree("options", checksums(values))
        check_same(found, "pipeline stages", "every stage must be built alike")

    def example(self, inputs: Any) -> Any:
        """The inputs of this stage's graph, from those of the model."""
        if self.below is None:
            return inputs
        first, *others = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        message = self.pipeline.receive(DOWN, "the example's value")
        self.below.is_elementwise = message.fields["elementwise"]
        (hidden,) = message.tensors
        return (hidden.to(first.device), *others)

    def attach(self, graph: Passes) -> None:
        """The graph of this stage is there."""
        self.graph = graph
        self.service = StageService(graph, self.pipeline, self.below)
        final = graph[graph.final_name]
        if not self.pipeline.is_last and graph.context.sharded[final.name]:
            raise UserError(
                f"pipeline stage {self.pipeline.stage} ends inside of a sharded region: end it "
                "after a RowParallelLinear"
            )
        for leaf in auto_lirpa.roots(graph):
            leaf.takes_identity = True  # rows go on in the stage below as they are

    def pass_on(self, value: torch.Tensor) -> None:
        """The value at the example input goes to the next stage; building ends on all stages."""
        if not self.pipeline.is_last:
            final = self.graph[self.graph.final_name]
            fields = {"elementwise": is_elementwise(final)}
            self.pipeline.send(UP, "the example's value", fields, [value])
        nodes = self.graph.named_nodes().values()
        self.relaxes_rows = self.any_stage(
            "operators", any(getattr(node, "relaxes_rows", False) for node in nodes)
        )
        widths = [self.widest_below]
        widths += self.pipeline.agree("widths", self._widest())[: self.pipeline.stage]
        self.widest_below = max(own for own, _ in widths), max(whole for _, whole in widths)

    def _widest(self) -> tuple[int, int]:
        """Of this stage, what `widest_below` is of those below."""
        context, sizes = self.graph.context, {}
        for name, node in self.graph.named_nodes().items():
            depends = any(x.name in sizes for x in node.inputs)
            if depends or type(node) is auto_lirpa.BoundInput:  # not weights, nor made of them
                sizes[name] = math.prod(node.output_shape[1:])
        tp = context.collectives.size
        whole = (size * (tp if context.sharded[name] else 1) for name, size in sizes.items())
        return max(sizes.values()), max(whole)

    # -------------------------------------------------------------------- a call

    def check_arguments(self, kwargs: Mapping[str, Any]) -> None:
        """Refuses arguments of `compute_bounds` that are about more than one stage.

        Bounds that the caller gives are of this stage's nodes. What a stage takes from the one
        below is no node of either alone: its bounds are not taken.

        Args:
            kwargs: under the host's names.
        """
        for name in _UNAVAILABLE:
            if kwargs.get(name):
                raise NotImplementedError(
                    f"compute_bounds({name}=...) is not available over pipeline stages: call it "
                    "on a module of the whole model"
                )
        border = [] if self.below is None else [self.graph.stage_input.name]
        border += [] if self.pipeline.is_last else [self.graph.final_name]
        for host_name, name in zip(
            auto_lirpa.GIVEN_BOUNDS, ("interm_bounds", "reference_bounds"), strict=True
        ):
            found = next((node for node in kwargs.get(host_name) or () if node in border), None)
            if found is not None:
                raise NotImplementedError(
                    f"{name} of {found!r}, which passes from one pipeline stage to the next, are "
                    "not available: leave them out"
                )

    def begin(
        self, x: Any, values: Mapping[str, torch.Tensor | str | None]
    ) -> Any:
        """A call of `compute_bounds` begins: the stages compare what they were given.

        Args:
            x: the model's inputs, or None.
            values: what must be the same on all stages.

        Returns:
            The inputs of this stage's graph.
        """
        found = self.pipeline.agree("the arguments of compute_bounds", checksums(values))
        check_same(found, "pipeline stages", "every rank must pass the same")
        if x is None:
            raise UserError("compute_bounds over pipeline stages needs the inputs x in every call")
        if any(getattr(value, "ptb", None) is not None for value in x[1:]):
            raise NotImplementedError(
                "only the first input can be perturbed over pipeline stages"
            )
        self.clean_inside = clean_is_inside([
            SimpleNamespace(value=value, perturbation=value.ptb)
            for value in x if getattr(value, "ptb", None) is not None
        ])
        self.service.begin_call()
        if self.below is None:
            return x
        self.below.forget()
        shape = (x[0].shape[0], *self.graph.stage_input.output_shape[1:])
        like = torch.zeros(shape, dtype=self.graph.schedule.dtype, device=x[0].device)
        return (auto_lirpa.BoundedTensor(like, FarSet(like)), *x[1:])

    def any_stage(self, what: str, own: bool) -> bool:
        """Whether something holds on any stage."""
        return any(self.pipeline.agree(what, own))

    def on_every_stage(self, what: str, own: Sequence[str]) -> list[str]:
        """Those of `own` that all stages have."""
        found = self.pipeline.agree(what, list(own))
        return [each for each in own if all(each in others for others in found)]

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """While bounds are computed, the stage's input is asked of the stage below."""
        if self.below is None:
            yield
            return
        self.below.is_asked = True
        try:
            yield
        finally:
            self.below.is_asked = False

    def placeholder(self, x: Any) -> torch.Tensor:
        """What the host is given as specification where the model's output is not."""
        shape = self.graph[self.graph.final_name].output_shape[1:]
        one = torch.ones((), device=x[0].device, dtype=self.graph.schedule.dtype)
        return one.expand(x[0].shape[0], 1, *shape)

    def found(
        self, bounds: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """On the last stage: the bounds of the model (in an iteration) are there; others end."""
        present = [b for b in bounds if b is not None]
        grad = torch.is_grad_enabled() and any(b.requires_grad for b in present)
        sides = [b is not None for b in bounds]
        self.service.end({"sides": sides, "grad": grad}, present)
        number = self.service.next_number()
        if not grad:
            return list(bounds)
        anchor = torch.zeros((), requires_grad=True)
        handed = iter(Handed.apply(self.service.begin_gradients, number, anchor, *present))
        return [None if b is None else next(handed) for b in bounds]

    def handed_out(
        self, bounds: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """The call's bounds as the last stage returns them, on every stage."""
        if not self.pipeline.is_last:
            message = self.pipeline.receive(UP, "result")
            sides = message.fields["sides"]
            values = iter(in_place_of([b for b in bounds if b is not None], message.tensors))
            bounds = [next(values) if given else None for given in sides]
        if self.below is not None:
            present = [b for b in bounds if b is not None]
            self.pipeline.send(
                DOWN, "result", {"sides": [b is not None for b in bounds]}, present
            )
        return list(bounds)

    # --------------------------------------------------------------------- alpha

    def starts_with_alpha(self) -> list[tuple[str, int]]:
        """Start nodes whose passes have alpha and leave this stage downwards, with their rows."""
        graph, found = self.graph, []
        if graph.call.method != "CROWN-Optimized":
            return found
        for start in dict.fromkeys(graph.backward_from[graph.stage_input.name]):
            is_final = getattr(start, "is_final", start.name == graph.final_name)
            rows = rows_with_alpha(graph, start, is_final)
            if rows is not None:
                found.append((self.far_name(start), rows.total))
        return found

    def far_name(self, start: Any) -> str:
        """A start node's name among all stages."""
        is_far = getattr(start, "is_far", False)
        return start.name if is_far else f"stage {self.pipeline.stage}: {start.name}"



class GraphOfStage:
    """What a BoundedModule knows of its place among the stages of a pipeline: mixed in.

    Attributes:
        pipeline: this rank's; None where there is one stage.
        stages: this stage; None where there is one.
        folded: `folded_inputs.FoldedInputs` of the call of `compute_bounds`, or None.
    """

    pipeline: Pipeline | None
    stages: Stages | None
    folded: Any = None

    @property
    def has_output(self) -> bool:
        """Whether the model's output is here, and not on another pipeline stage."""
        return self.pipeline is None or self.pipeline.is_last

    @property
    def below(self) -> Any:
        """The pipeline stage below; None where the model's input is."""
        return self.context.below

    @property
    def stage_input(self) -> auto_lirpa.Bound | None:
        """The node that stands for the output of the stage below."""
        if self.below is None:
            return None
        nodes = self._modules.values()
        return next(node for node in nodes if getattr(node, "is_stage_input", False))

    @property
    def relaxes_rows(self) -> bool:
        """Whether an operator of the model does (`Operator.relaxes_rows`)."""
        if self.stages is not None:
            return self.stages.relaxes_rows
        return any(getattr(node, "relaxes_rows", False) for node in self._modules.values())

    def input_set(self) -> InputSet:
        """The model's perturbed inputs, as affine forms need them."""
        if self.below is not None:
            return FarInputs(self.below.facts)
        return InputSet(auto_lirpa.perturbed_inputs(self))

    def IBP_general(self, node: auto_lirpa.Bound, C: Any = None, **kwargs: Any) -> Any:
        """The host's IBP, which merges C with the last linear layer, also through a gather.

        Args:
            node: the node to bound; the last one of a stage is not bounded by C, which is of the
                model's output, and where IBP is all that was asked for, it ends the call there.
            C: [B, S, features of the node], or None.
            **kwargs: as in auto_LiRPA.
        """
        if self.stages is None or not self.call.method or node is not self[self.final_name]:
            return self._ibp(node, C, **kwargs)
        bounds = self._ibp(node, C if self.has_output else None, **kwargs)
        if self.call.method != "IBP":
            return bounds
        return self.stages.found(bounds) if self.has_output else self.stages.service.serve()
