"""Direct preference optimisation (Rafailov et al. 2023, eq. 7), an offline method. Per gradient step, over pairs of
responses that the initial policy pi_ref gave, of which y_w earned more than y_l:

    theta <- theta + lr * E[ grad log sigmoid(beta * log pi/pi_ref (y_w | x) - beta * log pi/pi_ref (y_l | x)) ]

No response is sampled from pi.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from purepg.algorithms.configs import HeldOutConfig, LearningRateConfig
from purepg.algorithms.groups import GroupLearner, mean_return, source
from purepg.algorithms.preferences import draw_pairs, ranking, sample_preferences
from purepg.config import Count, Positive, check
from purepg.experience.acting import evaluation_policy
from purepg.language.model import LanguageModel
from purepg.optimize import gradient_step, init_train_state, step_direction
from purepg.types import Algorithm, Env, State, UpdateSteps, UsageError


@dataclass(frozen=True, kw_only=True)
class DPOConfig(HeldOutConfig, LearningRateConfig):
    """Hyperparameters of DPO.

    Attributes:
      num_pairs: prompts in the data set, which is sampled once; one whose responses all earned the same gives no pair.
      num_candidates: responses to each prompt, of which the best and the worst make the pair.
      batch_size: pairs in the minibatch of a gradient step.
      beta: strength of the implicit KL penalty towards pi_ref.
    """

    learning_rate: Positive = 5e-4
    adam_eps: Positive = 1e-8
    max_grad_norm: Positive | None = 1.0
    num_pairs: Count = 2048
    num_candidates: Count = 4
    batch_size: Count = 128
    beta: Positive = 0.1


def dpo(env: Env, network: LanguageModel, config: DPOConfig) -> Algorithm:
    """DPO on a token task. An environment step is a column of a response in a pair.

    Learning samples nothing, so there are no `EpisodeMetrics`. `held_out_return` is the share of held-out prompts that
    a sampled response answers correctly after the update. Raises UsageError for a single candidate, which cannot make a
    pair, and for a network that is no language model.
    """
    c = check(config)
    if not isinstance(network, LanguageModel):
        raise UsageError(f"{env.name} has no responses: DPO needs a token task, such as --env addition")
    if c.num_candidates < 2:
        raise UsageError(f"num_candidates ({c.num_candidates}) must be at least 2, to make a pair")
    prompt_length = network.task.prompt_length
    held_out = source(env.held_out or env, network)
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def init(key):
        k_params, k_pairs = jax.random.split(key)
        params = source(env, network).init(k_params)
        pairs = sample_preferences(k_pairs, env, network, params, c.num_pairs, c.num_candidates)
        reference = jax.tree.map(jnp.copy, params)
        return State(GroupLearner(init_train_state(tx, params), reference, jnp.float32(c.beta)), pairs)

    def log_prob(params, token):
        """log pi(y | x), `[B]`."""
        action = token[:, prompt_length:]
        return jnp.sum(network.score(params, token)[0].log_prob(action), axis=-1, where=action >= 0)

    def loss(params, batch):
        chosen, rejected, weight, reference_margin = batch
        margin = c.beta * (log_prob(params, chosen) - log_prob(params, rejected) - reference_margin)
        policy_loss, ranked_right = ranking(margin, weight)
        return policy_loss, {"policy_loss": policy_loss, "ranked_right": ranked_right}

    def step(key, state, update):
        del update
        k_batch, k_held_out = jax.random.split(key)
        train_state, reference, _ = state.learner
        chosen, rejected, weight = draw_pairs(k_batch, state.world, c.batch_size)
        reference_margin = log_prob(reference, chosen) - log_prob(reference, rejected)
        batch = (chosen, rejected, weight, reference_margin)
        train_state, metrics = gradient_step(loss, tx, c.learning_rate, train_state, batch)
        action = jnp.concatenate([chosen, rejected])[:, prompt_length:]
        metrics["env_steps"] = jnp.int32(action.size)
        metrics["response_length"] = jnp.sum(action >= 0) / action.shape[0]
        if c.num_held_out:
            metrics["held_out_return"] = mean_return(k_held_out, held_out, train_state.params, c.num_held_out)
        return State(state.learner._replace(train_state=train_state), state.world), metrics

    env_steps = 2 * c.batch_size * network.task.response_length
    return Algorithm(init, step, evaluation_policy(network), UpdateSteps(env_steps, env_steps))
