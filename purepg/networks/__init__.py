"""flax.linen networks, as the algorithms see them: `init(key, obs)` and `apply(params, obs)`.

Imports `equations` for distributions and `envs` for spaces and tables. Any flax module of your own that has these two
methods can take their place; nothing else has to change.
"""
