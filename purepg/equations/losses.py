"""Per-element losses to minimise. The caller reduces with `.mean()`, or `.mean(where=mask)` over masked steps.

`stop_gradient` stands where the equation has a constant, so that the gradient is the textbook estimator for any inputs.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from purepg.config import Number, check_choice
from purepg.equations.distributions import expectation
from purepg.types import Array

Aggregation = Literal["sequence_mean", "token_mean", "constant_length", "sequence_sum"]


def policy_gradient(log_prob: Array, weight: Array) -> Array:
    """-log pi(a|s) * weight, whose gradient is minus the score-function estimate (Williams 1992). `log_prob` `[...]` is
    under the policy being trained; `weight` `[...]`, a return or an advantage, is a constant."""
    chex.assert_equal_shape([log_prob, weight])
    return -log_prob * stop_gradient(weight)


def surrogate(log_prob: Array, old_log_prob: Array, weight: Array) -> Array:
    """-ratio * weight, ratio = pi(a|s) / pi_old(a|s), for actions of an older policy (Schulman et al. 2015, eq. 14).

    Its gradient is -ratio * weight * grad log pi; where the policies agree, it equals that of `policy_gradient`.
    """
    chex.assert_equal_shape([log_prob, old_log_prob, weight])
    return -jnp.exp(log_prob - stop_gradient(old_log_prob)) * stop_gradient(weight)


def clipped_surrogate(log_prob: Array, old_log_prob: Array, advantage: Array, clip_eps: Number) -> Array:
    """PPO's pessimistic surrogate (Schulman et al. 2017, eq. 7), negated.

        ratio = pi(a|s) / pi_old(a|s)
        -min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)

    The gradient is -ratio * A * grad log pi if (A >= 0 and ratio <= 1 + eps) or (A < 0 and ratio >= 1 - eps), else 0.
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage])
    return two_sided_surrogate(log_prob - stop_gradient(old_log_prob), advantage, clip_eps, clip_eps)


def deterministic_policy_gradient(q: Array) -> Array:
    """-Q(s, mu(s)), whose gradient is -grad mu(s) grad_a Q(s, a) at a = mu(s) (Silver et al. 2014, eq. 9). `q` `[...]`
    is Q of the policy's own actions and differentiable in them; the critic's parameters are constants."""
    return -q


def soft_policy_gradient(log_prob: Array, q: Array, temperature: Number) -> Array:
    """temperature * log pi(a|s) - Q(s, a) for a reparameterised sample a (Haarnoja et al. 2018b, eq. 7). `log_prob` and
    `q` are `[...]`, differentiable with respect to the policy's parameters through a."""
    chex.assert_equal_shape([log_prob, q])
    return stop_gradient(temperature) * log_prob - q


def expected_soft_policy_gradient(log_prob: Array, q: Array, temperature: Number) -> Array:
    """sum_a pi(a|s) (temperature * log pi(a|s) - Q(s, a)), `[...]`, exact over discrete actions (Christodoulou 2019,
    eq. 12). `log_prob` and `q` are `[..., A]`, and `q` is a constant; a masked action's -inf adds nothing."""
    chex.assert_equal_shape([log_prob, q])
    return expectation(log_prob, stop_gradient(temperature) * log_prob - stop_gradient(q))


def preference(margin: Array) -> Array:
    """-log sigmoid(margin), minus the log-probability that the chosen of two responses is preferred (Bradley & Terry
    1952); `margin` is how much higher its score is.

    With the difference of a learned reward, it fits the reward (Christiano et al. 2017). With beta * (log pi/pi_ref of
    the chosen - log pi/pi_ref of the rejected), it is DPO (Rafailov et al. 2023, eq. 7).
    """
    return jax.nn.softplus(-margin)


def squared_error(value: Array, target: Array) -> Array:
    """(V(s) - target)^2 / 2; the target is a constant."""
    chex.assert_equal_shape([value, target])
    return 0.5 * jnp.square(value - stop_gradient(target))


