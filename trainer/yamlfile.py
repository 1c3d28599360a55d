"""A YAML file read strictly into a typed dataclass; its errors name the file, the line and the nearest right key."""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.errors import InputError

Place = tuple[str | int, ...]  # where a value stands: ("optimizer", "betas", 1)
Section = TypeVar("Section")

OTHER_NAMES = {  # of keys, elsewhere -> here
    "learning_rate": "lr",
    "max_steps": "max_duration",
    "num_train_epochs": "max_duration",
    "batch_size": "global_train_batch_size",
    "gradient_checkpointing": "activation_checkpointing",
}
MAX_BYTES = 2**20
MAX_DEPTH = 40
MAX_BITS = 4096
MAX_UNFOLDED = 2**17
MAX_VALUES = 100_000  # a file of aliases to aliases is small and unfolds into anything


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number and dates as text, as people who write recipes mean them."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what _Loader would not read back as text."""


_FLOAT = re.compile(
    r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*(?:[eE][-+]?\d+)?"
    r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_DROPPED = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _DROPPED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_REFERENCE = re.compile(r"\$\{\s*([^${}]*?)\s*\}")


@dataclass
class Source:
    """The plain values of one YAML file and of the overrides on it, with the place each came from.

    name: the file as the user wrote it. lines: 1-based line of each key. overrides: the argument that set a value.
    """

    name: str
    values: dict[str, Any]
    lines: dict[Place, int]
    overrides: dict[Place, str] = field(default_factory=dict)

    def where(self, place: Place) -> str:
        """`FILE:LINE` of a value, or of the nearest section around it; the override where one set it."""
        for end in range(len(place), 0, -1):
            if place[:end] in self.overrides:
                return f"argument {self.overrides[place[:end]]!r}"
            if place[:end] in self.lines:
                return f"{self.name}:{self.lines[place[:end]]}"
            for key, argument in self.overrides.items():
                if key[:end] == place[:end]:  # a section that is only there because an override is in it
                    return f"argument {argument!r}"
        return self.name

    def error(self, place: Place, message: str) -> InputError:
        """An InputError that says where."""
        return InputError(f"{self.where(place)}: {message}")

    def locate(self, error: Exception) -> InputError:
        """An error from a dataclass's own checks, with the place of the first key that its message names."""
        message = str(error)
        section, colon, rest = message.partition(": ")
        inside: Place = (section,) if colon and isinstance(self.values.get(section), dict) else ()
        for word in re.findall(r"[A-Za-z_]\w*(?:\.\w+|\[\d+\])*", rest if inside else message):
            place = (*inside, *(int(part) if part.isdigit() else part for part in re.findall(r"\w+", word)))
            if place in self.lines or place in self.overrides:
                return self.error(place, message)
        return self.error(inside, message)


def dotted(place: Place) -> str:
    """("a", "b", 1) as a.b[1]."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def nearest(key: str, known: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The known key that a misspelt one most likely means, or None. cutoff: least similarity, 0 to 1."""
    matches = difflib.get_close_matches(key.lower(), known, n=1, cutoff=cutoff)
    return matches[0] if matches else None


def dump(values: dict[str, Any]) -> str:
    """Plain values as YAML that `read` gives back unchanged, keys in their own order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=100)


def read(path: Path) -> Source:
    """Read a YAML file whose top level is a mapping.

    Raises InputError for a file that cannot be read or is empty, bad syntax, a key given twice, a tag (which could
    run code), and nesting deeper than 40.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: more than 1 MiB is not a recipe; give a YAML file")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not a text file ({e.reason} at byte {e.start}); give a YAML file") from e
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    values, lines = parse(text, str(path))
    if values is None:
        raise InputError(f"{path}: the file is empty; see yaml/mpt-125m.yaml for a complete one")
    if not isinstance(values, dict):
        raise InputError(f"{path}:1: expected `key: value` lines at the top level, found {describe_value(values)}")
    return Source(str(path), values, lines)


