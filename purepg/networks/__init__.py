"""flax.linen networks. Algorithms use only their `init(key, obs)` and `apply(params, obs)`.

Imports `equations` for distributions and `envs` for spaces and tables. Your own flax modules can replace them.
"""
