"""Constraints of settings: declared once, in a dataclass's annotations, checked by msgspec, reported in one grammar.

>>> import dataclasses
>>> from typing import Annotated
>>> from msgspec import Meta
>>> @dataclasses.dataclass(frozen=True)
... class Batch:
...     rows: Positive
...     keep: Annotated[float, Meta(gt=0, le=1)] = 1.0
...
...     def __post_init__(self) -> None:
...         validate(self)
>>> Batch(rows=4).rows
4
>>> Batch(rows=0, keep="all")
Traceback (most recent call last):
  ...
glm4v_jax.errors.ConfigError: rows: found 0; expected an integer of at least 1; keep: found 'all'; expected a number above 0 and at most 1
>>> from_mapping(Batch, {"rows": 4, "keeep": 0.5})
Traceback (most recent call last):
  ...
glm4v_jax.errors.ConfigError: keeep: found an unknown field; expected some of rows, keep; did you mean 'keep'?
"""  # noqa: E501

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from glm4v_jax.errors import ConfigError, Glm4vError

T = TypeVar("T")

Size = Annotated[int, Meta(ge=1, lt=2**31)]
"""A dimension; they are counted in int32."""
Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=0, lt=2**32)]
"""Of a JAX key."""
PositiveNumber = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
AnyNumber = Annotated[float, Meta(extra={"finite": False})]
"""Infinities and NaN are refused in every other float."""
CacheDtype = Literal["auto", "int8"]
"""Keys and values in the cache: in the compute dtype, or as 8-bit integers with a scale per slot and head."""


def fault(name: str, found: Any, expected: str) -> str:
    """One fault, as every error of this package words it."""
    return f"{name}: found {found!r}; expected {expected}"


