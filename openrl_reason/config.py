"""Configuration: frozen dataclasses, read from YAML and dotted flags by jsonargparse, checked once, written next to the results.

``openrl-reason reinforce --config x.yaml --policy.lr 1e-6`` builds one frozen dataclass; later sources win. A field's docstring is its help text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from openrl_reason.errors import ConfigError, did_you_mean
from openrl_reason.observe.redact import redact

Config = TypeVar("Config")


def flag_names(config_class: type, prefix: str = "") -> dict[str, type]:
    """Every dotted flag of ``config_class`` with its annotated type; groups themselves are left out."""
    names: dict[str, type] = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        name, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            names.update(flag_names(kind, name + "."))
        else:
            names[name] = kind
    return names


def split_words(config_class: type, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words that stand alone, flags with their values) of a command line that takes files or folders anywhere."""
    switches = {name for name, kind in flag_names(config_class).items() if kind is bool}
    alone: list[str] = []
    flags: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            alone.append(word)
            continue
        flags.append(word)
        takes_value = "=" not in word and word not in ("-h", "--help") and bool(words)
        if takes_value and (word[2:] not in switches or words[0].lower() in ("true", "false")):
            flags.append(words.pop(0))
    return alone, flags


def _spell_out(argv: Sequence[str], flags: dict[str, type]) -> list[str]:
    """Words as jsonargparse wants them: ``--resume`` alone means ``--resume true``, and words after a flag that takes a list of words are its
    entries, as in ``--data.path one.jsonl two.jsonl``."""
    spelled: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, joined, value = word.removeprefix("--").partition("=")
        kind = flags.get(name) if word.startswith("--") else None
        if kind == tuple[str, ...]:
            values = [value] if joined else []
            while not joined and words and not words[0].startswith("--"):
                values.append(words.pop(0))
            is_list = bool(values) and (values[0].lstrip().startswith("[") or values in ([""], ["null"]))
            spelled += [f"--{name}", *(values if is_list or not values else [json.dumps(values)])]
            continue
        spelled.append(word)
        if kind is bool and not joined and (not words or words[0].startswith("--")):
            spelled.append("true")
    return spelled


def _entry_names(kind: Any) -> list[str]:
    """Names of all fields of the dataclasses that an annotation such as ``tuple[EvalSetConfig, ...]`` holds, and of those inside them."""
    if not dataclasses.is_dataclass(kind):
        return [name for argument in typing.get_args(kind) for name in _entry_names(argument)]
    return [name for field, inner in typing.get_type_hints(kind).items() for name in (field, *_entry_names(inner))]


def _explain(message: str, flags: dict[str, type]) -> str:
    """Adds the nearest existing name to jsonargparse's report of an unknown one."""
    in_entry = re.search(r"Parser key \"([\w.]+)\":.*Option '([\w.]+)' is not accepted", message, re.DOTALL)
    if in_entry and _entry_names(flags.get(in_entry[1])):
        near = did_you_mean(in_entry[2], _entry_names(flags[in_entry[1]]))
        return f"--{in_entry[1]}: unknown setting {in_entry[2]!r} in an entry{near}"
    unknown = re.search(r"unrecognized arguments: --([\w.\-]+)", message)
    if unknown:
        return f"unknown flag --{unknown[1]}{did_you_mean(unknown[1], flags)}; --help lists all flags"
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if in_group:
        name = f"{in_group[1]}.{in_group[2]}"
        return f"unknown setting {name!r}{did_you_mean(name, flags)}; --help lists all of them"
    top = re.search(r"Option '([\w.]+)' is not accepted", message)
    if top:
        name = top[1]
        return f"unknown setting {name!r}{did_you_mean(name, flags)}; --help lists all of them"
    message = re.sub(r'Parser key "([\w.]+)":\s*', r"--\1: ", message)
    message = " ".join(re.sub(r"<class '(\w+)'>", r"\1", message).split())
    flag = re.match(r"--([\w.]+): ", message)
    kind = flags.get(flag[1]) if flag else None
    example = _list_example(kind)
    message = re.sub(r"(Expected a) tuple\.", rf"\1 list such as '{example}'.", message)
    no_entry = r"Not a valid subclass of \w+\. Got value: (.*?) Subclass types .*"
    message = re.sub(no_entry, rf"Expected a list such as '{example}'. Got entry: \1", message)
    message = re.sub(r"Problem with given class_path '[\w.]+': --", "in an entry: ", message)
    message = re.sub(
        r"Does not validate against any of the Union subtypes Subtypes: \[(\w+), NoneType\].* Given value type: \w+ Given value: ",
        r"Expected a \1 or null. Got value: ",
        message,
    )
    message = re.sub(r"Does not validate against any of the Union subtypes .* Errors: - (.*) - Expected a NoneType Given value .*", r"\1", message)
    message = message.replace(": in an entry: ", ": ")  # in the lists of settings
    if kind == tuple[str, ...] and "Expected a str." in message:
        message += f"; entries that look like numbers need quotes: '{example}'"
    return message


