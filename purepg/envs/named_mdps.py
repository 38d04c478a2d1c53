"""Example MDPs. Each is a function with a few arguments; `purepg.envs.make` knows them by name."""

import numpy as np

from purepg.envs.finite_mdp import FiniteMDP
from purepg.types import UsageError


def bandit(reward: tuple[float, ...] = (1.0, 0.0), horizon: int = 1) -> FiniteMDP:
    """One state with one arm per reward, played `horizon` times without discount."""
    A = len(reward)
    return FiniteMDP(
        np.ones((1, A, 1)), np.array([reward]), np.ones(1), 1.0, horizon=horizon, horizon_terminates=True, name="bandit"
    )


def contextual_bandit(seed: int = 0, num_contexts: int = 4, num_arms: int = 3) -> FiniteMDP:
    """One pull per episode in a context drawn uniformly; each pair's reward is a fixed standard normal number."""
    reward = np.random.default_rng(seed).normal(size=(num_contexts, num_arms))
    return FiniteMDP(
        np.full((num_contexts, num_arms, num_contexts), 1 / num_contexts),
        reward,
        np.full(num_contexts, 1 / num_contexts),
        1.0,
        horizon=1,
        horizon_terminates=True,
        name="contextual bandit",
    )


def chain(num_states: int = 5, slip: float = 0.2, gamma: float = 0.95, horizon: int = 100) -> FiniteMDP:
    """The chain of Strens (2000). Action 0 moves on and earns 10 at the end, where it stays; action 1 returns to the
    start and earns 2. With probability `slip` the other action and its reward happen. `horizon` is a time limit."""
    S = num_states
    walk, back = np.zeros((S, S)), np.zeros((S, S))
    walk[np.arange(S), np.minimum(np.arange(S) + 1, S - 1)] = 1
    back[:, 0] = 1
    walk_reward, back_reward = np.where(np.arange(S) == S - 1, 10.0, 0.0), np.full(S, 2.0)
    mix = np.array([[1 - slip, slip], [slip, 1 - slip]])
    return FiniteMDP(
        np.einsum("ak,kst->sat", mix, np.stack([walk, back])),
        np.einsum("ak,ks->sa", mix, np.stack([walk_reward, back_reward])),
        np.eye(S)[0],
        gamma,
        horizon=horizon,
        name="chain",
    )


def cliff(width: int = 12, height: int = 4, gamma: float = 0.99, horizon: int = 200) -> FiniteMDP:
    """The cliff gridworld (Sutton & Barto 2018, example 6.6), from the lower left corner to the lower right one. Each
    step costs 1; a step off the cliff between them costs 100 and returns to the start. Actions are up, right, down,
    left; a state is row * width + column, rows counted from the top. The horizon is a time limit."""
    S = width * height
    start, goal = S - width, S - 1
    row, column = np.divmod(np.arange(S), width)
    transition, reward = np.zeros((S, 4, S)), np.full((S, 4), -1.0)
    for a, (down, right) in enumerate([(-1, 0), (0, 1), (1, 0), (0, -1)]):
        to = np.clip(row + down, 0, height - 1) * width + np.clip(column + right, 0, width - 1)
        falls = (start < to) & (to < goal)
        reward[falls, a] = -100.0
        transition[np.arange(S), a, np.where(falls, start, to)] = 1
    name = "cliff" if (width, height) == (12, 4) else f"cliff, {width} x {height}"
    return FiniteMDP(
        transition, reward, np.eye(S)[start], gamma, terminal=np.arange(S) == goal, horizon=horizon, name=name
    )


def aliased() -> FiniteMDP:
    """Five states that a policy cannot tell apart, on which the usual update without gamma^t converges to the worst
    policy (in the spirit of Nota & Thomas 2020).

    Action 0 earns 1 in state 0. In state 1 it leads to a reward of 8 three steps later, which gamma = 0.5 discounts to
    1, while action 1 stops with 2.5. So action 0 is right in state 0 and wrong in state 1, which counts half.
    """
    S = 6
    transition, reward = np.zeros((S, 2, S)), np.zeros((S, 2))
    transition[np.arange(5), :, np.arange(1, 6)] = 1
    transition[1, 1] = np.eye(S)[5]
    reward[0, 0], reward[1, 1], reward[4] = 1.0, 2.5, 8.0
    terminal, alias = np.arange(S) == 5, np.zeros(S, int)
    return FiniteMDP(transition, reward, np.eye(S)[0], 0.5, terminal, alias=alias, name="aliased")


def garnet(
    seed: int = 0,
    num_states: int = 6,
    num_actions: int = 3,
    branching: int = 3,
    gamma: float = 0.9,
    horizon: int | None = None,
    horizon_terminates: bool = False,
) -> FiniteMDP:
    """A random process (Archibald et al. 1995, drawn as by Bhatnagar et al. 2009): each (s, a) leads to `branching`
    states, with probabilities from uniform cuts of [0, 1], and a fixed standard normal reward. The start is uniform.
    Raises UsageError if `branching` is not in 1, ..., num_states."""
    if not 1 <= branching <= num_states:
        raise UsageError(f"branching ({branching}) must be in 1, ..., num_states ({num_states})")
    rng = np.random.default_rng(seed)
    S, A = num_states, num_actions
    transition = np.zeros((S, A, S))
    for s in range(S):
        for a in range(A):
            cuts = np.sort(rng.uniform(size=branching - 1))
            transition[s, a, rng.choice(S, branching, replace=False)] = np.diff(cuts, prepend=0.0, append=1.0)
    return FiniteMDP(
        transition,
        rng.normal(size=(S, A)),
        np.full(S, 1 / S),
        gamma,
        horizon=horizon,
        horizon_terminates=horizon_terminates,
        name=f"garnet {seed}",
    )


MDPS = {
    "two_armed_bandit": bandit,
    "contextual_bandit": contextual_bandit,
    "chain": chain,
    "cliff": cliff,
    "aliased": aliased,
    "garnet": garnet,
}
