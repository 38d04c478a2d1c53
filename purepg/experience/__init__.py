"""Collecting and storing experience: acting, exploration, rollouts and whole episodes, normalisation, replay.

Imports `equations` for distributions and `envs` for the contract of environments. Environments are reset and stepped
here. Change this package to collect data in another way.
"""
