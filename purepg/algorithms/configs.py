"""Hyperparameters that several algorithms share. An algorithm's config inherits those that it uses, adds its own, and
repeats a field where its default differs. All fields are keyword-only.
"""

from dataclasses import dataclass
from typing import Literal

from purepg.config import Count, CountOrZero, NonNegative, Positive, UnitInterval


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """The optimiser.

    Attributes:
      adam_eps: Adam's epsilon.
      max_grad_norm: upper bound on the global norm of each gradient; None disables clipping.
    """

    adam_eps: Positive = 1e-5
    max_grad_norm: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(AdamConfig):
    """An optimiser to choose.

    Attributes:
      optimizer: adam, or sgd (the plain gradient).
    """

    optimizer: Literal["adam", "sgd"] = "adam"


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig(OptimizerConfig):
    """An optimiser with one learning rate.

    Attributes:
      learning_rate: step size of the optimiser.
    """

    learning_rate: Positive = 1e-3


@dataclass(frozen=True, kw_only=True)
class PolicyAndCriticRateConfig(OptimizerConfig):
    """An optimiser for the policy and one for the critics, each with its own learning rate.

    Attributes:
      policy_learning_rate: step size of the policy's optimiser.
      critic_learning_rate: step size of the critics' optimiser.
    """

    adam_eps: Positive = 1e-8
    policy_learning_rate: Positive = 1e-3
    critic_learning_rate: Positive = 1e-3


@dataclass(frozen=True, kw_only=True)
class AnnealConfig:
    """Linear schedules.

    Attributes:
      anneal_learning_rate: decrease every learning rate linearly to 0 over `anneal_updates` updates.
      anneal_updates: length of the schedules in updates. None uses the length of the run, which is known where all
        updates take as many environment steps.
    """

    anneal_learning_rate: bool = False
    anneal_updates: Count | None = None


