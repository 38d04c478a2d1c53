"""`train_population`, the function that trains a population; the command line calls it too."""

from typing import Any

from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.environment import EnvSource
from purepg.run.launch import launch
from purepg.run.plan import MakeAlgorithm, MakeNetwork, Plan, RunConfig, prepare
from purepg.run.results import Results
from purepg.run.search import Sweep
from purepg.run.sweep import Configs
from purepg.run.winner import check_winner, with_winner

DEFAULT_NETWORK = NetworkConfig()


def train_population(
    algorithm: MakeAlgorithm,
    config: Any,
    network: MakeNetwork = actor_critic,
    network_config: Any = DEFAULT_NETWORK,
    run: RunConfig | None = None,
    *,
    env: EnvSource | None = None,
    sweep: Sweep | None = None,
    name: str | None = None,
) -> Results:
    """Trains all settings of a sweep and all seeds, evaluates every agent, and returns the results. The best setting of
    a search is then trained again on fresh seeds (`run.fresh_seeds`); it is `results.winner`.

    Settings that differ only in floats share one compiled program with all their seeds. Without `run.out`, no file is
    written and W&B records nothing. Ctrl-C stops the run after the current block and returns the results so far.

        results = train_population(ppo, PPOConfig(), run=RunConfig("CartPole-v1", total_steps=50_000),
                                   sweep={"learning_rate": [3e-4, 1e-3]})

    Args:
      algorithm: `algorithm(env, network, config) -> Algorithm`, such as `purepg.ppo`.
      config: the algorithm's config.
      network: `network(env, network_config)`; the replay algorithms take `purepg.actor_q`.
      network_config: the network's config.
      run: environment, steps, seeds, and what is saved. None: the defaults.
      env: replaces `run.env`: a name, your own environment, or a function without arguments that makes it. If it is a
        module-level variable or function, the saved run can be loaded, filmed and evaluated from its folder; otherwise
        pass it to `load`, and again when resuming.
      sweep: maps a field's name, or `config.field`, to a list of its values; the settings are the grid of all of them.
        With `run.search`, so many settings are drawn, also from ranges, such as `Uniform(1e-4, 1e-2, log=True)`.
      name: the run's name in titles. None: the algorithm's name.
    Raises:
      UsageError: an argument is wrong. Raised before anything compiles; the message says what to do.
      RecordError: the folder cannot be written at the start of the run.
    """
    name_of_config = getattr(algorithm, "__name__", "algorithm")
    configs = {name_of_config: config, "network": network_config}

    def prepared(configs: Configs, run: RunConfig, sweep: Sweep) -> Plan:
        return prepare(algorithm, network, configs, run, sweep, env)

    plan = prepared(configs, run or RunConfig(), sweep or {})
    check_winner(plan)
    results = launch(plan, name or name_of_config)
    return with_winner(results, prepared)