def _list_example(kind: Any) -> str:
    """How a list of such entries is written on the command line."""
    entry = (typing.get_args(kind) or (int,))[0]
    if dataclasses.is_dataclass(entry):
        return f'[{{"{dataclasses.fields(entry)[0].name}": ...}}]'
    return '["1", "2"]' if entry is str else "[1, 2]"


def parse_config(config_class: type[Config], argv: Sequence[str], *, prog: str) -> Config:
    """Builds ``config_class`` from command-line words.

    Raises:
        ConfigError: an unknown flag or key (with the nearest name), a value of the wrong type, a missing or unreadable YAML file.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    summary = (config_class.__doc__ or "").strip().splitlines()[0]
    parser = ArgumentParser(prog=prog, exit_on_error=False, description=summary, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; later flags override it, and a later --config an earlier one")
    parser.add_class_arguments(config_class)
    flags = flag_names(config_class)
    for file in _config_files(argv):
        _check_config_file(file)
    parsed = None
    try:
        parsed = parser.parse_args(_spell_out(argv, flags))
        config = parser.instantiate(parsed)
    except (argparse.ArgumentError, TypeError, UnicodeDecodeError) as error:
        raise ConfigError(_explain(str(error), flags)) from None
    except ConfigError as error:
        raise ConfigError(_with_group(str(error), config_class, parsed)) from None
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config_class)}
    return config_class(**fields)


def _config_files(argv: Sequence[str]) -> list[Path]:
    following = [word for flag, word in zip(argv, argv[1:], strict=False) if flag == "--config"]
    joined = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    return [path for path in map(Path, following + joined) if path.is_file()]


def _check_config_file(file: Path) -> None:
    """YAML readers keep the last of two equal keys and say nothing; and the parser's messages about a file that is no YAML do not name it."""
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError(f"--config: {place}: malformed YAML: {getattr(error, 'problem', None) or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config: {file} is not UTF-8 text; expected settings as YAML") from None
    except OSError:
        return  # the parser reports it
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"--config: {file} {'is empty' if root is None else 'holds no settings'}; expected YAML such as 'name: value'")
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                if key.value in lines:
                    line = key.start_mark.line + 1
                    raise ConfigError(f"{file}:{line}: {key.value!r} is set a second time (first on line {lines[key.value]}): keep one of them")
                lines[key.value] = key.start_mark.line + 1
                nodes.append(value)


def _with_group(message: str, config_class: type, values: Any, prefix: str = "") -> str:
    """The message of a nested config's own check, led by the group it comes from, which the nested class cannot know."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, group = hints[field.name], prefix + field.name
        if not dataclasses.is_dataclass(kind) or values is None or message.startswith("--") or group in message:
            continue
        own = values[field.name]
        found = _with_group(message, kind, own, group + ".")
        if found != message:
            return found
        try:
            names = {one.name: one for one in dataclasses.fields(kind)}
            kind(**{name: own[name] for name in names if not dataclasses.is_dataclass(typing.get_type_hints(kind)[name])})
        except ConfigError as error:
            if str(error) == message:
                return f"--{group}: {message}"
        except (TypeError, KeyError, AttributeError):
            continue
    return message


def to_dict(config: Any) -> dict[str, Any]:
    """A plain, YAML-able dictionary of a config, without secrets (see ``observe.redact``)."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            plain[field.name] = to_dict(value)
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            plain[field.name] = [to_dict(entry) for entry in value]
        else:
            plain[field.name] = redact(value, field.name)
    return plain


def save_config(config: Any, path: Path) -> None:
    """Writes the resolved config as YAML that ``--config`` reads back."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def changed_settings(config: Any, path: Path) -> list[str]:
    """``flag old -> new`` of each setting that differs from those saved in ``path``; none if that cannot be read."""
    try:
        before = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return []
    if not isinstance(before, dict):
        return []

    def changes(old: Any, new: Any, flag: str) -> list[str]:
        if isinstance(old, dict) and isinstance(new, dict):
            return [change for name in new if name in old for change in changes(old[name], new[name], f"{flag}.{name}" if flag else name)]
        return [f"--{flag} {json.dumps(old, default=str)} -> {json.dumps(new, default=str)}"] if old != new else []

    return changes(before, json.loads(json.dumps(to_dict(config), default=str)), "")


def require(condition: bool, flag: str, value: Any, remedy: str) -> None:
    """Raises ``ConfigError`` naming the flag, its value and what would work, unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"--{flag} is {value!r}: {remedy}")


def require_divisible(dividend_flag: str, dividend: int, divisor_flag: str, divisor: int) -> None:
    """Raises ``ConfigError`` with the two nearest values that work, unless ``divisor`` divides ``dividend``."""
    require(divisor >= 1, divisor_flag, divisor, "must be at least 1")
    if dividend % divisor:
        below, above = dividend // divisor * divisor, (dividend // divisor + 1) * divisor
        fits = " or ".join(str(number) for number in (below, above) if number)
        raise ConfigError(
            f"--{dividend_flag} is {dividend}, which {divisor_flag} = {divisor} does not divide: use {fits}, or change {divisor_flag}"
        )
