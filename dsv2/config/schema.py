"""Dataclasses <-> plain dictionaries, with errors that name the key and suggest the nearest one.

Used for recipes (TOML), `--set section.key=value` and saved configs. Knows nothing about models.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def unknown_key_error(key: str, known: Iterable[str], where: str) -> ValueError:
    """The one error for a key that nobody knows: names it, its place, and the nearest known key."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f" (did you mean '{near[0]}'?)" if near else f"; known keys: {', '.join(sorted(known))}"
    return ValueError(f"{where}: unknown key '{key}'{hint}")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ValueError where it is missing, or anything else."""
    if not file.is_file():
        raise ValueError(f"no {file.name} at {file}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(data).__name__}")
    return data


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from a nested mapping. Raises ValueError for unknown, missing or mistyped keys."""
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be a table, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise unknown_key_error(key, fields, where)
    hints = get_type_hints(cls)
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: missing key '{missing[0]}'")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def to_dict(obj: Any) -> dict[str, Any]:
    """Nested plain dictionary of a dataclass, `None` values left out (TOML has no null)."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(obj):
        value = getattr(obj, f.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = [to_dict(v) if dataclasses.is_dataclass(v) else v for v in value]
        if value is not None:
            out[f.name] = value
    return out


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `override` laid over it, table by table."""
    out = dict(base)
    for key, value in override.items():
        if isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = merge(out[key], value)
        else:
            out[key] = value
    return out


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(hint), value, where)
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} must be one of {', '.join(map(repr, get_args(hint)))}; got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a table, got {value!r}")
        return {key: _convert(get_args(hint)[1], v, f"{where}.{key}") for key, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(o for o in options if o is not type(None))
    tables = [o for o in options if dataclasses.is_dataclass(o)]
    if len(tables) > 1 and isinstance(value, Mapping):
        return _convert_tagged(tables, value, where)
    if len(options) == 1:
        return _convert(options[0], value, where)
    for option in options:
        try:
            return _convert(option, value, where)
        except ValueError:
            continue
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{where} must be {names}, got {value!r}")


def _convert_tagged(tables: list[Any], value: Mapping[str, Any], where: str) -> Any:
    """Several tables may stand here: `kind` says which."""
    by_kind = {get_args(get_type_hints(t)["kind"])[0]: t for t in tables}
    kind = value.get("kind")
    if kind not in by_kind:
        raise ValueError(f"{where}.kind must be one of {', '.join(map(repr, by_kind))}; got {kind!r}")
    return from_dict(by_kind[kind], value, where)
