"""Language models as policies: the transformer, checkpoints, sampling and scoring.

Imports `equations` and `envs` (for token tasks). Change it to support another architecture or checkpoint format.
"""