@dataclass(frozen=True, kw_only=True)
class ExperienceConfig:
    """How environments are stepped, and how their rewards and observations are read.

    Attributes:
      num_envs: parallel environments, N.
      num_steps: steps that each environment takes in one update, T.
      gamma: discount per environment step.
      normalize_obs: standardise observations by their running mean and variance.
      reward_scale: multiply rewards by this constant before anything is learned from them; reported returns stay as
        they are. It is applied after `scale_reward`, where that is on. None: 1.
      bootstrap_at_truncation: bootstrap from the value of the final observation where a time limit ends an episode.
        False treats truncation as termination, a common bug.
    """

    num_envs: Count = 8
    num_steps: Count = 32
    gamma: UnitInterval = 0.99
    normalize_obs: bool = False
    reward_scale: Positive | None = None
    bootstrap_at_truncation: bool = True


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(ExperienceConfig):
    """On-policy rollouts of fixed length.

    Attributes:
      scale_reward: divide rewards by the standard deviation of the running discounted return.
    """

    scale_reward: bool = False


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms of an actor-critic's loss.

    Attributes:
      value_coef: weight of the critic's loss, if there is a critic.
      entropy_coef: weight of the entropy bonus.
    """

    value_coef: NonNegative = 0.5
    entropy_coef: NonNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class ActorCriticConfig(LossConfig, AnnealConfig, LearningRateConfig, RolloutConfig):
    """Actor-critic methods with one optimiser and generalised advantage estimation.

    Attributes:
      gae_lambda: lambda of generalised advantage estimation; 1 gives the discounted return over the rest of the rollout
        minus the value.
    """

    max_grad_norm: Positive | None = 0.5
    gae_lambda: UnitInterval = 0.95


@dataclass(frozen=True, kw_only=True)
class ProximalConfig(ActorCriticConfig):
    """Proximal policy optimisation: several passes over a rollout, in minibatches.

    Attributes:
      num_epochs: passes over the N * T steps.
      num_minibatches: gradient steps in one pass.
      window: successive steps of one environment that stay together in a minibatch, L; it divides T. None: 1, so that
        steps are shuffled singly; with memory, which learns along a window, all T.
      normalize_advantage: standardise the advantages of each minibatch, of the whole batch, or not at all.
    """

    num_steps: Count = 128
    learning_rate: Positive = 3e-4
    num_epochs: Count = 4
    num_minibatches: Count = 4
    window: Count | None = None
    normalize_advantage: Literal["minibatch", "batch", "off"] = "minibatch"


@dataclass(frozen=True, kw_only=True)
class TrustRegionConfig(AdamConfig, RolloutConfig):
    """Natural gradients of the policy, and a critic that is fitted separately.

    Attributes:
      damping: added to the diagonal of the Fisher matrix.
      num_cg_steps: conjugate gradient steps.
      num_value_epochs: passes over the N * T steps to fit the critic.
      num_value_minibatches: gradient steps of the critic in one pass.
      window: successive steps of one environment that stay together in a minibatch of the critic, L; it divides T.
        None: 1, so that steps are shuffled singly; with memory, all T.
      value_learning_rate: step size of the critic's Adam.
      gae_lambda: lambda of generalised advantage estimation.
      normalize_advantage: standardise the advantages over the batch.
    """

    num_steps: Count = 128
    damping: NonNegative = 0.1
    num_cg_steps: Count = 10
    num_value_epochs: Count = 10
    num_value_minibatches: Count = 8
    window: Count | None = None
    value_learning_rate: Positive = 1e-3
    gae_lambda: UnitInterval = 0.95
    normalize_advantage: bool = True


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(PolicyAndCriticRateConfig, ExperienceConfig):
    """Off-policy learning from a replay buffer.

    Attributes:
      num_gradient_steps: gradient steps after each step of the environments; divided by `num_envs` it is the
        updates-to-data ratio.
      batch_size: transitions in the minibatch of a gradient step, B.
      window: successive steps of one environment that are drawn together, L, of which a minibatch has B / L. None: 1;
        with memory, which learns along a window, 32.
      burn_in: steps before each window through which memory passes without a gradient, from what was stored with the
        first of them, so that the window begins with the memory of the current parameters (Kapturowski et al. 2019).
        A stack of k observations has it exactly from k - 1 steps on.
      capacity: transitions that the replay buffer holds, with memory each beside the memory before it.
      warmup_steps: transitions collected with random actions before learning begins.
      tau: step size of the target networks (Polyak averaging).
    """

    num_envs: Count = 1
    num_steps: Count = 50
    num_gradient_steps: Count = 1
    batch_size: Count = 256
    window: Count | None = None
    burn_in: CountOrZero = 0
    capacity: Count = 100_000
    warmup_steps: Count = 1000
    tau: UnitInterval = 0.005


@dataclass(frozen=True, kw_only=True)
class ExplorationConfig:
    """Gaussian noise on the actions of a deterministic policy.

    Attributes:
      exploration_std: standard deviation of the noise, in canonical [-1, 1] where actions are bounded.
      noise_correlation: correlation of successive noises in an episode; 0 is white noise, values near 1 approach an
        Ornstein-Uhlenbeck process.
    """

    exploration_std: NonNegative = 0.1
    noise_correlation: UnitInterval = 0.0


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """Temperature of the maximum-entropy objective.

    Attributes:
      temperature: weight of the entropy, alpha; its initial value where it is learned.
      learn_temperature: adapt the temperature so that the policy's entropy approaches the target.
      temperature_learning_rate: step size for the logarithm of the temperature.
    """

    temperature: Positive = 1.0
    learn_temperature: bool = True
    temperature_learning_rate: Positive = 1e-3


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Groups of episodes from one start each: G responses to a prompt, or G episodes from one initial state.

    Attributes:
      num_prompts: prompts, or initial states, in one update, P.
      group_size: episodes from each, G.
      num_minibatches: gradient steps in one pass over the P * G episodes.
      baseline: what is subtracted from an episode's return: nothing; the mean of the batch; the mean of its group; the
        mean of the others in its group; or a learned value of every prefix, in which case the advantage is GAE's
        (language models only).
      divide_by_std: divide the advantage by the standard deviation of the group's returns.
      gae_lambda: lambda of GAE, for the learned value; there is no discount.
      skip_groups_without_signal: leave out groups whose returns are all equal; means are over the remaining ones.
      max_rounds: with `skip_groups_without_signal`, sample others in their place, `num_prompts` groups a round, until
        `num_prompts` groups have a signal, or for at most so many rounds (DAPO's dynamic sampling, Yu et al. 2025).
      kl_coef: weight of the KL divergence from the reference policy, which is the initial policy; 0 still measures it.
      kl_target: adapt `kl_coef`, by at most 2 % an update, so that the KL divergence of a whole response approaches
        this (Ziegler et al. 2019, sec. 2.2); None keeps it fixed.
    """

    num_prompts: Count = 32
    group_size: Count = 8
    num_minibatches: Count = 1
    baseline: Literal["none", "batch_mean", "group_mean", "leave_one_out", "value"] = "group_mean"
    divide_by_std: bool = True
    gae_lambda: UnitInterval = 1.0
    skip_groups_without_signal: bool = False
    max_rounds: Count = 1
    kl_coef: NonNegative = 0.04
    kl_target: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Evaluation while training.

    Attributes:
      num_held_out: held-out prompts that are answered after every update, for monitoring; 0 disables this.
    """

    num_held_out: CountOrZero = 64
