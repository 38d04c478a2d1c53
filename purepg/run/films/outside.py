"""Episodes of environments that are not JAX, with their own pictures in place of states."""

from collections.abc import Sequence

import numpy as np

from purepg.envs.outside import HostStep
from purepg.run.evaluation import Choice, on_the_host
from purepg.run.films.episodes import MAX_FRAMES, Episode
from purepg.run.films.picture import fitted
from purepg.run.load import Agent
from purepg.types import Env, Obs


class Filmed:
    """`HostEnvs` of one environment that keeps the pictures of its episodes. After a step that ends one, the picture
    may be that of the next, so that the last of an episode is that before its last step."""

    def __init__(self, env: Env):
        assert env.outside is not None and env.render is not None
        self._render, self._envs = env.render, env.outside(1)
        self.every = 1  # only so many steps' pictures are kept: the smallest power of two for at most MAX_FRAMES
        self.pictures: list[list[np.ndarray]] = []
        self.last: list[np.ndarray] = []
        self.rewards: list[list[float]] = []

    def reset(self, seeds: Sequence[int]) -> Obs:
        obs = self._envs.reset(seeds)
        self.last.append(self._picture())
        self.pictures.append([self.last[-1]])
        self.rewards.append([])
        return obs

    def step(self, action: np.ndarray) -> HostStep:
        step = self._envs.step(action)
        self.rewards[-1].append(float(step.reward[0]))
        if not (step.terminated[0] or step.truncated[0]):
            self.last[-1] = self._picture()
        if len(self.rewards[-1]) % self.every == 0:
            self.pictures[-1].append(self.last[-1])
        if len(self.pictures[-1]) > MAX_FRAMES + 1:
            self.every *= 2
            self.pictures = [pictures[::2] for pictures in self.pictures]
        return step

    def close(self) -> None:
        self._envs.close()

    def _picture(self) -> np.ndarray:
        return np.asarray(fitted(self._render(self._envs)))


def play_outside(agent: Agent, choice: Choice, max_steps: int) -> list[Episode]:
    """Whole episodes, one after another. The states of an `Episode` are pictures, `[F, height, width, 3]`."""
    filmed = Filmed(agent.env)
    shown = agent._replace(env=agent.env._replace(outside=lambda num_envs: filmed))  # asked for one at once
    stats = on_the_host(shown, choice, max_steps, at_once=1)
    episodes = []
    for i, (pictures, rewards) in enumerate(zip(filmed.pictures, filmed.rewards, strict=True)):
        before = pictures[: -(-len(rewards) // filmed.every)]
        flags = bool(stats.terminated[i]), bool(stats.truncated[i])
        episodes.append(Episode(np.stack([*before, filmed.last[i]]), (), np.array(rewards), *flags, filmed.every))
    return episodes