def did_you_mean(found: object, known: Iterable[object]) -> str:
    """What an error adds to its list of names where one of them is like what was found; empty otherwise.

    >>> did_you_mean("grdient", ["gradient", "loss"]), did_you_mean("x", ["gradient", "loss"])
    ("; did you mean 'gradient'?", '')
    >>> did_you_mean("stop", ["top_p", "stop_strings"])
    "; did you mean 'stop_strings'?"
    """
    names = [str(name) for name in known]
    # The beginning of a name is nearer to it than what difflib finds.
    begun = [name for name in names if len(str(found)) > 2 and name.startswith(f"{found}_")]
    close = begun or difflib.get_close_matches(str(found), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_of(known: Iterable[str], found: object = "") -> str:
    """What a fault expects where there are names to choose from: all of them, and the one that is like `found`."""
    names = list(known)
    return f"one of {', '.join(names)}{did_you_mean(found, names)}"


def refuse_unknown(where: str, given: Iterable[str], known: Collection[str]) -> None:
    """Refuse keywords that are not known, as Python does, with the one that is meant.

    >>> refuse_unknown("from_pretrained", ["dtpye"], ["dtype", "mesh"])
    Traceback (most recent call last):
      ...
    TypeError: from_pretrained: found an unknown 'dtpye'; expected some of dtype, mesh; did you mean 'dtype'?

    Raises:
      TypeError: there is one.
    """
    if (first := next((name for name in given if name not in known), None)) is not None:
        names = sorted(known)
        raise TypeError(
            f"{where}: found an unknown {first!r}; expected some of {', '.join(names)}{did_you_mean(first, names)}"
        )


def raise_faults(
    faults: typing.Sequence[str],
    error: type[Glm4vError] = ConfigError,
    *,
    where: str = "",
    shown: int | None = None,
) -> None:
    """Raise an error that lists all faults, if there are any; `where` goes before them, with a colon.

    >>> raise_faults(["a: found 1; expected 2", "b: found 3; expected 4", "c: found 5; expected 6"], shown=1)
    Traceback (most recent call last):
      ...
    glm4v_jax.errors.ConfigError: a: found 1; expected 2; and 2 more

    Args:
      faults: what is wrong, one by one.
      error: what to raise.
      where: names the place.
      shown: how many the message lists; `faults` of the error has all.
    """
    if faults:
        more = [f"and {len(faults) - shown:,} more"] if shown is not None and len(faults) > shown else []
        line = "; ".join([*faults[:shown], *more]).replace("\n", " ")
        raise error(f"{where}: {line}" if where else line, faults)


def validate(instance: Any, error: type[Glm4vError] = ConfigError, prefix: str = "") -> None:
    """Check the fields of a dataclass against their annotations, and keep them as these say (lists as tuples).

    To be called first in `__post_init__`, frozen or not; fields that are dataclasses have checked themselves. Raises
    `error`, for all fields that do not fit, whose names `prefix` goes before.
    """
    cls: Any = type(instance)
    faults, defaults = [], _valid_defaults(cls)
    for name, hint in hints(cls).items():
        value = getattr(instance, name)
        if name in defaults and value is defaults[name]:
            continue  # most fields of most requests
        if dataclasses.is_dataclass(value) and isinstance(value, dataclasses_in(hint)):
            continue
        try:
            object.__setattr__(instance, name, convert(value, hint))
        except ValueError:
            faults.append(fault(f"{prefix}{name}", value, expectation(hint, value)))
    raise_faults(faults, error)


@functools.cache
def _valid_defaults(cls: type) -> dict[str, Any]:
    """Field -> its default, where that fits as it is."""
    found = {}
    for field in dataclasses.fields(cls):
        with contextlib.suppress(ValueError, TypeError):  # of a union with a dataclass, which msgspec does not take
            if type(field.default) in _PLAIN and convert(field.default, hints(cls)[field.name]) is field.default:
                found[field.name] = field.default
    return found


def from_mapping(
    cls: type[T], content: Any, error: type[Glm4vError] = ConfigError, *, where: str = "", ignore_unknown: bool = False
) -> T:
    """Make a dataclass, and those in its fields, from what a JSON or TOML file holds.

    Args:
      cls: the dataclass; it checks itself, see `validate`.
      content: an object of the file.
      error: what to raise.
      where: the name of the object in the file, with a dot after it; empty for the file's own.
      ignore_unknown: pass over keys that are not fields.

    Raises:
      error: all keys that are unknown, missing or do not fit.
    """
    if not isinstance(content, Mapping):
        raise_faults([fault(where.rstrip(".") or "content", content, "an object")], error)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    faults = []
    if not ignore_unknown:
        faults = [_unknown(f"{where}{key}", key, list(fields)) for key in content if key not in fields]
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in content:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                faults.append(f"{where}{name}: found nothing; expected {expectation(hints(cls)[name])}")
            continue
        value, nested = content[name], dataclasses_in(hints(cls)[name])
        if nested and isinstance(value, Mapping):
            try:
                value = from_mapping(nested[0], value, error, where=f"{name}.", ignore_unknown=ignore_unknown)
            except Glm4vError as problem:
                faults += [f"{where}{line}" for line in problem.faults]
                continue
        elif (entry := entry_in(hints(cls)[name])) and isinstance(value, Mapping):
            entries: dict[str, Any] = {}
            for key, item in value.items():
                try:
                    entries[key] = from_mapping(
                        entry, item, error, where=f"{name}.{key}.", ignore_unknown=ignore_unknown
                    )
                except Glm4vError as problem:
                    faults += [f"{where}{line}" for line in problem.faults]
            value = entries
        values[name] = value
    if faults:
        # What else is wrong shows only in the fields by themselves: the instance cannot be made.
        for name, value in values.items():
            hint = hints(cls)[name]
            if not fits(value, hint):
                faults.append(fault(f"{where}{name}", value, expectation(hint, value)))
        raise_faults(faults, error)
    try:
        return cls(**values)
    except Glm4vError as problem:
        raise_faults([f"{where}{line}" for line in problem.faults], error)
        raise


def _unknown(name: str, key: Any, fields: list[str]) -> str:
    return f"{name}: found an unknown field; expected some of {', '.join(fields)}{did_you_mean(key, fields)}"


def known_fields(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """What of an object are fields of a dataclass."""
    names = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in data.items() if k in names}


def object_of(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object in a field, an empty one where the field is absent or null.

    Raises:
      ConfigError: something else is there.
    """
    value = data.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(fault(name, value, "an object"))
    return value


_PLAIN = (int, str, bool, type(None))


def convert(value: Any, hint: Any) -> Any:
    """A value as an annotation has it: NumPy scalars as Python's, lists as tuples, integers as floats; never a bool.

    Raises:
      ValueError: it does not fit.
    """
    if type(value) not in _PLAIN and callable(tolist := getattr(value, "tolist", None)):
        value = tolist()  # of NumPy, which help does not wait for
    converted = msgspec.convert(value, hint)
    if type(converted) in _PLAIN:  # nearly all values: every request makes a few of these
        return converted
    if not all(map(math.isfinite, _floats(converted))) and not _allows_infinity(hint):
        raise ValueError("not finite")
    return converted


def checked(name: str, value: Any, hint: Any, error: type[Glm4vError] = ConfigError) -> Any:
    """A single value as an annotation has it; see `convert`.

    Raises:
      error: it does not fit.
    """
    try:
        return convert(value, hint)
    except ValueError as problem:
        raise error(fault(name, value, expectation(hint, value))) from problem


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is as an annotation has it; see `convert`.

    >>> fits(1, float), fits(True, float), fits(math.nan, float)
    (True, False, False)
    """
    if dataclasses.is_dataclass(value):
        return True
    try:
        convert(value, hint)
    except ValueError:
        return False
    return True


def hints(cls: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields."""
    return _hints(cls)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    found = typing.get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def expectation(hint: Any, found: Any = None) -> str:
    """An annotation in words: "an integer of at least 1"; a `Meta` with a description says it itself.

    Args:
      hint: the annotation.
      found: what does not fit; the name of a choice that it is like is added.
    """
    near = did_you_mean(found, _choices(hint)) if isinstance(found, str) else ""
    return f"{_expectation(hint)}{near}"


def _choices(hint: Any) -> list[str]:
    """The texts that an annotation allows; those of a `Meta` are its extra "choices"."""
    base, meta = _bare(hint)
    found = [choice for item in meta for choice in (item.extra or {}).get("choices", ())]
    if typing.get_origin(base) is typing.Literal:
        found += [choice for choice in typing.get_args(base) if isinstance(choice, str)]
    return found + [choice for part in _union(base) for choice in _choices(part)]


def _expectation(hint: Any) -> str:
    base, meta = _bare(hint)
    described = [item.description for item in meta if item.description]
    if described:
        return described[-1]
    if choices := _union(base):
        return " or ".join(dict.fromkeys(map(_expectation, choices)))
    origin, arguments = typing.get_origin(base), typing.get_args(base)
    if origin is typing.Literal:
        return f"{'one of ' if len(arguments) > 1 else ''}{', '.join(map(repr, arguments))}"
    if origin is tuple and arguments:
        count = "a list of" if arguments[-1] is Ellipsis else f"{len(arguments)}"
        of, limits = _bare(arguments[0])
        return f"{count} {_PLURALS.get(of, 'values')}{_range(of, limits)}"
    return _NAMES.get(base, "an object") + _range(base, meta)


_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null"}
_PLURALS = {int: "integers", float: "numbers", str: "strings"}


def _range(base: type, meta: list[Meta]) -> str:
    """The limits in words, after a space."""
    found = ((name, getattr(item, name)) for item in meta for name in ("ge", "gt", "le", "lt"))
    limits = {name: limit for name, limit in found if limit is not None}
    if base is int and "lt" in limits:
        limits["le"] = limits.pop("lt") - 1
    low = f" of at least {limits['ge']}" if "ge" in limits else f" above {limits['gt']:g}" if "gt" in limits else ""
    high = f" at most {limits['le']}" if "le" in limits else f" below {limits['lt']:g}" if "lt" in limits else ""
    if "ge" in limits and "le" in limits:
        return f" from {limits['ge']} to {limits['le']}"
    return f"{low} and{high}" if low and high else low or high


def _bare(hint: Any) -> tuple[Any, list[Meta]]:
    if typing.get_origin(hint) is Annotated:
        base, *meta = typing.get_args(hint)
        return base, [item for item in meta if isinstance(item, Meta)]
    return hint, []


def _union(hint: Any) -> tuple[Any, ...]:
    """The choices of a union, None left out: a file leaves such a field out, or says null."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return ()
    return tuple(choice for choice in typing.get_args(hint) if choice is not type(None))


def dataclasses_in(hint: Any) -> tuple[type, ...]:
    """The dataclasses that an annotation allows: X of X | None."""
    base, _ = _bare(hint)
    return tuple(choice for choice in _union(base) or (base,) if dataclasses.is_dataclass(choice))  # type: ignore[misc]


def entry_in(hint: Any) -> type | None:
    """The dataclass of the entries of a table: X of dict[str, X]."""
    base, _ = _bare(hint)
    is_table = typing.get_origin(base) is dict and dataclasses.is_dataclass(typing.get_args(base)[1])
    return typing.get_args(base)[1] if is_table else None


def _allows_infinity(hint: Any) -> bool:
    base, meta = _bare(hint)
    return any((item.extra or {}).get("finite") is False for item in meta) or any(map(_allows_infinity, _union(base)))


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _floats(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floats(item)
