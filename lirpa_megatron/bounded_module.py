"""BoundedModule: auto_LiRPA's, for models sharded by tensor parallelism.

auto_LiRPA traces the model, keeps the perturbations, runs IBP through the operators and drives the
alpha loop. What depends on ranks is here: which nodes are sharded, which rows each rank carries,
and that all ranks agree.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lirpa_megatron.adapters.plain.functions import traced_functions
from lirpa_megatron.adapters.stages import LaterStage, check_place, config_of, place_of
from lirpa_megatron.adapters.traceable import device_of, traceable
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.compat.full_precision import full_precision
from lirpa_megatron.crown import alpha
from lirpa_megatron.crown.alpha_rows import alpha_start_nodes
from lirpa_megatron.crown.auto_method import cheaper_first
from lirpa_megatron.crown.clean_output_check import check_outputs
from lirpa_megatron.crown.clean_values import value_at
from lirpa_megatron.crown.final_pass import bound_final
from lirpa_megatron.crown.intermediate_bounds import Intermediate
from lirpa_megatron.crown.live_check import LiveCheck, plain
from lirpa_megatron.crown.options import (
    OwnOptions,
    check_options,
    check_output,
    check_set_later,
    checked_arguments,
    for_host,
    text_of,
)
from lirpa_megatron.crown.row_schedule import RowSchedule
from lirpa_megatron.crown.sharded_nodes import mark_sharded
from lirpa_megatron.crown.stages import GraphOfStage, Stages
from lirpa_megatron.operators import custom_operators, cut_with_range
from lirpa_megatron.operators.context import CallState, GraphContext
from lirpa_megatron.operators.numerics import without_nan
from lirpa_megatron.operators.parameters import own_value, widened
from lirpa_megatron.parallel import spmd
from lirpa_megatron.parallel.pipeline import guard
from lirpa_megatron.problem.perturbations import check_perturbations, described, enclose_balls
from lirpa_megatron.rounding.outward import Outward


class BoundedModule(GraphOfStage, auto_lirpa.HostBoundedModule):
    """Bounds on the outputs of a model over a set of inputs; the model may be sharded.

    The constructor and `compute_bounds` take auto_LiRPA's arguments. Every rank of the
    tensor-parallel group makes the same calls with the same (replicated) inputs and gets the same
    bounds. Without an initialised process group there is one rank.

    Parameters are shared with the model, not copied. In training mode gradients flow to them;
    `eval()` detaches them.

    Args:
        model: a plain nn.Module, batch first, which may contain megatron-core's
            ColumnParallelLinear and RowParallelLinear; a GPTModel, HybridModel or BertModel; or a
            view or margins of one.
        global_input: an example input (or a tuple of them), replicated. It gives the shapes, and
            the live check runs the model on it.
        bound_opts: auto_LiRPA's options, and those of `OwnOptions` (`max_spec_rows`, ...).
        device: as in auto_LiRPA.
        verbose: as in auto_LiRPA.
        custom_ops: as in auto_LiRPA.

    Raises:
        NotImplementedError: an operator, hook or option that is not supported, by name.
        LiveModelError: the graph computes a different function than the model's own forward.
        SPMDError: replicated parameters differ between ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        global_input: Any,
        bound_opts: Mapping[str, Any] | None = None,
        device: Any = "auto",
        verbose: bool = False,
        custom_ops: Mapping[str, type] | None = None,
    ) -> None:
        own, host_opts = OwnOptions.split(bound_opts)
        pipeline, collectives = place_of(model)
        stages = None if pipeline is None else Stages(pipeline, collectives.group)
        context = GraphContext(
            collectives, self.get_forward_value, own.tuning,
            below=None if stages is None else stages.below,
        )
        with guard(pipeline, context.collectives.group, "BoundedModule"):
            check_options(host_opts)
            object.__setattr__(self, "pipeline", pipeline)
            object.__setattr__(self, "stages", stages)
            if stages is not None:
                check_place(model, pipeline)
                stages.check_alike(
                    {"bound_opts": text_of(host_opts), "options": repr(own), **config_of(model)}
                )
                global_input = stages.example(global_input)
            object.__setattr__(self, "own_options", own)
            object.__setattr__(self, "context", context)
            object.__setattr__(self, "sharded", context.sharded)
            object.__setattr__(self, "call", CallState())
            optimize_args = host_opts.get("optimize_bound_args", {})
            optimize_args = auto_lirpa.translate_optimize_args(optimize_args)
            opts = {
                **auto_lirpa.PINNED_OPTIONS,
                **host_opts,
                **own.for_host(),
                "optimize_bound_args": optimize_args,
                "context": context,
            }
            trainable = {p: p.requires_grad for p in model.parameters()}
            operators = {**custom_operators(), **(custom_ops or {})}
            with auto_lirpa.conversion(global_input), auto_lirpa.running(), widened(model), \
                    contextlib.ExitStack() as tracing:
                facade = traceable(model, context.collectives)
                tracing.enter_context(
                    traced_functions(facade, global_input, operators, context.calls)
                )
                super().__init__(
                    facade if context.below is None else LaterStage(facade), global_input,
                    bound_opts=opts,
                    device=device_of(model, global_input) if device == "auto" else device,
                    verbose=verbose, custom_ops=operators,
                )
            self._adopt_parameters(trainable)
            context.sharded.update(
                mark_sharded(self._modules.values(), context.collectives.size)
            )
            object.__setattr__(self, "schedule", RowSchedule(self))
            if stages is not None:
                stages.attach(self)
            object.__setattr__(self, "intermediate", Intermediate(self))
            outward = own.rounding == "outward"
            object.__setattr__(self, "rounding", Outward(self) if outward else None)
            self.train(model.training)
            self._check_parameters_agree()
            object.__setattr__(self, "live", None)
            if own.check_live:
                live = LiveCheck(model, facade, context.collectives, own.check_live_every)
                object.__setattr__(self, "live", live)
                live.at_example(self, global_input)
            if stages is not None:
                stages.pass_on(value_at(self, plain(global_input, self.device)))

    # ----------------------------------------------------------------- the graph

    def _adopt_parameters(self, trainable: Mapping[nn.Parameter, bool]) -> None:
        """Parameters as the model has them: the host sets requires_grad by the mode it is in."""
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)
        for node in self._modules.values():
            if isinstance(node, auto_lirpa.BoundParams):
                object.__setattr__(node, "forward", own_value(node))

    def _check_parameters_agree(self) -> None:
        replicated = {
            node.ori_name: node.param
            for node in self._modules.values()
            if isinstance(node, auto_lirpa.BoundParams) and not self.sharded[node.name]
        }
        spmd.check_replicated(
            self.context.collectives.group,
            {f"replicated parameter {name!r}": value for name, value in replicated.items()},
            "the bounds would be of no model at all; broadcast it from rank 0",
        )

    def named_nodes(self) -> dict[str, auto_lirpa.Bound]:
        """The bound graph: node name -> operator."""
        return dict(self._modules)

    _named_members = auto_lirpa.named_members

    def train(self, mode: bool = True) -> BoundedModule:
        """Training mode: gradients flow to the parameters."""
        super().train(mode)
        return self

    def eval(self) -> BoundedModule:
        """Evaluation mode: parameters are constants of the bounds."""
        return self.train(False)

    def set_bound_opts(self, new_opts: Mapping[str, Any]) -> None:
        """auto_LiRPA's `set_bound_opts`, with the options checked."""
        own, host_opts = OwnOptions.split(new_opts, self.own_options)
        check_set_later(self.own_options, own)
        check_options(host_opts)
        object.__setattr__(self, "own_options", own)
        if "optimize_bound_args" in host_opts:
            translated = auto_lirpa.translate_optimize_args(host_opts["optimize_bound_args"])
            host_opts = {**host_opts, "optimize_bound_args": translated}
        super().set_bound_opts({**host_opts, **own.for_host()})

    # -------------------------------------------------------------------- bounds

    def compute_bounds(
        self, x: Any = None, aux: Any = None, C: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Lower and upper bounds of `C y` (or of the output y) over the perturbation set of `x`.

        Args:
            x: tuple of inputs, replicated; the perturbed ones are BoundedTensors.
            aux: as in auto_LiRPA.
            C: specification [B, S, output features], replicated; for a sharded output
                (gather_output=False) the rank's own features [B, S, features / p].
            **kwargs: auto_LiRPA's: method (also 'auto': `cheaper_first`), bound_lower,
                bound_upper, final_node_name, interm_bounds, return_A, decision_thresh, ...

        Returns:
            (lower, upper), each [B, S], or [B, *output shape] without C, the same on every rank;
            for a sharded output without C, of the rank's own features. With `return_A` also the
            dictionary start node -> input node -> {lA, uA: [B, S, *input shape], lbias, ubias:
            [B, S]}, whole or the rank's own rows (`OwnOptions.return_A_rows`).

        Raises:
            ValueError: an unknown method, a negative radius, an empty box, wrong shapes.
            NotImplementedError: an argument or method that is not available on shards, by name.
            LiveModelError: the model was changed, or computes a different function than its graph.
            BoundsError: the bounds exclude the model's own output at the clean input.
            SPMDError: inputs or options differ between ranks, or another rank failed.
        """
        if self.call.method is not None:  # the host calling itself: alpha iterations
            return super().compute_bounds(x=x, aux=aux, C=C, **kwargs)
        if isinstance(x, torch.Tensor):
            x = (x,)
        if not torch.is_grad_enabled() and alpha.is_asked_for(kwargs):
            return alpha.without_gradients(self, x, aux, C, kwargs)
        group = self.context.collectives.group
        if self.live is not None:
            self.live.begin(x, self._in_training(), self.own_options.check_live)
        if str(kwargs.get("method")).lower() == "auto":
            once = contextlib.nullcontext() if self.live is None else self.live.once()
            with guard(self.pipeline, group, "compute_bounds"), once:
                return cheaper_first(self, x, aux, C, kwargs)
        everyone = guard(self.pipeline, group, "compute_bounds")
        with everyone, auto_lirpa.running(x or ()), full_precision(self.device):
            kwargs = checked_arguments(self, kwargs)
            # For a sharded output C is each rank's own; its shape is common all the same.
            own_C = C is not None and self.sharded[self._final(kwargs).name]
            values = {
                "the specification C": str(tuple(C.shape)) if own_C else C,
                "a keyword argument": text_of(kwargs),
            }
            values |= {} if x is None else described(x)
            spmd.check_replicated(
                group, values, "every rank must pass the same; broadcast it from rank 0"
            )
            check_perturbations(self, x or (), kwargs["method"])
            if self.stages is not None:
                if C is not None:
                    values["the specification C"] = str(tuple(C.shape[:2]))
                x = self.stages.begin(x, values)
            if self.live is not None and self.live.due:
                self.live.unchanged()
            final = self._final(kwargs)
            if self.has_output:
                check_output(final, self.sharded[final.name], C, kwargs["method"])
            if self.rounding is not None:
                x = self.rounding.begin(x, kwargs)
            of_use = alpha.is_of_use(self, final, x)
            if self.stages is not None:
                of_use = self.stages.any_stage("alpha is of use", of_use)
            if not of_use:
                kwargs["method"] = alpha.same_without(kwargs["method"])
            asking = contextlib.nullcontext() if self.stages is None else self.stages.asking()
            with self._calling(kwargs, C is None) as call, asking:
                if not self.has_output:
                    C = self.stages.placeholder(x)
                C = self._identity(x, final) if C is None else C
                bounds = super().compute_bounds(x=x, aux=aux, C=C, **for_host(kwargs))
                lower, upper = without_nan(*bounds[:2])
                if call.final_is_identity and self.has_output:
                    lower, upper = alpha.shaped(final, lower, upper)
                    if self.rounding is None and not kwargs.get("return_A"):
                        lower, upper = cut_with_range(final, lower, upper)
                # Not bounds in training by IBP, of which a forward pass would be a good part, nor
                # where the caller's own intermediate bounds may leave the clean input out.
                in_training = call.method == "IBP" and self._in_training()
                cut = any(kwargs.get(name) for name in auto_lirpa.GIVEN_BOUNDS)
                cut = cut if self.stages is None else self.stages.any_stage("given bounds", cut)
                C = None if call.final_is_identity else C
                if self.below is not None and self.live is not None and self.live.due:
                    self.live.inputs = (self.below.value, *x[1:])
                check_outputs(
                    self, final, C, lower, upper,
                    self.has_output and not in_training and not cut,
                )
                if self.stages is not None:
                    lower, upper = self.stages.handed_out((lower, upper))
                return (lower, upper, *bounds[2:])

    @contextlib.contextmanager
    def _calling(self, kwargs: Mapping[str, Any], final_is_identity: bool) -> Iterator[CallState]:
        """A call's state, made anew: what an earlier call found may not hold for these inputs."""
        optimized = kwargs["method"] == "CROWN-Optimized"
        call = CallState(
            method=kwargs["method"], final_is_identity=final_is_identity,
            form_limit=self.own_options.form_limit,
            form_room=self.schedule.limits.form_memory(),
            # What errors are is found from forms, too, after a relaxation was made.
            rereads=optimized or torch.is_grad_enabled() or self.rounding is not None,
            kept={} if optimized and not self.intermediate.has_alpha else None,
        )
        object.__setattr__(self, "call", call)
        if optimized and self._makes_alpha():
            self.intermediate.with_alpha = {}
        try:
            with alpha.stopping(self, kwargs.get("decision_thresh")):
                yield call
            for told in self.context.ended:
                told(call)
        finally:
            for node in self.optimizable_activations:
                node.opt_end()  # an error may have left alpha in use
            object.__setattr__(self, "call", CallState(final_is_identity=final_is_identity))

    def _identity(self, x: Any, final: auto_lirpa.Bound) -> torch.Tensor | None:
        """What the host is given for the identity at a gathered output: [B, S, S] of one element.

        Left alone it would build the matrix, S the size of a vocabulary. Nothing reads it.
        """
        starts_before = getattr(final, "identity_starts_at_input", False)
        if self.call.method == "IBP" or not (starts_before or self.call.method == "forward"):
            return None
        S = math.prod(final.output_shape[1:])
        batch = self.batch_size if x is None else x[0].shape[0]
        return torch.ones(1, device=self.device).expand(batch, S, S)

    def _in_training(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _final(self, kwargs: Mapping[str, Any]) -> auto_lirpa.Bound:
        return self[kwargs.get("final_node_name") or self.final_name]

    def check_prior_bounds(self, node: auto_lirpa.Bound, **kwargs: Any) -> None:
        """The host's recursion over nodes that need bounds; see `enclose_balls`."""
        enclose_balls(auto_lirpa.roots(self), outward=self.rounding is not None)
        if self.call.method == "forward":
            return  # it bounds what it needs on the way
        for x in node.inputs:
            if x.inputs and not x.perturbed and not auto_lirpa.has_bounds(x):
                self.intermediate.compute(x)  # 0.3's operators read bounds of constants
        super().check_prior_bounds(node, **kwargs)

    def compute_intermediate_bounds(
        self, node: auto_lirpa.Bound, prior_checked: bool = False
    ) -> None:
        """Bounds of an intermediate node, into `node.lower` and `node.upper`.

        Sharded nodes are bounded by the rank that has them, replicated ones row by row on all
        ranks; both exactly, by a backward pass to the input.
        """
        if auto_lirpa.has_bounds(node):
            return
        if not prior_checked and not self.intermediate.knows(node):
            self.check_prior_bounds(node)
        self.intermediate.compute(node)

    def _makes_alpha(self) -> bool:
        """Whether CROWN-Optimized begins with alpha of its own, not that of an earlier call."""
        return self.bound_opts["optimize_bound_args"].get("init_alpha", True)

    def has_alpha(self, start: auto_lirpa.Bound) -> bool:
        """Whether the present call's passes from a start node have alpha, or will have."""
        has = start.name == self.final_node_name or self.intermediate.has_alpha
        return self.call.method == "CROWN-Optimized" and has

    def _ibp(self, node: auto_lirpa.Bound, C: Any = None, **kwargs: Any) -> Any:
        """`IBP_general` of one stage."""
        if self.call.method is not None and self.call.final_is_identity:
            C = None  # see `_identity`
        x = node.inputs[0] if getattr(node, "identity_starts_at_input", False) else None
        host = auto_lirpa.HostBoundedModule.IBP_general
        if C is not None and getattr(x, "merges_own_specification", False):
            return host(self, x, self.context.collectives.split_features(C), **kwargs)
        merged = C is not None and isinstance(node, auto_lirpa.BoundLinear)
        if C is not None and self.rounding is not None and not merged:
            return self.rounding.merged(host(self, node, **kwargs), C)
        return host(self, node, C, **kwargs)

    def backward_general(self, *args: Any, **kwargs: Any) -> Any:
        """The host's entry for the final node; see `compute_bounds` for shapes."""
        lower, upper = bound_final(self, auto_lirpa.backward_call(args, kwargs))
        return (lower, upper, self.A_dict) if self.return_A else (lower, upper)

    def get_alpha_crown_start_nodes(
        self, node: auto_lirpa.Bound, c: Any = None, share_alphas: bool = False,
        final_node_name: str | None = None, share_slopes: bool = False,
    ) -> list[tuple]:
        """Start nodes whose passes go through `node`, each with the rows of alpha it has there."""
        return alpha_start_nodes(
            self, node, c, share_alphas or share_slopes, final_node_name or self.final_name
        )
