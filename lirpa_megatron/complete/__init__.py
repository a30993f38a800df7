"""Bounds of parts, until all is proved: of networks by beta-CROWN, of sets of few dimensions.

Branch and bound, which decides properties on sharded models:

    strategy     what is split: ReLUs, intervals of other functions, or boxes

over ReLUs and intervals:

    problem      what is to be proved, and what is found out
    inputs       the graph's one input
    roots        alpha-CROWN's bounds of the boxes, and the numbering of neurons
    split_relu   the mathematics of a ReLU with splits
    split_curve  that of other functions of one variable
    planes       attention, norms and products, which are not split
    narrowing    what splits say of other neurons, by interval arithmetic
    domain_pass  a backward pass over a batch of domains
    batch        domains as tensors; alpha, beta and their optimizer
    bounding     bounds of a batch of domains
      tightening    smaller domains after that
      violations    where a goal may fail: the mathematics of it
    branching    which neuron to split
      curve_cuts    scores of other functions than ReLUs, and where they are cut
    steps        one step of a search: halves of domains, and what bounds say of them
    exploring    what becomes of some domains: proved, to be split further, stuck, or refuted
    refinement   tighter bounds of inner neurons, by branch and bound for each
      inner_rows    neurons as rows of passes that begin in front of their ReLU
      inner_search  trees whose worst domains are split until the bound is good enough
      inner_values  values that neurons attain: how good a bound can be
    linear_leaves  multipliers where nothing is left to split
    agreement    what the ranks tell each other
    points       counterexamples
    search       the loop: a queue, whose domains are shared out over replicas
    tree         whether leaves cover the whole box
    replay       bounds the leaves of a tree anew
    library      `branch_and_bound`

over boxes in which few inputs move, by CROWN for each part:

    box_bounds   bounds of a batch of parts, and what cuts of them may gain
    box_search   the loop
    cut_tree     where boxes were cut, and whether all parts are proved
    box_replay   bounds the parts of a tree anew

Pieces of sets of few dimensions, for all models and methods:

    pieces        the geometry
    covering      the loop over pieces
    input_splits  `bound_by_splits`
"""

from lirpa_megatron.complete.library import branch_and_bound
from lirpa_megatron.complete.problem import Searched, SearchOptions

__all__ = ["SearchOptions", "Searched", "branch_and_bound"]
