"""Reads a run's settings: defaults <- YAML file <- `section.key=value` from the command line, each value checked.

A mistake raises ConfigError, which names the key, what it got and what it takes.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from automix_dist.config import Config, ConfigError, to_dict
from automix_dist.errors import did_you_mean


def build_section(cls: type, values: Mapping[str, Any], name: str = "") -> Any:
    """A dataclass from nested dicts, checked; `name` is its place in the tree, for messages. Raises ConfigError."""
    prefix = f"{name}." if name else ""
    return _build(cls, values, prefix, _all_keys(cls, prefix))


def to_yaml(config: Config) -> str:
    """The tree as YAML that `load_config` reads back to an equal tree."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Build and check the tree from nested dicts; keys that are absent take their defaults. Raises ConfigError."""
    return build_section(Config, values)


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), say: Callable[[str], object] = lambda text: None
) -> Config:
    """Read a YAML file (None: defaults) and apply `section.key=value` overrides, each value parsed as YAML.

    `say` hears which of the file's settings an override leaves out.

    Raises ConfigError for a missing or malformed file, an unknown key, a wrong type, or an impossible combination.
    """
    values: dict[str, Any] = {}
    try:
        if path is not None:
            values = _read_yaml(Path(path))
        # First those that drop others: see _over.
        for override in sorted(overrides, key=lambda each: not each.startswith(("policy.name=", "model.backbone="))):
            below, values = values, _over(values, _read_override(override))
            for section, (key, dependent) in DEPENDENT.items():
                lost = _section(below, section).get(dependent)
                if lost and dependent not in _section(values, section):
                    say(f"{section}.{dependent} of {path} left out, as {section}.{key} is another one: {lost}")
        config = from_dict(values)
        to_dict(config)  # finds a mapping that holds itself
        return config
    except RecursionError as error:
        raise ConfigError(f"{path or overrides}: nested too deeply, or an alias refers to itself") from error


def parse_yaml(text: str) -> Any:
    """YAML as people mean it: a key once, and numbers in decimal (YAML 1.1 reads 010 as 8 and 1:30 as 90).

    Raises yaml.YAMLError, or ValueError for what looks like a date or a number, and is none.
    """
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value!r} is here a second time"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))


def _read_yaml(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's settings, over those of the file that its key `base` names, if it has one; `readers` led here."""
    if path.resolve() in readers:
        raise ConfigError(f"{path} has itself as its base, by way of {', '.join(each.name for each in readers)}")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        others = [p.name for p in path.parent.glob("*.yaml") if p.resolve() not in readers]
        beside = {name: path.parent / name for name in others if isinstance(error, FileNotFoundError)}
        reason = error.strerror if isinstance(error, OSError) else "not a text file in UTF-8"
        asked = f" (the base of {readers[-1]})" if readers else ""
        raise ConfigError(f"cannot read config {path}{asked}: {reason}{did_you_mean(path.name, beside)}") from error
    try:
        values = parse_yaml(text) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date or a number, and is none
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is not None and "policies" in values:
        raise ConfigError(f"{path} is a comparison of several policies, not a config: automix compare {path}")
    if base is None:
        return values
    return _over(_read_yaml(path.parent / str(base), (*readers, path.resolve())), values)


PATHS = ("output", "data.train", "data.val", "engine.deepspeed_json", "model.weights")
"""Settings in which ~ is the home folder."""

DEPENDENT = {"policy": ("name", "settings"), "model": ("backbone", "timm_kwargs")}
"""In a section, what names a thing, and the key of the settings that are this thing's own."""


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections merged key by key; any other value replaces the one below it. Under another `name` (of a policy) no
    `settings` are left from below, under another `backbone` no `timm_kwargs`; nor are they if they are empty above."""
    for key, dependent in DEPENDENT.values():
        if above.get(dependent) == {} or (key in above and above[key] != below.get(key)):
            below = {k: v for k, v in below.items() if k != dependent}
    sections = {k for k, v in below.items() if isinstance(v, dict)}
    both = {k: _over(below[k], v or {}) for k, v in above.items() if k in sections and isinstance(v, dict | None)}
    return below | above | both


def _read_override(override: str) -> dict[str, Any]:
    """`section.key=value` as nested dicts."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    try:
        value = parse_yaml(text) if text.strip() else ""
    except (ValueError, yaml.reader.ReaderError):  # it looks like a date or a number, and is none; or a path of bytes
        value = text
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    if isinstance(value, str) and text.lstrip()[:1] not in ("'", '"'):
        value = text.strip()  # YAML would take what follows " #" in a path for a comment
    for section in reversed(key.split(".")):
        value = {section: value}
    return value


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        keys += _all_keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return keys


def keys_named(name: str) -> list[str]:
    """The settings, in any section, of this name or one very much like it: "lr" gives optimizer.lr."""
    known = _all_keys(Config)
    leaf_of = {key: key.rsplit(".", 1)[-1] for key in known}
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1], leaf_of.values(), n=1, cutoff=0.8)
    return [name] if name in known else [key for key, leaf in leaf_of.items() if leaf in near]


def _unknown_key(key: str, known: list[str]) -> ConfigError:
    by_leaf = {k.rsplit(".", 1)[-1]: k for k in known}
    hint = did_you_mean(key, known) or did_you_mean(key.rsplit(".", 1)[-1], by_leaf)
    if key in known:  # with the dot in it
        section, _, leaf = key.rpartition(".")
        hint = f"; in a file write it below its section, {section}: {{{leaf}: ...}}"
    return ConfigError(f"unknown key {key}{hint} (`automix train CONFIG --print-config` lists every key)")


def _build(cls: type, values: Any, prefix: str, known: list[str]) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix[:-1]} = {values!r}: expected a section with keys {', '.join(_all_keys(cls))}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise _unknown_key(f"{prefix}{name}", known)
        key, hint = f"{prefix}{name}", hints[name]
        if dataclasses.is_dataclass(hint):  # a section without a line in it is None
            arguments[name] = _build(hint, {} if value is None else value, f"{key}.", known)
        else:
            arguments[name] = _convert(key, value, hint)
            if key in PATHS:  # a shell does it at the beginning of a word only, if at all
                arguments[name] = os.path.expanduser(arguments[name])
    return cls(**arguments)


def _convert(key: str, value: Any, hint: Any) -> Any:
    """Check a YAML value against a field's type; an int passes as float, a list as tuple, `1e-4` as a number."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return next(each for each in args if each == value)  # 3 for 3.0
        choices = [str(each) for each in args]
        raise ConfigError(f"{key} = {value!r}: expected one of {', '.join(choices)}{did_you_mean(str(value), choices)}")
    if origin is types.UnionType:
        return None if value in (None, "") else _convert(key, value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value] if args[-1] is Ellipsis else None
        if items is None or (args[-1] is not Ellipsis and len(items) != len(args)):
            raise ConfigError(f"{key} = {value!r}: expected a list of {len(args)} values")
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
        return tuple(
            _convert(f"{key}[{i}]", item, kind) for i, (item, kind) in enumerate(zip(items, kinds, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} = {value!r}: expected a mapping")
        return dict(value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            pass
        except OverflowError as error:  # a whole number of more than 308 digits
            raise ConfigError(f"{key}: expected a finite number") from error
        else:
            if not math.isfinite(number):
                raise ConfigError(f"{key} = {value!r}: expected a finite number")
            return number
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise ConfigError(f"{key} = {value!r}: expected {names[hint]}, got {type(value).__name__}")
