"""Language models as policies: the transformer, checkpoints, sampling and scoring.

Imports `equations` and `envs` (for token tasks). Change this package to support another architecture or checkpoint
format.
"""
