"""What a W&B run of a population shows: its name, its config and its summary."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from purepg.run.sweep import label_of

Per = Literal["seed", "setting"]


class Member(NamedTuple):
    """What one W&B run shows: one seed of a setting, or a setting's mean over seeds (`seed` is None)."""

    setting: int
    seed: int | None  # position on the seed axis


def name_and_config(
    member: Member, config: Mapping[str, Any], hyperparameters: Mapping[str, Any], seeds: Sequence[int]
) -> tuple[str, dict[str, Any]]:
    """A run's name, such as `learning_rate=0.001/seed=3`, and the experiment's config with the setting's values in it.

    A hyperparameter `section.field` replaces the field of that section. One without a section replaces the field in
    every section that has it, and is an entry of its own too. The seed is the entry `member_seed`.
    """
    own = {name: dict(entry) if isinstance(entry, Mapping) else entry for name, entry in config.items()}
    for name, value in hyperparameters.items():
        section, _, field = name.rpartition(".")
        for key, entry in own.items():
            if section in ("", key) and isinstance(entry, dict) and field in entry:
                entry[field] = value
        if not section:
            own[field] = value
    label = label_of(hyperparameters)
    if member.seed is None:
        return label or "all seeds", own
    seed = seeds[member.seed]
    return f"{label}/seed={seed}" if label else f"seed={seed}", own | {"member_seed": seed}


def member_summary(member: Member, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of the member's setting, and what all settings share. Of a list over seeds (`finals`, `responses`) a
    seed has its own element (`final`, `responses`)."""

    def of_member(entry: Mapping[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = {}
        for name, value in entry.items():
            if member.seed is not None and name in ("finals", "responses"):
                own["final" if name == "finals" else name] = value[member.seed]
            elif name != "hyperparameters":
                own[name] = of_member(value) if isinstance(value, Mapping) else value
        return own

    settings = summary.get("settings")
    own = {name: value for name, value in summary.items() if name != "settings"}
    return own | of_member(settings[member.setting]) if settings else own
