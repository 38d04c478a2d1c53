"""Direct preference optimisation (Rafailov et al. 2023, eq. 7), an offline method. Per gradient step, over pairs of
responses that the initial policy pi_ref gave, of which y_w earned more than y_l:

    theta <- theta + lr * E[ grad log sigmoid(beta * log pi/pi_ref (y_w | x) - beta * log pi/pi_ref (y_l | x)) ]

No response is sampled from pi.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from purepg.algorithms.configs import HeldOutConfig
from purepg.algorithms.groups import GroupLearner, mean_return, source
from purepg.algorithms.preferences import PairsConfig, draws, measured_pairs, ranking
from purepg.config import Positive, check, check_schedules
from purepg.experience.acting import evaluation_policy
from purepg.language.model import LanguageModel
from purepg.optimize import annealed_learning_rate, gradient_step, init_train_state, step_direction
from purepg.types import Algorithm, Env, State, UpdateSteps, UsageError


@dataclass(frozen=True, kw_only=True)
class DPOConfig(HeldOutConfig, PairsConfig):
    """Hyperparameters of DPO.

    Attributes:
      beta: strength of the implicit KL penalty towards pi_ref.
    """

    learning_rate: Positive = 5e-4
    beta: Positive = 0.1


def dpo(env: Env, network: LanguageModel, config: DPOConfig) -> Algorithm:
    """DPO on a token task. An environment step is a column of a response in a pair.

    Learning samples nothing, so there are no `EpisodeMetrics`. `held_out_return` is the share of held-out prompts that
    a sampled response answers correctly after the update. Where pairs are rows of a file, `eval/loss` and
    `eval/ranked_right` are the loss of held-out pairs and the share that the policy ranks correctly, in place of that.
    Raises UsageError for a single candidate, which cannot make a pair, and for a network that is no language model.
    """
    c = check(config)
    check_schedules(c)
    if not isinstance(network, LanguageModel):
        raise UsageError(f"{env.name} has no responses: DPO needs a token task, such as --env addition")
    prompt_length, rows = network.task.prompt_length, network.task.rows
    pairs, apart = draws(env, network, c), env.held_out or env
    held_out = source(apart, network)
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def init(key):
        k_params, k_pairs = jax.random.split(key)
        params = source(env, network).init(k_params)
        world = pairs.init(k_pairs, params)
        reference = jax.tree.map(jnp.copy, params)
        return State(GroupLearner(init_train_state(tx, params), reference, jnp.float32(c.beta)), world)

    def log_prob(params, token):
        """log pi(y | x), `[B]`."""
        action = token[:, prompt_length:]
        return jnp.sum(network.score(params, token)[0].log_prob(action), axis=-1, where=action >= 0)

    def log_odds(params, chosen, rejected):
        """log pi(y_w | x) - log pi(y_l | x), `[B]`."""
        return log_prob(params, chosen) - log_prob(params, rejected)

    def loss(params, batch):
        chosen, rejected, weight, reference_odds = batch
        margin = c.beta * (log_odds(params, chosen, rejected) - reference_odds)
        policy_loss, ranked_right = ranking(margin, weight)
        return policy_loss, {"policy_loss": policy_loss, "ranked_right": ranked_right}

    def step(key, state, update):
        k_batch, k_held_out = jax.random.split(key)
        train_state, reference, _ = state.learner
        chosen, rejected, weight = pairs.batch(k_batch, state.world, update)
        batch = (chosen, rejected, weight, log_odds(reference, chosen, rejected))
        learning_rate = annealed_learning_rate(c, update)
        train_state, metrics = gradient_step(loss, tx, learning_rate, train_state, batch)
        action = jnp.concatenate([chosen, rejected])[:, prompt_length:]
        metrics["env_steps"] = jnp.int32(action.size)
        metrics["response_length"] = jnp.sum(action >= 0) / action.shape[0]
        if c.num_held_out and rows is None:
            metrics["held_out_return"] = mean_return(k_held_out, held_out, train_state.params, c.num_held_out)
        return State(state.learner._replace(train_state=train_state), state.world), metrics

    def measure(state):
        train_state, reference, _ = state.learner

        def margin(chosen, rejected):
            return c.beta * (log_odds(train_state.params, chosen, rejected) - log_odds(reference, chosen, rejected))

        return measured_pairs(margin, apart.task.rows, None, c.batch_size)

    env_steps = 2 * c.batch_size * network.task.response_length
    steps = UpdateSteps(env_steps, env_steps)
    return Algorithm(init, step, evaluation_policy(network), steps, measure=measure if rows is not None else None)
