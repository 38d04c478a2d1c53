"""Values as text: those of flags, of --sweep and of a file for --config."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, get_origin

from purepg.config import alternatives, hints, refuse
from purepg.run.search import Sweep, Uniform, Values
from purepg.run.sweep import Configs, find_field
from purepg.types import UsageError


def parse_sweep(configs: Configs, sweep: Sequence[str]) -> dict[str, Values]:
    """Parses `["learning_rate=log:1e-4..1e-2", "hidden=64x64,256x256"]` into ranges and lists of typed values, by name.

    Raises:
      UsageError: a name is unknown, empty or given twice, or its values are missing, of the wrong type or given twice.
    """
    parsed: dict[str, Values] = {}
    for text in sweep:
        name, equals, values = (part.strip() for part in text.partition("="))
        name = name.replace("-", "_")
        if not name or not equals or not values:
            raise UsageError(f"--sweep {text!r} must be a name and its values, as in learning_rate=3e-4,1e-3")
        config, field_name = find_field(configs, name)
        if any(find_field(configs, other) == (config, field_name) for other in parsed):
            raise UsageError(f"--sweep names {name} twice: put all its values into one")
        hint = hints(type(configs[config]))[field_name]
        parsed[name] = _values(f"--sweep {name}", hint, values)
    return parsed


def _values(name: str, hint: Any, text: str) -> Values:
    """A field's values: those between commas, or for numbers a range such as 0.9..0.999 or log:1e-4..1e-2."""
    is_range = ".." in text or text.startswith("log:")
    if not is_range or not {int, float} & dict(alternatives(hint)).keys():
        values = [parse_value(name, hint, value.strip()) for value in text.split(",")]
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            widths = "; two layers of 64 are 64x64" if isinstance(twice[0], tuple) else ""
            raise UsageError(f"{name} ({text!r}) has {_text(twice[0])} twice{widths}")
        return values
    low, _, high = text.removeprefix("log:").partition("..")
    if not low.strip() or not high.strip():
        raise UsageError(f"{name} ({text!r}) must be LOW..HIGH or log:LOW..HIGH, as in log:1e-4..1e-2")
    return Uniform(*(parse_value(name, hint, end.strip()) for end in (low, high)), log=text.startswith("log:"))


def parse_value(name: str, hint: Any, text: str) -> Any:
    """Parses text into a value of a field's type: a number, true, false, none, a choice, or widths such as 64x64.

    Raises:
      UsageError: the text is not a value of that type. The message calls the field `name`.
    """
    import tyro

    kinds = dict(alternatives(hint))
    widths = any(get_origin(kind) is tuple for kind in kinds)
    words = {"none": "None", "true": "True", "false": "False"}
    entries = text.split("x") if widths else [words.get(text.lower(), text) if str not in kinds else text]
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(tyro.conf.Positional[hint], args=entries, console_outputs=False)
    if widths:
        raise UsageError(f"{name} ({text!r}) must be widths such as 64x64")
    if int in kinds and (whole := _whole_number(text)) is not None:
        raise UsageError(f"{name} ({text!r}) must be an integer: did you mean {whole}?")
    return refuse(name, text, hint)


def _whole_number(text: str) -> int | None:
    """Reads 1e6 as 1000000; None if the text is not a whole number."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def sweep_texts(sweep: Sweep) -> list[str]:
    """A sweep as `parse_sweep` reads it."""
    return [
        f"{name}={values if isinstance(values, Uniform) else ','.join(map(_text, values))}"
        for name, values in sweep.items()
    ]


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
