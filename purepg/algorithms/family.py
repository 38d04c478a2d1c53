"""Published methods that differ from GRPO only by choices in its config; one config for each."""

from purepg.algorithms.grpo import GRPOConfig

FAMILY: dict[str, GRPOConfig] = {
    # Williams 1992, with the batch mean as the baseline
    "reinforce": GRPOConfig(baseline="batch_mean", divide_by_std=False, aggregation="sequence_sum", kl_coef=0.0),
    # Ahmadian et al. 2024: leave-one-out, the KL in the reward, one gradient step
    "rloo": GRPOConfig(
        baseline="leave_one_out", divide_by_std=False, aggregation="sequence_sum", kl_estimator="k1", kl_in="reward"
    ),
    # Ouyang et al. 2022: a critic that values every prefix, the KL in the reward, epochs of minibatches
    "ppo": GRPOConfig(
        baseline="value",
        gae_lambda=0.95,
        num_minibatches=2,
        kl_estimator="k1",
        kl_in="reward",
        aggregation="token_mean",
    ),
    # Shao et al. 2024: KL coefficient .04 with the k3 estimator, advantages divided by the standard deviation
    "grpo": GRPOConfig(),
    # Liu et al. 2025: no division by the standard deviation, losses divided by a constant length, no KL
    "dr_grpo": GRPOConfig(divide_by_std=False, aggregation="constant_length", kl_coef=0.0),
    # Yu et al. 2025: clip-higher .28, mean over tokens, no KL, other groups in place of those without signal
    "dapo": GRPOConfig(
        num_minibatches=2,
        clip_eps_high=0.28,
        aggregation="token_mean",
        skip_groups_without_signal=True,
        max_rounds=10,
        kl_coef=0.0,
    ),
    # Zheng et al. 2025: one ratio for a whole response, clipped at 3e-4 and 4e-4, no KL
    "gspo": GRPOConfig(num_minibatches=2, ratio="sequence", clip_eps=3e-4, clip_eps_high=4e-4, kl_coef=0.0),
    # MiniMax 2025: the ratio is a constant weight that is clipped only from above, mean over tokens, no KL
    "cispo": GRPOConfig(
        num_minibatches=2, surrogate="weighted", clip_eps=1.0, clip_eps_high=0.28, aggregation="token_mean", kl_coef=0.0
    ),
}
