"""The command line that writes the best agent of a run, or a checkpoint, as a folder in Hugging Face's layout."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from purepg.config import Count, check
from purepg.language.export import save_pretrained
from purepg.language.gguf import is_gguf
from purepg.language.tokenizer import load_tokenizer
from purepg.run.cli import leave, parse_flags
from purepg.run.evaluation import run_first
from purepg.run.start import read_start
from purepg.run.text.environment import tokenizer_beside
from purepg.types import UsageError


@dataclass(frozen=True)
class Choice:
    """What is written, and where.

    Attributes:
      run: the folder of a run, whose best agent is written, or a checkpoint. The flag itself may be left out.
      out: the new folder.
      tokenizer: the checkpoint whose tokenizer is written. None: that from which the run started, if it has one.
      dtype: of the parameters in the file; bfloat16 rounds.
      context: longest text, in tokens, that other programs shall accept.
    """

    run: Path
    out: Path
    tokenizer: Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    context: Count = 8192


def main(description: str | None = None) -> None:
    """Writes the folder, says so, and exits with 2 if an argument is bad."""
    try:
        print(export(check(parse_flags(Choice, run_first(sys.argv[1:]), description))))
    except UsageError as error:
        leave(Path(sys.argv[0]).stem, error, 2)


def export(choice: Choice) -> str:
    """Writes the folder, and returns a line that says what it holds."""
    config, num_tokens, params = read_start(choice.run.absolute())
    source = choice.tokenizer or _origin(choice.run)
    tokenizer = None if source is None else load_tokenizer(source)
    save_pretrained(choice.out, config, params, tokenizer, choice.dtype, choice.context)
    text = f"with the tokenizer of {source}" if source else "without a tokenizer"
    text += ", without its value head" if config.value_head else ""
    return f"{choice.out}: {choice.dtype} parameters of a model of {num_tokens:,} tokens, {text}"


def _origin(run: Path) -> Path | None:
    """The checkpoint whose tokenizer a run used, or which is given itself; None where there is no tokenizer."""
    start = tokenizer_beside(str(run))
    found = None if start is None else Path(start)
    return found if found is not None and (is_gguf(found) or (found / "tokenizer.json").exists()) else None
