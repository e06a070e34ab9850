"""Config files: YAML → options, and options → reference YAML, JSON schema, table.

python -m mlx_lora.config_file reference      # configs/reference.yaml
python -m mlx_lora.config_file schema         # configs/schema.json, for editors
python -m mlx_lora.config_file table          # the README's table
"""

import argparse
import copy
import difflib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mlx_lora import files
from mlx_lora.config import AdamW, Config, Options, Schedule, walk
from mlx_lora.errors import InputError, exit_code

RUN_CONFIG = "config.yaml"  # in a run's folder

MAX_VALUES = 10_000  # in a config: far more than there are options, far fewer than a chain of aliases makes


class _Loader(yaml.SafeLoader):
    """YAML with `1e-4` as a number and repeated keys as errors."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a text that looks like `1e5` in quotes."""


for kind in (_Loader, _Dumper):
    kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The config in a YAML file, with `a.b=value` overrides applied in order.

    Raises InputError naming the file and line (or the override), the key, its value and, for an unknown key, the
    nearest known one. Every fault is listed, not only the first.
    """
    raw, where = read(path)
    return parse(raw, overrides, where, str(path))


def read(path: str | Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """The mapping in a YAML or JSON file, and the file and line on which each key path stands."""
    path = Path(path)
    try:
        text = files.finite(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # JSON is YAML, but for tabs between its tokens
    try:
        raw = _Loader(text).get_single_data()
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:  # AttributeError: !!timestamp x
        raise InputError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds no options; see python -m mlx_lora.config_file reference")
    try:
        if _values(node, {}) > MAX_VALUES:
            raise InputError(f"{path}: holds more than {MAX_VALUES:,} values, aliases written out; remove aliases")
        where = dict(_lines(node, path))
    except RecursionError:
        raise InputError(f"{path}: not valid YAML: something in it contains itself") from None
    return raw, where


def parse(
    raw: dict[str, Any],
    overrides: list[str] | None = None,
    where: dict[tuple[str, ...], str] | None = None,
    source: str = "config",
) -> Config:
    """The config in a mapping, with overrides; `where` says where each key was written, for errors as in `load`."""
    raw, where = copy.deepcopy(raw), dict(where or {})
    for override in overrides or []:
        where[_apply(raw, override)] = f"--set {override}"
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise InputError("\n       ".join(_faults(error, raw, where, source))) from None


def _values(node: Any, known: dict[int, int]) -> int:
    """How many values a node holds with its aliases written out; raises RecursionError where it contains itself."""
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = isinstance(node, yaml.MappingNode)
        inner = [value for pair in parts for value in pair] if pairs else parts
        known[id(node)] = 1 + sum(_values(value, known) for value in inner)
    return known[id(node)]


def _lines(node: Any, path: Path, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each key path with the file and line it stands on."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            keys = (*prefix, str(key.value))
            yield keys, f"{path}:{key.start_mark.line + 1}"
            yield from _lines(value, path, keys)


def _apply(raw: dict[str, Any], override: str) -> tuple[str, ...]:
    """Sets one `a.b=value`, the value read as YAML, and returns its key path."""
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise InputError(f"--set {override}: is not of the form section.key=value")
    try:
        value = _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError):
        raise InputError(f"--set {override}: the value is not valid YAML") from None
    if keys[0] == "model" and isinstance(raw.get("model"), str) and len(keys) > 1:
        raw["model"] = {"path": raw["model"]}
    group = raw
    for key in keys[:-1]:
        group = group.setdefault(key, {})
        if not isinstance(group, dict):
            raise InputError(f"--set {override}: {key} is not a group of options")
    group[keys[-1]] = value
    return keys


def _faults(
    error: ValidationError, raw: dict[str, Any], where: dict[tuple[str, ...], str], source: str
) -> Iterator[str]:
    faults: dict[tuple[str, ...], list[str]] = {}
    for fault in error.errors():
        keys = _written(fault["loc"], raw, fault["type"])
        message = fault["msg"].removeprefix("Value error, ")
        value = fault["input"]
        if fault["type"] == "extra_forbidden":
            message = f"unknown key{_nearest(keys)} (its value is {_short(value)})"
        elif fault["type"] == "missing":
            message = "is required"
        elif fault["type"] == "union_tag_invalid":
            message = f"name is one of {fault['ctx']['expected_tags']}, got {fault['ctx']['tag']!r}"
        elif fault["type"] in ("union_tag_not_found", "model_type", "model_attributes_type"):
            message = f"is a group of options such as {{name: ...}} or one key a line, got {_short(value)}"
        elif not isinstance(value, (dict, Options)):
            message = f"{message[0].lower()}{message[1:]}, got {_short(value)}"
        faults.setdefault(keys, []).append(message)
    for keys, messages in faults.items():
        below = [place for path, place in where.items() if keys and path[: len(keys)] == keys and "--set" in place]
        above = [where[keys[:depth]] for depth in range(len(keys), 0, -1) if keys[:depth] in where]
        place = [*below, *above, source][0]
        yield f"{place}: " + (f"{'.'.join(keys)}: " if keys else "") + "; or ".join(dict.fromkeys(messages))


def _short(value: Any) -> str:
    """A value as it may stand in a message."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = "something that contains itself"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _written(loc: tuple[Any, ...], raw: Any, kind: str) -> tuple[str, ...]:
    """The part of pydantic's location that names keys a person wrote (it also names the members of unions)."""
    keys: list[str] = []
    for part in loc:
        known = raw.keys() if isinstance(raw, dict) else range(len(raw)) if isinstance(raw, list) else ()
        if part in known:
            raw = raw[part]
        elif not (kind == "missing" and part == loc[-1]):
            continue
        keys.append(str(part))
    return tuple(keys)