def parse(text: str, name: str) -> tuple[Any, dict[Place, int]]:
    """YAML text as plain values (dict, list, str, int, float, bool, None) and the 1-based line of each place."""
    lines: dict[Place, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        count = iter(range(MAX_VALUES))
        return (None if node is None else _plain(loader, node, (), lines, name, count)), lines
    except RecursionError as e:
        raise InputError(f"{name}: nested deeper than {MAX_DEPTH} levels") from e
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        at = f"{name}:{mark.line + 1}" if mark else name
        raise InputError(f"{at}: not valid YAML: {', '.join(t for t in (e.context, e.problem) if t)}") from e
    except yaml.YAMLError as e:
        raise InputError(f"{name}: not valid YAML: {str(e).splitlines()[0]}") from e


def _plain(
    loader: _Loader, node: yaml.Node, place: Place, lines: dict[Place, int], name: str, count: Iterator[int]
) -> Any:
    """A YAML node as plain values; only YAML's own types pass, so no tag can build an object."""
    at = f"{name}:{node.start_mark.line + 1}"
    if len(place) > MAX_DEPTH:
        raise InputError(f"{at}: nested deeper than {MAX_DEPTH} levels")
    if next(count, None) is None:
        raise InputError(f"{name}: more than {MAX_VALUES} values is not a recipe")
    if not node.tag.startswith("tag:yaml.org,2002:") or ":python" in node.tag or node.tag.endswith("binary"):
        raise InputError(f"{at}: tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is refused; use plain values only")
    if isinstance(node, yaml.ScalarNode):
        try:
            value = loader.construct_object(node)
            if isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise ValueError(f"more than {MAX_BITS} bits")  # Python prints no integer of thousands of digits
            return value
        except (ValueError, LookupError, AttributeError, OverflowError) as e:  # such as of `!!int abc`
            raise InputError(f"{at}: {_excerpt(node.value)!r} is no {node.tag.rpartition(':')[2]} ({e})") from e
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*place, i), lines, name, count) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise InputError(f"{name}:{line}: a key has to be one word")
        if key in seen:
            raise InputError(f"{name}:{line}: key {dotted((*place, key))} is given twice, first in line {seen[key]}")
        seen[key] = line
    loader.flatten_mapping(node)  # `<<: *anchor`: the merged keys come first, so the mapping's own win
    result = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        lines[(*place, key)] = key_node.start_mark.line + 1
        result[key] = _plain(loader, value_node, (*place, key), lines, name, count)
    return result


