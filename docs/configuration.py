"""Writes configuration.md, the reference of all settings, from the dataclasses that define them.

python docs/configuration.py          # after a change to config.py or to a policy's Settings
"""

import ast
import dataclasses
import importlib
import inspect
import json
import re
import textwrap
import types
import typing
from pathlib import Path

import yaml

from automix_dist.config import POLICIES, Config

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Configuration

Every setting, written by `python docs/configuration.py` from the code. A YAML file holds what differs from the
defaults; its key `base` names another file to start from, relative to its own folder; `section.key=value` on the
command line has the last word:

    automix train configs/digits/automix_resnet10.yaml optimizer.lr=0.05 engine.name=ddp --print-config

prints all values of a run and what they come to. In a path a leading `~` is the home folder. A mistake names the key,
what it got and what it takes.
"""
TYPES = {bool: "true, false", int: "whole number", float: "number", str: "text"}


def page() -> str:
    """The whole page as Markdown."""
    sections = {name: cls for name, cls in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(cls)}
    parts = [HEAD, "## The run\n\n" + table(Config)]
    parts += [f"## {name}\n\n{table(cls, f'{name}.')}" for name, cls in sections.items()]
    parts.append("## policy.settings\n\nOf each policy ([policies](policies.md)); those not listed have none.\n")
    for name in POLICIES:
        settings = importlib.import_module(f"automix_dist.policies.{name}").Settings
        if dataclasses.fields(settings):
            parts.append(f"### {name}\n\n" + table(settings, "policy.settings."))
    return "\n".join(parts)


def table(cls: type, prefix: str = "") -> str:
    """A row for each setting of a dataclass that is no section itself."""
    texts, hints = docstrings(cls), typing.get_type_hints(cls)
    rows = ["| key | takes | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(hints[field.name]):
            if field.name not in texts:
                raise SystemExit(f"{cls.__module__}.{cls.__qualname__}.{field.name} has no docstring below it")
            cells = (f"`{prefix}{field.name}`", takes(hints[field.name]), default(field), texts[field.name])
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def docstrings(cls: type) -> dict[str, str]:
    """The text under each field, its own or inherited, with links to the documents that it names."""
    texts = {}
    for each in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        for node, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
                text = " ".join(after.value.value.split())
                text = re.sub(r"docs/((\w+)\.md)", r"[\2](\1)", text)
                texts[node.target.id] = re.sub(r"\((section [\d.]+\d)\)", r"([\1](method.md))", text)
    return texts


def takes(hint: typing.Any) -> str:
    """A field's type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(str(arg) for arg in args)
    if origin is types.UnionType:
        return " or ".join("null" if arg is type(None) else takes(arg) for arg in args)
    if origin is tuple:
        return f"list: {takes(args[0])}" if args[-1] is Ellipsis else f"list of {len(args)}: {takes(args[0])}"
    return "mapping" if origin is dict else TYPES[hint]


def default(field: dataclasses.Field) -> str:
    """A field's default as YAML, as it may stand behind the key's equals sign."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    plain = json.loads(json.dumps(value))  # tuples as lists
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(page())
