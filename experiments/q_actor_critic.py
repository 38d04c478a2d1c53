"""Actor-critic with a learned Q, on CartPole-v1."""

from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic
from purepg.networks.actor_critic import ActorQConfig, actor_q
from purepg.run.cli import main
from purepg.run.plan import RunConfig

if __name__ == "__main__":
    config = QActorCriticConfig(normalize_weight=True)
    network = ActorQConfig(policy="categorical", activation="tanh", num_critics=1)
    main(q_actor_critic, config, actor_q, network, RunConfig(total_steps=200_000), __doc__)