def _nearest(keys: tuple[str, ...]) -> str:
    """What a person probably meant by an unknown key."""
    paths = list(dict.fromkeys(path for path, _, _ in walk()))
    groups = list(dict.fromkeys(path[:depth] for path in paths for depth in range(1, len(path))))
    if keys in paths:
        return f" for this {keys[-2]}"
    siblings = [path[-1] for path in paths + groups if path[:-1] == keys[:-1]]
    if near := difflib.get_close_matches(keys[-1], siblings, 1, cutoff=0.7):
        return f"; did you mean {near[0]}?"
    names = {path[-1]: ".".join(path) for path in reversed(paths)}
    if near := difflib.get_close_matches(keys[-1], names, 1, cutoff=0.7):
        return f"; did you mean {names[near[0]]}?"
    return f"; known here: {', '.join(dict.fromkeys(siblings))}" if siblings else ""


def dump(config: Config) -> str:
    """The resolved config as YAML that `load` reads back to an equal config."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def nested(options: dict[str, Any]) -> dict[str, Any]:
    """Options by key path (`train.seed`) as the mapping of mappings that `parse` takes."""
    raw: dict[str, Any] = {}
    for name, value in options.items():
        *groups, key = name.split(".")
        group = raw
        for part in groups:
            group = group.setdefault(part, {})
        group[key] = value
    return raw


def commented(head: list[str], options: dict[str, tuple[Any, str]]) -> str:
    """A config file of options by key path, each with its value and a comment ("": none), in the reference's order;
    above them, `head` in lines of comment."""
    lines = [f"# {_printable(line)}".rstrip() for line in head]
    last: tuple[str, ...] = ()
    for keys in dict.fromkeys(keys for keys, _, _ in walk()):
        if ".".join(keys) not in options:
            continue
        shared = next((n for n, pair in enumerate(zip(keys, last, strict=False)) if pair[0] != pair[1]), len(last))
        lines += [f"{'  ' * depth}{keys[depth]}:" for depth in range(shared, len(keys) - 1)]
        value, comment = options[".".join(keys)]
        line = f"{'  ' * (len(keys) - 1)}{keys[-1]}: {_one_line(value)}"
        lines.append(f"{line}  # {_printable(comment)}" if comment else line)
        last = keys
    return "\n".join(lines) + "\n"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _one_line(value: Any) -> str:
    """A value as YAML that `_Loader` reads back."""
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value)
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=2**30, sort_keys=False)
    return text.removesuffix("...\n").rstrip("\n")


def reference() -> str:
    """A YAML file of every option with its default and meaning; required ones hold an example."""
    examples = {"path": "Qwen/Qwen3-0.6B", "train": "data/train.jsonl", "output_dir": "runs/my-first"}
    lines = [
        "# yaml-language-server: $schema=schema.json",
        "# Every option with its default. Required: model, data.train, output_dir.",
    ]
    group_keys: tuple[str, ...] = ()
    for keys, field, group in walk():
        if keys[:2] == ("model", "quantize") and len(keys) > 2:
            continue  # an optional group: its own line names what it holds
        for depth in range(1, len(keys)):
            if keys[:depth] != group_keys[:depth]:
                lines.append(f"{'  ' * (depth - 1)}{keys[depth - 1]}:")
        group_keys = keys[:-1]
        option = f"{keys[-1]}: {_yaml(examples[keys[-1]] if field.is_required() else field.default)}"
        indent = "  " * (len(keys) - 1)
        if variant := _variant(group):
            if keys[-1] != "name":
                lines.append(f"{indent}# with {variant}: {option} ({field.description})")
        else:
            lines.append(f"{indent}{option}  # {field.description}")
    return "\n".join(lines) + "\n"


def _variant(group: type[Options]) -> str:
    """The name of an optimizer other than the default one, whose options only stand beside those of the default."""
    name = group.model_fields.get("name")
    return str(name.default) if name is not None and group not in (AdamW, Schedule) else ""


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def schema() -> str:
    """The JSON schema of a config file."""
    document = Config.model_json_schema()
    # An optimizer without a name is AdamW and may look like others too.
    optimizer = document["$defs"]["Train"]["properties"]["optimizer"]
    optimizer["anyOf"] = optimizer.pop("oneOf")
    optimizer.pop("discriminator", None)
    document["properties"]["model"] = {"anyOf": [{"type": "string"}, document["properties"]["model"]]}
    return json.dumps(document, indent=1) + "\n"


def table() -> str:
    """The README's table of options."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for keys, field, group in walk():
        variant = _variant(group)
        if variant and keys[-1] == "name":
            continue
        name = f"`{'.'.join(keys)}`" + (f" ({variant})" if variant else "")
        default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
        rows.append(f"| {name} | {default} | {str(field.description).replace('|', '/')} |")
    return "\n".join(rows) + "\n"


def _main() -> None:
    what = _parser().parse_args().what
    print({"reference": reference, "schema": schema, "table": table}[what](), end="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora config-file",
        description="Print every option of a config.",
        epilog="reference: a config of all options, with their meanings; schema: JSON schema, for editors; table: "
        "the same in Markdown",
    )
    parser.add_argument("what", choices=["reference", "schema", "table"])
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(_main))
