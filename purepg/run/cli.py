"""The command line that every experiment script shares."""

import contextlib
import gc
import io
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, is_dataclass, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_origin

from purepg.config import alternatives, check_choice, hints
from purepg.networks.presets import Preset, has_presets, with_preset
from purepg.run import console, processes
from purepg.run.arguments import read_arguments
from purepg.run.environment import EnvSource
from purepg.run.experiment import train_population
from purepg.run.folder.files import RecordError, folder_for
from purepg.run.last_words import last_words
from purepg.run.plan import MakeAlgorithm, MakeNetwork, RunConfig
from purepg.run.processes import agreed, by_first, is_first
from purepg.run.search import Values
from purepg.run.sweep import Configs, find_field
from purepg.run.values import parse_sweep, parse_value
from purepg.types import Env, UsageError

PRESET = "network.preset"


def main(
    algorithm: MakeAlgorithm,
    config: Any,
    network: MakeNetwork,
    network_config: Any,
    run: RunConfig | None = None,
    description: str | None = None,
    arguments: Sequence[str] | None = None,
    env: EnvSource | None = None,
) -> None:
    """Runs `train_population` from the command line; exits with 0, 1 (failed write), 2 (bad argument) or 130 (Ctrl-C).

    With --distributed, all processes exit with the same code, and the first alone prints.

    Args:
      algorithm: `algorithm(env, network, config) -> Algorithm`; its name is the prefix of the config's flags.
      config, network_config, run: the experiment's defaults; each field becomes a flag.
      network: `network(env, network_config)`.
      description: the first paragraph of --help.
      arguments: parsed instead of `sys.argv`.
      env: the script's own environment, or a function that makes it; used unless --env names another.
    """
    gc.set_threshold(100_000, 50, 50)  # collecting garbage more often takes a tenth of the time to start
    script = Path(sys.argv[0]).stem
    name = getattr(algorithm, "__name__", "algorithm")
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        default = run or RunConfig()
        if callable(env) and "--distributed" in arguments:  # it may compute, which must come after
            processes.start(parse(name, config, network_config, default, arguments, description)[1])
        if env is not None:
            try:
                own = env if isinstance(env, str | Env) else env()
            except UsageError:
                parse(name, config, network_config, default, arguments, description)  # --help needs no environment
                raise
            default = replace(default, env=own if isinstance(own, str) else own.name)
        configs, run, sweep = parse(name, config, network_config, default, arguments, description)
        env = env if run.env == default.env else None
        processes.start(run)
        with contextlib.ExitStack() as stack:
            out = run.out if run.resume else _folder(lambda: stack.enter_context(folder_for(run.out, script)))
            kept = replace(run, out=out)
            stack.enter_context(last_words(out, partial(resume_command, arguments)))
            results = train_population(
                algorithm, configs[name], network, configs["network"], kept, env=env, sweep=sweep, name=script
            )
    except UsageError as error:
        leave(script, error, 2)
    except RecordError as error:
        leave(script, error, 1)
    except BaseException as error:
        processes.crash(error, script)
        raise
    assert out is not None
    if is_first():
        print(results)
        if results.interrupted:
            print(f"go on with it: {resume_command(arguments, out)}")
    if results.lost:
        leave(script, "; ".join(results.lost), 1)
    if is_first():
        print(f"wrote {out}")
    sys.exit(130 if results.interrupted else 0)


def _folder(make: Callable[[], Path]) -> Path:
    """The folder that the first process makes."""
    return Path(agreed(str(by_first(make))))


def resume_command(arguments: Sequence[str], out: Path) -> str:
    """The command that resumes the run started with these arguments."""
    kept, with_value = [], ("--out", "--process-id")
    names = (*with_value, "--resume", "--no-resume", "--overwrite", "--no-overwrite")
    after_name = False
    for argument in arguments:
        if not after_name and argument.partition("=")[0] not in names:
            kept.append(argument)
        after_name = argument in with_value
    return shlex.join(["python", sys.argv[0], *kept, "--out", str(out), "--resume"])


def leave(script: str, error: object, code: int) -> NoReturn:
    """Prints the reason on one line of stderr and exits."""
    processes.leave(error, script, code)
    if not console.quiet:
        print(f"{script}: error: {error}", file=sys.stderr)
    sys.exit(code)


def parse(
    name: str,
    config: Any,
    network_config: Any,
    run: RunConfig,
    arguments: Sequence[str],
    description: str | None = None,
) -> tuple[Configs, RunConfig, dict[str, Values]]:
    """Parses the command line into (configs, run, sweep). With --config, the file's arguments replace the defaults, and
    other flags replace the file's; a field of --sweep replaces that field of the file's sweep.

    Raises:
      UsageError: a flag or a field of the file is unknown, or a value has the wrong type.
      SystemExit: --help was given.
    """
    import tyro

    sweep_help = (
        "A field and its values; repeat the flag for a grid. Floats share a program, others compile per value. With "
        "--search, also NAME=LOW..HIGH or, on a logarithmic scale, NAME=log:LOW..HIGH."
    )
    sweep_flag = tyro.conf.arg(metavar="NAME=A,B,...", help=sweep_help)
    preset_help = "A published network (purepg/networks/presets.py), which other --network flags change."
    preset_flag = tyro.conf.arg(name=PRESET, help=preset_help)
    presets = [("preset", Annotated[Preset | None, preset_flag], field(default=None))]
    config_help = "A run's folder, or a file like its config.json, in JSON or YAML: its arguments; flags override them."
    config_flag = tyro.conf.arg(name="config", help=config_help)
    swept: Sequence[str] = ()
    if path := _last_value(arguments, "--config"):
        of_file, run, swept = read_arguments(path, {name: config, "network": network_config}, run)
        config, network_config = of_file[name], of_file["network"]
    network_config = _with_preset(network_config, arguments)
    commands = make_dataclass(
        "Commands",
        [
            ("run", Annotated[type(run), tyro.conf.arg(name="")], field(default=run)),
            ("config_file", Annotated[Path | None, config_flag], field(default=None)),
            ("sweep", Annotated[tuple[str, ...], tyro.conf.UseAppendAction, sweep_flag], field(default=())),
            (name, type(config), field(default=config)),
            *(presets if has_presets(network_config) else []),
            ("network", type(network_config), field(default=network_config)),
        ],
        frozen=True,
    )
    given = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    several = ("--env-params", "KEY=VALUE"), ("--schedule", "NAME=STEP:VALUE,..."), ("--reward", "FILE.py:FUNCTION")
    for flag, entry in several:
        if given.count(flag) > 1:  # the last would silently replace the others
            raise UsageError(f"{flag} is given twice: put every {entry} after one")
    chosen = parse_flags(commands, arguments, description)
    configs = {name: getattr(chosen, name), "network": chosen.network}
    sweep = parse_sweep(configs, chosen.sweep)
    replaced = {find_field(configs, field) for field in sweep}
    kept = {x: values for x, values in parse_sweep(configs, swept).items() if find_field(configs, x) not in replaced}
    return configs, chosen.run, kept | sweep