def override(source: Source, arguments: Sequence[str], schema: type | None = None) -> None:
    """Apply `key.subkey=value` arguments to `source` in place; values are YAML, mappings merge, lists replace.

    schema: the dataclass the values are meant for. Where it wants text, `key=17` is the text "17".
    Raises InputError for an argument that is not of that form.
    """
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if key.startswith("-"):
            raise InputError(f"argument {argument!r}: settings have no dashes; write {argument.lstrip('-')}")
        if not equals:
            raise InputError(f"argument {argument!r} has no value; write {key}=VALUE")
        parts = key.split(".")
        if not all(re.fullmatch(r"\w+", part) for part in parts):
            raise InputError(f"argument {argument!r}: {key!r} is not a key; write section.key=VALUE")
        for i, part in enumerate(parts):
            if part.isdigit():
                name = ".".join(parts[:i])
                raise InputError(f"argument {argument!r}: give the list whole, {name}=[FIRST,SECOND,...]")
        value = _argument_value(argument, text, _hint_at(schema, parts))
        place = tuple(parts)
        source.overrides[place] = argument
        section = source.values
        for part in parts[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[parts[-1]] = _merged(section.get(parts[-1]), value)


def _argument_value(argument: str, text: str, hint: Any) -> Any:
    """The value of `key=TEXT`: YAML, but the text as it stands where the field wants text."""
    wants_text = str in _members(hint) and not {int, float, bool} & set(_members(hint))
    try:
        value, _ = parse(text, f"argument {argument!r}")
    except InputError:
        if wants_text:
            return text
        raise
    return text if wants_text and value is not None and not isinstance(value, str) else value


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def _hint_at(schema: Any, parts: Sequence[str]) -> Any:
    """The type of the field at a dotted key of a dataclass; None where there is no such field."""
    for part in parts:
        sections = [member for member in _members(schema) if dataclasses.is_dataclass(member)]
        schema = get_type_hints(sections[0]).get(part) if sections else None
    return schema


def resolve(source: Source) -> None:
    """Replace each `${a.b}` in place by the value at a.b of the same file.

    Only that form: `${oc.env:X}` and the like, which read the environment, are refused, and so is text that turns
    into an interpolation once resolved.
    """
    for place, text in _strings(source.values, ()):
        if _is_foreign(text):
            raise source.error(place, f"{dotted(place)}: {text!r}: only ${{section.key}} of the same file is allowed")
        if text == "???":
            raise source.error(place, f"{dotted(place)} is left open (???); give it a value")
    try:
        _check_expansion(source)
        values = OmegaConf.to_container(OmegaConf.create(source.values), resolve=True)
    except OmegaConfBaseException as e:
        key = str(e.full_key or "")
        place = tuple(int(p) if p.isdigit() else p for p in re.findall(r"[^.\[\]]+", key))
        raise source.error(place, f"{key or 'interpolation'}: {str(e).splitlines()[0]}") from e
    except RecursionError as e:
        raise InputError(f"{source.name}: an interpolation ${{...}} refers to itself, or to a long chain") from e
    assert isinstance(values, dict)
    source.values = {str(key): value for key, value in values.items()}
    for place, text in _strings(source.values, ()):
        if "${" in text:
            raise source.error(place, f"{dotted(place)}: {text!r}: an interpolation may not make another one")


def _check_expansion(source: Source) -> None:
    """InputError where the interpolations would unfold into more than MAX_UNFOLDED characters, before they do.

    A few lines, each ten times the one before, are enough for that. What cannot be followed (missing, circular) counts
    as nothing: resolving refuses it by name.
    """
    sizes: dict[Place, int] = {}
    unfolded = 0

    def size(value: Any, place: Place) -> int:
        """Characters of a value once resolved, at most, and one more for each value in it."""
        nonlocal unfolded
        if place in sizes:
            return sizes[place]
        sizes[place] = 0  # for a circle that leads back here
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            total = 1 + sum(size(item, (*place, key)) for key, item in items)
        else:
            text = str(value)
            keys = _REFERENCE.findall(text)
            total = 1 + len(text) + sum(target(key, place) for key in keys)
            unfolded += total if keys else 0
            if unfolded > MAX_UNFOLDED:
                raise source.error(
                    place,
                    f"{dotted(place)}: interpolations unfold into more than {MAX_UNFOLDED} characters; shorten it",
                )
        sizes[place] = total
        return total

    def target(key: str, place: Place) -> int:
        dots = len(key) - len(key.lstrip("."))  # relative to the section around the value, as OmegaConf has it
        value: Any = source.values
        found: Place = ()
        for part in (*(place[:-dots] if dots else ()), *re.findall(r"[^.\[\]]+", key)):
            part = int(part) if isinstance(value, list) and str(part).isdecimal() else part
            try:
                value = value[part]
            except (LookupError, TypeError):
                return 0
            found = (*found, part)
        return size(value, found)

    size(source.values, ())


def _strings(value: Any, place: Place) -> Iterator[tuple[Place, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, (*place, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _strings(item, (*place, i))


def _is_foreign(text: str) -> bool:
    """Whether ${...} holds a colon, without which OmegaConf calls no resolver, or another ${: its key varies."""
    depth, i = 0, 0
    while i < len(text):
        if text.startswith("${", i):
            if depth:
                return True
            depth, i = depth + 1, i + 1
        elif text[i] == "}" and depth:
            depth -= 1
        elif text[i] == ":" and depth:
            return True
        i += 1
    return False


def build(schema: type[Section], source: Source) -> Section:
    """The dataclass `schema` made from the values of `source`, each checked against its field's type.

    Raises InputError for an unknown key (with the nearest right one), a missing one, and a value of a wrong type.
    """
    _check(schema, source.values, (), source, schema)
    try:
        result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), source.values))
    except OmegaConfBaseException as e:
        raise InputError(f"{source.name}: {str(e).splitlines()[0]}") from e
    except (ValueError, TypeError) as e:  # a section's own __post_init__
        raise source.locate(e) from e
    assert isinstance(result, schema)
    return result


def _check(hint: Any, value: Any, place: Place, source: Source, root: type) -> None:
    members = _members(hint)
    if value is None and type(None) in members:
        return
    sections = [member for member in members if dataclasses.is_dataclass(member)]
    if sections:
        _check_section(sections[0], value, place, source, root)
        return
    for member in members:
        origin, arguments = get_origin(member), get_args(member)
        if origin in (list, tuple):
            if not isinstance(value, list) or (
                origin is tuple and ... not in arguments and len(value) != len(arguments)
            ):
                raise _wrong_type(hint, value, place, source)
            for i, item in enumerate(value):
                _check(arguments[0], item, (*place, i), source, root)
            return
        if origin is dict:
            if not isinstance(value, dict):
                raise _wrong_type(hint, value, place, source)
            return
    _check_scalar(hint, value, place, source)


def _check_section(section: Any, value: Any, place: Place, source: Source, root: type) -> None:
    hints = get_type_hints(section)
    if not isinstance(value, dict):
        inside = f"{dotted(place)}.{next(iter(hints))}"
        raise source.error(
            place, f"{dotted(place)} is a section, not {describe_value(value)}; set its keys, such as {inside}=VALUE"
        )
    for key, item in value.items():
        if key not in hints:
            raise source.error((*place, key), unknown_key((*place, key), list(hints), _all_keys(root)))
        _check(hints[key], item, (*place, key), source, root)
    for f in dataclasses.fields(section):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if (required or f.default == "???") and f.name not in value:
            raise source.error(place, f"{dotted((*place, f.name))} is required: {describe_hint(hints[f.name])}")


def _check_scalar(hint: Any, value: Any, place: Place, source: Source) -> None:
    members = _members(hint)
    if isinstance(value, float) and not math.isfinite(value):
        raise source.error(place, f"{dotted(place)}: {value} is not finite; expected {describe_hint(hint)}")
    if isinstance(value, bool):
        # OmegaConf takes true for 1 in some places and refuses it in others.
        if bool not in members:
            raise _wrong_type(hint, value, place, source)
    elif bool in members and value is not None:
        raise _wrong_type(hint, value, place, source)
    elif isinstance(value, int | float) and str in members and not {int, float} & set(members):
        raise source.error(place, f'{dotted(place)} is text, {value} a number; put it in quotes: "{value}"')
    try:
        single = dataclasses.make_dataclass("Single", [("value", hint)])
        OmegaConf.merge(OmegaConf.structured(single), {"value": value})
    except (OmegaConfBaseException, TypeError, ValueError) as e:
        raise _wrong_type(hint, value, place, source) from e


def _wrong_type(hint: Any, value: Any, place: Place, source: Source) -> InputError:
    choices = [str(choice) for member in _members(hint) if get_origin(member) is Literal for choice in get_args(member)]
    meant = None
    if isinstance(value, str) and value:
        meant = nearest(value, choices) or next((choice for choice in choices if value.lower() in choice), None)
    hint_of = f"; did you mean {meant}?" if meant else ""
    return source.error(place, f"{dotted(place)}: expected {describe_hint(hint)}, got {describe_value(value)}{hint_of}")


def unknown_key(place: Place, siblings: Sequence[str], everywhere: Sequence[str] = ()) -> str:
    """The message for a key that does not exist: one of that name elsewhere, else the nearest right one beside it."""
    name = str(place[-1])
    elsewhere = [key for key in everywhere if key.rpartition(".")[2] in (name, OTHER_NAMES.get(name))]
    if elsewhere:
        return f"unknown key {dotted(place)}; did you mean {elsewhere[0]}?"
    close = nearest(name, siblings)
    if close:
        return f"unknown key {dotted(place)}; did you mean {dotted((*place[:-1], close))}?"
    known = f"{dotted(place[:-1])} has" if len(place) > 1 else "known keys are"
    return f"unknown key {dotted(place)}; {known} {', '.join(sorted(siblings))}"


def _all_keys(schema: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass, sections inside sections included."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        keys.append(prefix + name)
        for member in _members(hint):
            if dataclasses.is_dataclass(member):
                keys += _all_keys(member, f"{prefix}{name}.")
    return keys


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def describe_hint(hint: Any) -> str:
    """A field's type in words."""
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    parts = []
    for member in _members(hint):
        origin, arguments = get_origin(member), get_args(member)
        if member in words:
            parts.append(words[member])
        elif origin is Literal:
            shown = ", ".join(map(str, arguments))
            alone = len(_members(hint)) == 1  # the quotes tell that 'text' is a value, not a kind of value
            parts.append(f"one of {shown}" if len(arguments) > 1 else f"only {arguments[0]!r}" if alone else shown)
        elif origin is tuple and ... not in arguments:
            parts.append(f"a list of {len(arguments)} values")
        elif origin in (list, tuple):
            parts.append("a list")
        else:
            parts.append("a section of its own")
    return " or ".join(parts)


def _excerpt(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def describe_value(value: Any) -> str:
    """A value and its kind in words, for an error."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return f"the list {value}"
    return f"the {'text' if isinstance(value, str) else 'number'} {value!r}"
