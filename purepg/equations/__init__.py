"""Arrays in, arrays out: the mathematics of policy gradients, each function beside its equation.

Imports `types`, `config`, `lanes` and `precision` alone. A new estimator, loss or distribution of your own goes here;
the tests hold each one to exact values, so add a test of its equation.
"""