def _with_preset(network_config: Any, arguments: Sequence[str]) -> Any:
    """The script's network config, with the fields of the last --network.preset. Its flag has no field of a config, so
    that config.json holds the fields alone."""
    flag = f"--{PRESET}"
    name = _last_value(arguments, flag)
    if name is None or not has_presets(network_config):
        return network_config
    check_choice(flag, name, Preset)
    return with_preset(network_config, name)


def _last_value(arguments: Sequence[str], flag: str) -> str | None:
    """The last value of a flag; None if it is not given, or as none."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], "none"], strict=False):
        name, equals, value = argument.partition("=")
        if name == flag:
            found = value if equals else following
    return None if found is None or found.lower() == "none" else found


def parse_flags(commands: type, arguments: Sequence[str], description: str | None = None) -> Any:
    """Parses the command line into an instance of a dataclass.

    Raises:
      UsageError: a flag is unknown, or a value has the wrong type.
      SystemExit: --help was given.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                commands,
                args=["None" if a.lower() == "none" else a for a in arguments],
                prog=f"python {sys.argv[0]}",
                description=description,
            )
    except BrokenPipeError:  # a pager or head has read enough of --help
        sys.stdout = io.StringIO()  # else Python writes on as it exits
        sys.exit(0)
    except SystemExit as error:
        if not error.code:
            raise
        said = _wrong_value(commands, arguments) or _one_line(said.getvalue(), _meant(commands, arguments))
        raise UsageError(said) from None


def _one_line(box: str, meant: str | None) -> str:
    """Reduces tyro's boxed error to one line: the text above its first rule, and the flag that was meant, else the one
    that tyro suggests."""
    lines = [line.strip(" │╭╮╰╯─") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    said = lines[: lines.index("")] if "" in lines else lines
    if "Perhaps you meant:" in lines:
        meant = meant or lines[lines.index("Perhaps you meant:") + 1].split()[0].rstrip(",")
    said += ["; did you mean", f"{meant}?"] if meant else []
    return " ".join(said).replace(" ;", ";") + " (--help lists the flags)"


def _meant(commands: type, arguments: Sequence[str]) -> str | None:
    """The flag that the first unknown one says in fewer words: its field alone, as in --learning-rate; without total or
    num, as in --seeds; or its initials, as in --lr."""
    fields = {flag: flag.removeprefix("--").rpartition(".")[2] for flag, _ in _flags(commands, "")}
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        path, dot, given = flag.removeprefix("--").rpartition(".")
        if not flag.startswith("--") or flag in fields or f"--{path}{dot}{given.removeprefix('no-')}" in fields:
            continue
        for written in (given, f"total-{given}", f"num-{given}"):
            if written in fields.values():
                return next(known for known, field in fields.items() if field == written)
        initials = ("".join(word[0] for word in field.split("-")) for field in fields.values())
        return next((known for known, short in zip(fields, initials, strict=True) if short == given), None)
    return None


def _wrong_value(commands: type, arguments: Sequence[str]) -> str | None:
    """Describes the first flag whose value has the wrong type; None if there is none."""
    hint_of, given = dict(_flags(commands, "")), []
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            given.append((flag.replace("_", "-"), [value] if equals else []))
        elif given:
            given[-1][1].append(argument)
    for flag, values in given:
        hint = hint_of.get(flag)
        if hint is bool and values:
            path, dot, name = flag.removeprefix("--").rpartition(".")
            return f"{flag} ({values[0]!r}) takes no value: it alone is true, and --{path}{dot}no-{name} is false"
        kinds = [kind for kind, _ in alternatives(hint)]
        if get_origin(kinds[0]) is tuple:
            entry = get_args(kinds[0])[0]
            several = [(f"an entry of {flag}", entry, value) for value in values]
        else:
            several = [(flag, hint, value) for value in values[:1] if hint is not None]
        try:
            for named in several:
                parse_value(*named)
        except UsageError as error:
            return str(error)
    return None


def _flags(commands: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every flag of a dataclass and of its nested dataclasses, with the type of its field."""
    for name, hint in hints(commands).items():
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        name = next((note.name for note in notes if getattr(note, "name", None)), name)
        if isinstance(kind, type) and is_dataclass(kind):
            bare = any(getattr(note, "name", None) == "" for note in notes)
            yield from _flags(kind, prefix if bare else f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}".replace("_", "-"), hint
