"""How experience is made and kept: acting, exploring, rollouts and whole episodes, normalisation, replay.

Imports `equations` for distributions and `envs` for what environments promise. Environments are stepped and reset here,
and the running statistics and the replay buffer live here; change it to collect data in another way.
"""
