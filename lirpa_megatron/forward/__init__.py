"""Bounds by affine forms and Taylor models that go through the network as its forward pass does.

A node's value is z = P(s) + R. P is a polynomial (of degree 1: an affine form) in the symbols s of
the perturbation set and, for degree 1, in symbols of the relaxations' own errors. R is what P
leaves out, bounded by a box and by a ball of each token's vector. The cost is about one forward
pass for each monomial, and there is no row for each neuron, as CROWN has.

    polynomials   products of polynomials, truncated, and functions of them
    domains       the sets that the symbols lie in, and what bounds polynomials over them
    form          the value of a node; the errors that relaxations make
    shares        which symbols are whose at replicated nodes
    shared_domain bounds from each rank's own symbols
    inputs        perturbation sets as symbols
    error_symbols errors of relaxations as symbols of their own
    rules         which rule an operator has: one table
    *_rules       the rules: linear, elementwise, products, norms, scores, attention
    propagation   runs the rules over a bound graph
    adjoint       the errors of all relaxations, by rows through the linearised network
    method        `compute_bounds(method="forward")` and "forward+backward"

Sharded as the forward pass is: at a sharded node each rank has its own features of all monomials,
at a replicated node all features of its own symbols (`shares`). Polynomials of degree 2 and more,
and sets of fewer than two symbols for each rank, are whole on all ranks at replicated nodes: there
they have few monomials, and norms multiply them with one another. So are forms of networks with
tokens where errors are symbols (`error_symbols`), and forms there that come from
operators whose rule is not marked (`rules.reading_shares`), which first get all symbols. Centres,
boxes and balls are always replicated. Communication is that of the operators' own forward passes,
`ranks` and `shares`.
"""
