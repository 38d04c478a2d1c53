"""The mathematics of policy gradients as functions of arrays, each beside its equation.

Imports only `types`, `config`, `lanes` and `precision`. Add a new estimator, loss or distribution here, with a test of
its equation: the tests compare each one with exact values.
"""
