"""The one call that trains a population; the command line calls it too."""

from collections.abc import Mapping, Sequence
from typing import Any

from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.launch import launch
from purepg.run.plan import EnvSource, MakeAlgorithm, MakeNetwork, RunConfig, prepare
from purepg.run.results import Results

DEFAULT_NETWORK = NetworkConfig()


def train_population(
    algorithm: MakeAlgorithm,
    config: Any,
    network: MakeNetwork = actor_critic,
    network_config: Any = DEFAULT_NETWORK,
    run: RunConfig | None = None,
    *,
    env: EnvSource | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    name: str | None = None,
) -> Results:
    """Trains all settings of a sweep and all seeds, evaluates every agent, and returns the results.

    Settings that differ in floats alone, with all their seeds, are one compiled program. Without `run.out` no file is
    written and W&B records nothing. Ctrl-C ends the run after its running block, with the results so far.

        results = train_population(ppo, PPOConfig(), run=RunConfig("CartPole-v1", total_steps=50_000),
                                   sweep={"learning_rate": [3e-4, 1e-3]})

    Args:
      algorithm: `algorithm(env, network, config) -> Algorithm`, such as `purepg.ppo`.
      config: the algorithm's config.
      network: `network(env, network_config)`; the replay algorithms take `purepg.actor_q`.
      network_config: the network's config.
      run: environment, steps, seeds, and how the run is kept; None: the defaults.
      env: an environment of the caller's own, or a function without arguments that makes it, in the place of the one
        that `run.env` names. It can be loaded, filmed and evaluated from the run's folder if a variable or function at
        the top level of a module holds it; else `load` and a resume must be given it.
      sweep: name of a field, or `config.field`, to its values; the settings are the grid of all.
      name: what the run is called in titles; None: the algorithm's name.
    Raises:
      UsageError: in one line, what is wrong and what to do. Before anything compiles.
      RecordError: the folder cannot be written from the start.
    """
    name_of_config = getattr(algorithm, "__name__", "algorithm")
    configs = {name_of_config: config, "network": network_config}
    plan = prepare(algorithm, network, configs, run or RunConfig(), sweep or {}, env)
    return launch(plan, name or name_of_config)
