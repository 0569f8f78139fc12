"""YAML with the file and line of every value.

The tree is plain data (dicts, lists, scalars); a side table maps the path of each value
(``("gptq", "variants", 1, "bits")``) to its :class:`Place`, so that a later error, such as one of the schema,
can still name the line that caused it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quantize.errors import MOST_SHOWN, RecipeError, shortened

Key = str | int
KeyPath = tuple[Key, ...]

MAX_RECIPE_BYTES = 100_000
MAX_NODES = 10_000  # aliases can expand a small file; a real recipe has a few hundred
MAX_DEPTH = 16  # a real recipe has five levels
MAX_BITS = 64  # of an integer; Python refuses to print much larger ones
SHOWN = 120  # characters of an override shown in a message


@dataclass(frozen=True)
class Place:
    """Where a value was written: a file and a 1-based line, or the command line (``line`` None)."""

    origin: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.origin}:{self.line}" if self.line else self.origin


@dataclass
class Located:
    """A tree of plain data with the :class:`Place` of each of its values."""

    data: Any
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def place(self, path: Iterable[Key]) -> Place:
        """The place of the value at ``path``, or of its nearest enclosing value that has one."""
        keys = tuple(path)
        while keys and keys not in self.places:
            keys = keys[:-1]
        return self.places.get(keys, Place("recipe"))

    def error(self, path: Iterable[Key], message: str) -> RecipeError:
        """A :class:`RecipeError` whose message opens with the place and the key of ``path``."""
        keys = tuple(path)
        label = dotted(keys)
        return RecipeError(f"{self.place(keys)}: {label + ': ' if label else ''}{message}")


def dotted(path: Iterable[Key]) -> str:
    """Format ``("gptq", "variants", 1, "bits")`` as ``gptq.variants[1].bits``."""
    text = ""
    for key in path:
        name = f"[{key}]" if isinstance(key, int) else shortened(key, MOST_SHOWN)
        text += f".{name}" if text and isinstance(key, str) else name
    return text


def read_located(path: Path, shown: str | None = None) -> Located:
    """Parse a YAML file into a :class:`Located` tree whose top level is a mapping.

    Raises:
        RecipeError: the file cannot be read, is not UTF-8 or not YAML, repeats a key, or is not a mapping.
    """
    origin = shown or str(path)
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"{origin}: is larger than {MAX_RECIPE_BYTES:,} bytes, which no recipe is")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{origin}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{origin}: is not UTF-8 text (byte {error.start})") from None
    return parse_located(text, origin)


def parse_located(text: str, origin: str) -> Located:
    """Parse YAML text; ``origin`` is its name in messages. Raises the errors of :func:`read_located`."""
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{origin}:{number}: is not valid YAML: it contains the character {error.character:#x}"
        ) from None
    try:
        node = loader.get_single_node()
        tree = Located(None)
        if node is None:
            tree.data = {}
            tree.places[()] = Place(origin, 1)
            return tree
        tree.data = _Reader(loader, origin, tree.places).read(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{origin}{line}: is not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{origin}: is nested too deeply to be a recipe") from None
    finally:
        loader.dispose()
    if not isinstance(tree.data, dict):
        raise RecipeError(f"{origin}:1: a recipe is a mapping of keys to values, not a {_kind(tree.data)}")
    return tree


class _Reader:
    def __init__(self, loader: yaml.SafeLoader, origin: str, places: dict[KeyPath, Place]) -> None:
        self.loader, self.origin, self.places = loader, origin, places
        self.open: set[int] = set()

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        place = Place(self.origin, node.start_mark.line + 1)
        self.places.setdefault(path, place)
        if len(self.places) > MAX_NODES:
            raise RecipeError(f"{place}: expands to more than {MAX_NODES:,} values, which no recipe does")
        if id(node) in self.open:
            raise RecipeError(f"{place}: an alias refers to itself")
        if len(path) > MAX_DEPTH:
            raise RecipeError(f"{place}: is nested too deeply to be a recipe")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
            return self._scalar(node, place)
        finally:
            self.open.discard(id(node))

    def _scalar(self, node: yaml.Node, place: Place) -> Any:
        try:
            value = self.loader.construct_object(node)
        except ValueError as error:
            raise RecipeError(f"{place}: is not a valid value: {error}") from None
        except (LookupError, AttributeError, ArithmeticError):  # an explicit tag that does not fit the value
            raise RecipeError(f"{place}: is not a valid value for its tag {node.tag.rpartition(':')[2]}") from None
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise RecipeError(f"{place}: is not a valid value: it is a number of more than {MAX_BITS} bits")
        return _text(value, place) if isinstance(value, str) else value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = Place(self.origin, key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{place}: a key must be a plain word")
            key = _text(key_node.value, place)
            if key in result:
                raise RecipeError(f"{place}: {dotted((*path, key))}: is given twice; keep one of the two")
            self.places[(*path, key)] = place
            result[key] = self.read(value_node, (*path, key))
        return result


def merge(base: Located, over: Located) -> Located:
    """Merge ``over`` into ``base``: mappings merge key by key, anything else (lists too) is replaced."""
    places: dict[KeyPath, Place] = {(): over.places.get((), Place("recipe"))}

    def taken(tree: Located, value: Any, path: KeyPath) -> Any:
        if path in tree.places:
            places[path] = tree.places[path]
        for key, child in value.items() if isinstance(value, dict) else enumerate(_items(value)):
            taken(tree, child, (*path, key))
        return value

    def lay(low: Any, high: Any, path: KeyPath) -> Any:
        if not (isinstance(low, dict) and isinstance(high, dict)):
            return taken(over, high, path)
        if path in over.places:
            places[path] = over.places[path]
        result = {}
        for key in [*low, *(k for k in high if k not in low)]:
            child = (*path, key)
            if key not in high:
                result[key] = taken(base, low[key], child)
            elif key not in low:
                result[key] = taken(over, high[key], child)
            else:
                result[key] = lay(low[key], high[key], child)
        return result

    return Located(lay(base.data, over.data, ()), places)


def set_value(tree: Located, assignment: str) -> None:
    """Apply one ``--set key.path=value`` to ``tree`` in place; the value is read as YAML.

    Raises:
        RecipeError: no ``=``, a list index that does not exist, or a value that is not YAML.
    """
    origin = f"--set {assignment if len(assignment) <= SHOWN else assignment[:SHOWN] + '…'}"
    name, equals, text = assignment.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"{origin}: must have the form key.path=value, such as gptq.damp_percent=0.01")
    if len(parts) > MAX_DEPTH:
        raise RecipeError(f"{origin}: is nested too deeply to be a recipe")
    value = parse_located(f"value: {text}", origin).data["value"]
    here: Any = tree.data
    path: KeyPath = ()
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        key: Key
        if isinstance(here, list):
            if part not in map(str, range(len(here))):
                raise RecipeError(f"{origin}: {dotted(path)} has entries 0 to {len(here) - 1}, not '{part[:SHOWN]}'")
            key = int(part)
        elif isinstance(here, dict):
            key = part
            if not last and not isinstance(here.get(part), dict | list):
                here[part] = {}
                tree.places[*path, part] = Place(origin)
        else:
            raise RecipeError(f"{origin}: {dotted(path)} is a plain value and has no '{part}'")
        path = (*path, key)
        if last:
            here[key] = value
        else:
            here = here[key]
    for known in [known for known in tree.places if known[: len(path)] == path]:
        del tree.places[known]
    tree.places[path] = Place(origin)


def _text(value: str, place: Place) -> str:
    """Return the text, unless it contains a lone surrogate (``"\\ud800"``), which files and names cannot contain."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RecipeError(f"{place}: is not a valid value: it contains half of a character (a lone surrogate)")
    return value


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _kind(value: Any) -> str:
    return {list: "list", str: "text", type(None): "empty value"}.get(type(value), type(value).__name__)
