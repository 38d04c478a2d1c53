"""flax.linen networks. Algorithms use only their `init(key, obs)` and `apply(params, obs)`.

Imports `equations` for distributions and `envs` for spaces and tables. Any flax module of yours with these two methods
can replace them without further changes.
"""
