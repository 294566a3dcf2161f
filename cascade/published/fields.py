"""Fields of a published config.json.

A field that it lacks has the reference implementation's default, and one that asks for another
network is refused by name.
"""

from collections.abc import Collection, Mapping
from typing import Any

from cascade.ranges import MOST_CHANNELS, MOST_LEVELS, shown


def read_fields(
    fields: Mapping[str, Any],
    *,
    class_name: str,
    defaults: Mapping[str, Any],
    required: Mapping[str, tuple[Any, ...]],
    without_effect: Collection[str],
    network: str,
) -> dict[str, Any]:
    """Give all fields that a network is made of, checked where few values are right.

    class_name: what the field _class_name must be, if it is there. defaults: the value of every
    field that is read or required and may be missing. required: the values that a field may have.
    without_effect: names of fields that may have any value. A field in none of the three must be
    None or False: it asks for what the network lacks. network: what errors call the network.
    Raises ValueError naming the field.
    """
    if (name := fields.get("_class_name", class_name)) != class_name:
        raise ValueError(f"_class_name must be {class_name!r}, got {name!r}")
    given = {**defaults, **{k: v for k, v in fields.items() if not k.startswith("_")}}
    read = defaults.keys() - required.keys()
    for field, value in given.items():
        if field in read or field in without_effect:
            continue
        allowed = required.get(field, (None, False))
        if value not in allowed:
            raise ValueError(
                f"{field} must be {' or '.join(map(repr, allowed))} in {network}, got {value!r}"
            )
    return given


def integer(given: Mapping[str, Any], field: str, most: int = MOST_CHANNELS) -> int:
    """Read an integer, 1 to most, or the one value of a list: diffusers lets some go by level.

    Raises ValueError naming the field.
    """
    values = v if isinstance(v := given[field], list | tuple) else [v]
    value = values[0] if values and all(v == values[0] for v in values) else None
    if type(value) is not int or value < 1:
        raise ValueError(f"{field} must be one positive integer, got {shown(given[field])}")
    if value > most:
        raise ValueError(f"{field} must be at most {most}, got {shown(value)}")
    return value


def number(given: Mapping[str, Any], field: str, low: float | int, high: float | int) -> float:
    """Read a number, low to high. Raises ValueError naming the field."""
    value = given[field]
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{field} must be a number, {low:g} to {high:g}, got {shown(value)}")
    return float(value)


def flag(given: Mapping[str, Any], field: str) -> bool:
    """Read a field that is true or false. Raises ValueError naming the field."""
    if type(value := given[field]) is not bool:
        raise ValueError(f"{field} must be true or false, got {shown(value)}")
    return value


def one_each(given: Mapping[str, Any], field: str, kind: type, levels: int) -> list[Any]:
    """Read the field's list with a value for each level, or its one value for all of them.

    kind: the type of a value. Raises ValueError naming the field if the list has another length.
    """
    values = [v] * levels if type(v := given[field]) is kind else v
    if not isinstance(values, list | tuple) or len(values) != levels:
        raise ValueError(
            f"{field} must have {levels} values, as down_block_types has, got {shown(v)}"
        )
    if not all(type(value) is kind for value in values):
        raise ValueError(f"{field} must be of {kind.__name__}, got {shown(v)}")
    return list(values)


def levels_with(
    given: Mapping[str, Any], down: Mapping[str, bool], up: Mapping[str, bool]
) -> list[bool]:
    """Read which levels, from full resolution down, attend.

    down, up: {block type: whether it attends}, of all that the network knows. Raises ValueError
    naming the field for other block types, or if the way up does not mirror the way down.
    """
    downs, ups = given["down_block_types"], given["up_block_types"]
    for field, names, known in (("down_block_types", downs, down), ("up_block_types", ups, up)):
        if not isinstance(names, list | tuple) or not all(name in list(known) for name in names):
            raise ValueError(f"{field} must be of {' and '.join(known)}, got {shown(names)}")
        if not 1 <= len(names) <= MOST_LEVELS:
            raise ValueError(f"{field} must list 1 to {MOST_LEVELS} levels, got {len(names)}")
    if [down[name] for name in downs] != [up[name] for name in reversed(ups)]:
        raise ValueError(
            f"up_block_types must mirror down_block_types, attention for attention, got {ups!r}"
        )
    return [down[name] for name in downs]