def clipped_squared_error(value: Array, old_value: Array, target: Array, clip_eps: Number) -> Array:
    """PPO's value clip (OpenAI baselines): the larger of the squared errors of V and of V clipped to old V +- eps.

    `clip_eps` is in units of the return and depends on its scale. Andrychowicz et al. (2021) advise against it.
    """
    chex.assert_equal_shape([value, old_value, target])
    clipped = stop_gradient(old_value) + jnp.clip(value - stop_gradient(old_value), -clip_eps, clip_eps)
    return jnp.maximum(squared_error(value, target), squared_error(clipped, target))


def importance_weighted(
    log_prob: Array, log_ratio: Array, advantage: Array, clip_low: Number, clip_high: Number
) -> Array:
    """-sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * log pi(a|s), CISPO's loss (MiniMax 2025, eq. 4). The clipped
    ratio is a constant weight, so every token has a gradient. `log_ratio` is log pi / pi_old of the token or sequence.
    """
    chex.assert_equal_shape([log_prob, log_ratio, advantage])
    ratio = jnp.clip(jnp.exp(log_ratio), 1 - clip_low, 1 + clip_high)
    return -stop_gradient(ratio * advantage) * log_prob


def two_sided_surrogate(
    log_ratio: Array, advantage: Array, clip_low: Number, clip_high: Number, max_ratio: Number | None = None
) -> Array:
    """`clipped_surrogate` of log_ratio = log pi / pi_old, with separate bounds below and above (DAPO, Yu et al. 2025,
    eq. 10) and, unless `max_ratio` is None, an upper bound on the ratio where A < 0 (dual clip, Ye et al. 2020, eq. 5):

        -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A),    and where A < 0 at most -max_ratio * A

    `max_ratio` must be above 1 + clip_high.
    """
    chex.assert_equal_shape([log_ratio, advantage])
    # Where an upper bound holds, an overflowing ratio would make the gradient 0 * inf = NaN instead of 0.
    largest = 0.5 * jnp.log(jnp.finfo(log_ratio.dtype).max)
    bounded = (advantage >= 0) | (max_ratio is not None)
    ratio = jnp.exp(jnp.where(bounded, jnp.minimum(log_ratio, largest), log_ratio))
    advantage = stop_gradient(advantage)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantage)
    if max_ratio is not None:
        gain = jnp.where(advantage < 0, jnp.maximum(gain, max_ratio * advantage), gain)
    return -gain


def aggregate(x: Array, mask: Array, how: Aggregation) -> Array:
    """Reduces a number per token, `[B, R]`, to a scalar; `how` sets the weight of each response and token.

        sequence_mean     mean_i 1/|y_i| sum_t x_it     GRPO (Shao et al. 2024): tokens of short responses weigh more
        token_mean        sum_it x_it / sum_i |y_i|     DAPO (Yu et al. 2025): long responses weigh more
        constant_length   mean_i 1/R sum_t x_it         Dr. GRPO (Liu et al. 2025): neither
        sequence_sum      mean_i sum_t x_it             the gradient of the expected return itself

    Responses without a token in the mask are excluded, from the means too. Raises UsageError if `how` is unknown.
    """
    check_choice("how", how, Aggregation)
    chex.assert_equal_shape([x, mask])
    num_tokens = jnp.sum(mask, axis=-1)
    num_sequences = jnp.maximum(jnp.sum(num_tokens > 0), 1)
    total = jnp.sum(x, axis=-1, where=mask)
    match how:
        case "sequence_mean":
            return jnp.sum(total / jnp.maximum(num_tokens, 1)) / num_sequences
        case "token_mean":
            return jnp.sum(total) / jnp.maximum(jnp.sum(num_tokens), 1)
        case "constant_length":
            return jnp.sum(total) / (num_sequences * x.shape[-1])
    return jnp.sum(total) / num_sequences
