"""Actor-critic with a learned Q, on CartPole-v1."""

from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic
from purepg.networks.actor_critic import ActorQConfig, actor_q
from purepg.run.cli import main
from purepg.run.plan import RunConfig

CONFIG = QActorCriticConfig(normalize_weight=True)
NETWORK = ActorQConfig(policy="categorical", activation="tanh", num_critics=1)
EXPERIMENT = q_actor_critic, CONFIG, actor_q, NETWORK, RunConfig(total_steps=200_000)

if __name__ == "__main__":
    main(*EXPERIMENT, __doc__)
