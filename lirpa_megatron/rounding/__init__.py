"""Bounds that hold in real arithmetic: `rounding="outward"` widens each by a proven error.

Bounds are computed in floating-point numbers, and a sound formula may give an unsound number: with
weights of 1e8 and -1e8 that cancel, a lower bound can lie above a value that the network takes.
With this option every bound that anything uses or prints is moved outwards by an upper bound on
what its own computation was off (a running error analysis: Higham, *Accuracy and Stability of
Numerical Algorithms*, 3.3; for network verifiers see Singh et al., POPL 2019). The function bounded
is the network of the weights as they are stored, in real arithmetic; what a program that runs it in
floating point prints is another matter.

**The pass.** Let A be the rows at some node y, computed, and take them as exact numbers. What a
lower bound rests on is one inequality for each operator y = f(x) on the way,

    <A_y, y>  >=  <A_x, x> + bias      for all x in what its bounds allow,

and all of them together give <C, output> >= <A, input> + sum of biases. In floating-point numbers
each holds but for an error e >= 0 that can be computed: the operator's rule (`rules`, `curves`)
says how far A_x and the bias, as they were computed, are off, times how large x can be. The bound
is off by the sum of all e and by what sums and the end add (`charges`), nothing more: an error of A
is counted where it arises, with A then exact again, so errors do not multiply.

**Intervals** are widened operator by operator, by the rules' `of_interval`; bounds of intermediate
nodes, from either side, before anything reads them.

**The input** is the box [x - eps, x + eps], its ends rounded outwards.

**The margins** are sums of positive numbers; a slack of 2^-6 and 4 u of the bound cover their own
rounding (`arithmetic.floating.margin`). Gradients do not see them.

**Products, norms, softmax and attention** run their own code in numbers that carry a limit on their
error (`arithmetic.near`, `planes`): what real arithmetic makes of a plane's formulas is sound, and
the limits say how far the computed plane is from that. The affine forms of nodes count what the
pass that made them was off in their slacks (`forms`), so nothing is switched off.

What is assumed: float64, rounding to nearest, products and sums as in `arithmetic.floating` (no
products by Strassen's method, no emulation of float64), torch's exp, expm1, tanh, cosh, sigmoid and
erfc within 4 units in the last place (`curves.Accuracy`). Tables of rotary positions, the scale of
scores and the epsilon of a norm are the float64 numbers that the model has. Bounds that the caller
gives (`interm_bounds`) are taken at their word.
"""
