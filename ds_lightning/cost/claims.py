"""Published claims of what a training cost, as data: every line with its source and the lines it should follow from.

A part of a line is the name of another line, a number, or a small operation on parts; nothing is evaluated as code.
"""

from __future__ import annotations

import datetime
import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ds_lightning.cost.figures import is_other_money, read_figure

CLAIMS_DIR = Path(__file__).resolve().parents[1] / "configs" / "claims"

OPERATIONS = ("sum", "difference", "product", "quotient")
READ = ("primary", "transcription", "unverified")
"""How a source was read: itself; in a copy by others; not at all, so that the figure is from memory or hearsay."""

SPEEDS = ("tokens_per_second_per_device", "tflops_per_device", "device_seconds_per_sample")
MAX_DEPTH = 10
"""Operations within operations; an alias of YAML that contains itself has no end."""

_CLAIM_KEYS = ("claim", "sources", "lines"), ("excluded", "implied", "totals", "measured")
_LINE_KEYS = ("name", "published", "unit", "source", "at"), ("follows_from", "rounded_to", "date", "note")
_EXCLUDED_KEYS = ("name", "unit", "basis"), ("follows_from", "source", "at")
_MEASURED_KEYS = ("system", "device", "source", "at"), ("note", "own", *SPEEDS)
_TOTALS = ("device_hours", "usd")
_IMPLIED_PARTS = (
    "device_hours",
    "tokens",
    "usd_per_device_hour",
    "flops_per_token",
    "num_devices",
    "samples",
    "sample_device_hours",
)
_IMPLIED_KEYS = ("device",), (*_IMPLIED_PARTS, "model", "seq_len")


@dataclass(frozen=True)
class Operation:
    """Arithmetic on parts, from left to right."""

    kind: str
    """One of ``OPERATIONS``."""
    parts: tuple[Part, ...]


Part = str | int | float | Operation
"""The name of a line, a number, or an operation."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure of a claim, or one cost that the claim leaves out."""

    name: str
    unit: str
    published: str | Operation | None
    """The figure as printed; or published lines that together are the figure; none: left out by the claim."""
    follows_from: Operation | None
    """What it should equal; none: it is an input, or nothing can be said of a cost that is left out."""
    source: str
    """Key of the source."""
    at: str
    """Table, section or page."""
    rounded_to: float | None = None
    date: str = ""
    """Day of a price."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What somebody else measured of the same work."""

    system: str
    device: str
    kind: str
    """One of ``SPEEDS``."""
    value: Part
    source: str
    at: str
    note: str = ""
    own: bool = False
    """Measured by those who make the claim: shown, but no part of the verdict."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim file, checked: every name that it uses exists, and no line follows from itself."""

    path: Path
    statement: str
    """The claim in one sentence."""
    sources: dict[str, dict[str, str]]
    """Title and way of reading of each source."""
    lines: tuple[Line, ...]
    excluded: tuple[Line, ...]
    totals: dict[str, Part]
    """The ``device_hours`` and the ``usd`` of the whole claim."""
    implied: dict[str, Any]
    """Device, model and the parts that speeds are computed from."""
    measured: tuple[Measurement, ...]


def claim_path(name_or_file: str | Path) -> Path:
    """Return the file of a claim that ships with the package, or the user's own.

    Raises:
        ValueError: If it is neither the name of a shipped claim nor, by its suffix, a YAML file.
    """
    name = str(name_or_file)
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = sorted(path.stem for path in CLAIMS_DIR.glob("*.yaml"))
    if name.lower() in known:
        return CLAIMS_DIR / f"{name.lower()}.yaml"
    raise ValueError(
        f"no claim {name!r}{_meant(name.lower(), known)}. There are {', '.join(known)}, or give a .yaml file"
    )


def read_claim(name_or_file: str | Path) -> Claim:
    """Read and check a claim.

    Args:
        name_or_file: Name of a shipped claim (``deepseek-r1``), or a YAML file of the user's own.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no claim; one line that names the file, the line and what is wrong.
    """
    path = claim_path(name_or_file)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        claim = _claim(path, content)
        _check_names(claim)
        _check_cycles(claim)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return claim


def _claim(path: Path, content: object) -> Claim:
    values = _mapping("the file", content, *_CLAIM_KEYS)
    sources = {}
    for key, source in _any_mapping("sources", values["sources"]).items():
        where = f"source {key!r}"
        source = _mapping(where, source, ("title", "read"), ())
        if source["read"] not in READ:
            raise ValueError(f"{where}: read is {source['read']!r}, expected one of {', '.join(READ)}")
        sources[key] = {"title": _text(where, source, "title"), "read": source["read"]}
    totals = _mapping("totals", values.get("totals", {}), (), _TOTALS)
    implied = values.get("implied")
    if implied is not None:
        implied = _mapping("implied", implied, *_IMPLIED_KEYS)
        for key in implied.keys() & _IMPLIED_PARTS:
            implied[key] = _part(f"implied: {key}", implied[key])
        for key in implied.keys() & {"device", "model"}:
            _text("implied", implied, key)
        _check_implied(implied)
    return Claim(
        path=path,
        statement=_text("the file", values, "claim"),
        sources=sources,
        lines=tuple(_line(entry, number) for number, entry in _entries("lines", values["lines"])),
        excluded=tuple(_excluded(entry, number) for number, entry in _entries("excluded", values.get("excluded", []))),
        totals={key: _part(f"totals: {key}", part) for key, part in totals.items()},
        implied=implied or {},
        measured=tuple(_measured(entry, number) for number, entry in _entries("measured", values.get("measured", []))),
    )


def _optional(where: str, values: dict[str, Any], key: str) -> str:
    return _text(where, values, key) if key in values else ""


def _line(entry: object, number: int) -> Line:
    where = _where("lines", number, entry)
    values = _mapping(where, entry, *_LINE_KEYS)
    published, rounded_to = values["published"], values.get("rounded_to")
    wrong_type = isinstance(rounded_to, bool) or not isinstance(rounded_to, int | float)
    if rounded_to is not None and (wrong_type or not rounded_to >= 0):
        raise ValueError(f"{where}: rounded_to is {rounded_to!r}, expected a step of at least 0 (0: an exact figure)")
    if isinstance(published, dict):
        published = _operation(f"{where}: published", published)
    else:
        try:
            read_figure(_text(where, values, "published"), rounded_to)
        except ValueError as error:
            raise ValueError(f"{where}: published {error}") from None
    unit = _unit(where, values)
    date = str(values.get("date", ""))
    if unit.startswith("USD/") and unit.endswith("hour"):
        _check_date(where, date)
    return Line(
        name=_text(where, values, "name"),
        unit=unit,
        published=published,
        follows_from=_operation(f"{where}: follows_from", values["follows_from"]) if "follows_from" in values else None,
        source=_text(where, values, "source"),
        at=_text(where, values, "at"),
        rounded_to=rounded_to,
        date=date,
        note=_optional(where, values, "note"),
    )


def _excluded(entry: object, number: int) -> Line:
    where = _where("excluded", number, entry)
    values = _mapping(where, entry, *_EXCLUDED_KEYS)
    return Line(
        name=_text(where, values, "name"),
        unit=_unit(where, values),
        published=None,
        follows_from=_operation(f"{where}: follows_from", values["follows_from"]) if "follows_from" in values else None,
        source=_optional(where, values, "source"),
        at=_optional(where, values, "at"),
        note=_text(where, values, "basis"),
    )


def _measured(entry: object, number: int) -> Measurement:
    where = _where("measured", number, entry)
    values = _mapping(where, entry, *_MEASURED_KEYS)
    kinds = [kind for kind in SPEEDS if kind in values]
    if len(kinds) != 1:
        raise ValueError(f"{where} has {', '.join(kinds) or 'no speed'}, expected exactly one of {', '.join(SPEEDS)}")
    if not isinstance(values.get("own", False), bool):
        raise ValueError(f"{where}: own is {values['own']!r}, expected true or false")
    return Measurement(
        system=_text(where, values, "system"),
        device=_text(where, values, "device"),
        kind=kinds[0],
        value=_part(f"{where}: {kinds[0]}", values[kinds[0]]),
        source=_text(where, values, "source"),
        at=_text(where, values, "at"),
        note=_optional(where, values, "note"),
        own=values.get("own", False),
    )


def _check_implied(implied: dict[str, Any]) -> None:
    if ("tokens" in implied) != ("device_hours" in implied):
        raise ValueError("implied has only one of tokens and device_hours, expected both or neither")
    if ("samples" in implied) != ("sample_device_hours" in implied):
        raise ValueError("implied has only one of samples and sample_device_hours, expected both or neither")
    if "model" in implied and "flops_per_token" in implied:
        raise ValueError("implied has model and flops_per_token, expected one of them")
    seq_len = implied.get("seq_len")
    if ("model" in implied) != ("seq_len" in implied):
        raise ValueError("implied has only one of model and seq_len, expected both or neither")
    if seq_len is not None and (isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 1):
        raise ValueError(f"implied: seq_len is {seq_len!r}, expected an integer of at least 1")


def _part(where: str, value: object, depth: int = 0) -> Part:
    if isinstance(value, dict):
        return _operation(where, value, depth)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where} has the part {value!r}, expected the name of a line, a number or an operation")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} has the part {value}, expected a finite number")
    return value


def _operation(where: str, value: object, depth: int = 0) -> Operation:
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in OPERATIONS:
        found = ", ".join(map(str, value)) if isinstance(value, dict) else repr(value)
        raise ValueError(f"{where} is {found}, expected one of {', '.join(OPERATIONS)} with a list of parts")
    ((kind, parts),) = value.items()
    if depth == MAX_DEPTH:
        raise ValueError(f"{where}: operations are nested deeper than {MAX_DEPTH}, expected a line for some of them")
    if not isinstance(parts, list) or len(parts) < 2:
        raise ValueError(f"{where}: {kind} is {parts!r}, expected a list of at least two parts")
    inner = where if depth else f"{where}: {kind}"
    return Operation(kind, tuple(_part(inner, part, depth + 1) for part in parts))


def _check_names(claim: Claim) -> None:
    """See that every name of a line or a source means something."""
    names: list[str] = []
    for line in (*claim.lines, *claim.excluded):
        if line.name in names:
            raise ValueError(f"two lines are called {line.name!r}, expected a name of its own for each")
        names.append(line.name)
    known = [line.name for line in claim.lines]
    users: list[tuple[str, Part | None]] = []
    for line in (*claim.lines, *claim.excluded):
        published = line.published if isinstance(line.published, Operation) else None
        users += [(f"line {line.name!r}", line.follows_from), (f"line {line.name!r}", published)]
    users += [(f"implied: {key}", claim.implied[key]) for key in claim.implied if key in _IMPLIED_PARTS]
    users += [(f"totals: {key}", part) for key, part in claim.totals.items()]
    users += [(f"measured: {entry.system!r}", entry.value) for entry in claim.measured]
    for user, part in users:
        for name in _names(part):
            if name not in known:
                raise ValueError(f"{user} refers to {name!r}, which is no line of this claim{_meant(name, known)}")
    cited = [(f"line {line.name!r}", line.source) for line in (*claim.lines, *claim.excluded) if line.source]
    for user, source in [*cited, *((f"measured: {entry.system!r}", entry.source) for entry in claim.measured)]:
        if source not in claim.sources:
            raise ValueError(
                f"{user} has the source {source!r}, which is not under sources{_meant(source, claim.sources)}"
            )


def _check_cycles(claim: Claim) -> None:
    """See that no line follows from itself, directly or through others."""
    needs = {line.name: [*_names(line.follows_from), *_names(line.published, text=False)] for line in claim.lines}
    done: set[str] = set()
    for start in needs:
        trail = [start]
        ahead = [iter(needs[start])]
        while ahead:
            name = next(ahead[-1], None)
            if name is None:
                ahead.pop()
                done.add(trail.pop())
            elif name in trail:
                raise ValueError(f"a line follows from itself: {' -> '.join([*trail[trail.index(name) :], name])}")
            elif name not in done:
                trail.append(name)
                ahead.append(iter(needs[name]))


def _names(part: Part | None, *, text: bool = True) -> Iterator[str]:
    """Yield the names of lines in a part; ``text`` false: a bare text is a printed figure and no name."""
    if isinstance(part, Operation):
        for inner in part.parts:
            yield from _names(inner)
    elif isinstance(part, str) and text:
        yield part


def _any_mapping(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where} is {type(value).__name__}, expected a mapping of names")
    return dict(value)


def _mapping(where: str, value: object, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    values = _any_mapping(where, value)
    for key in values:
        if key not in (*required, *optional):
            near = _meant(key, (*required, *optional))
            raise ValueError(f"{where} has the unknown key {key!r}{near}; expected {', '.join((*required, *optional))}")
    for key in required:
        if key not in values:
            raise ValueError(f"{where} lacks the key {key!r}")
    return values


def _entries(where: str, value: object) -> list[tuple[int, object]]:
    if isinstance(value, list):
        return list(enumerate(value, start=1))
    raise ValueError(f"{where} is {type(value).__name__}, expected a list")


def _where(key: str, number: int, entry: object) -> str:
    name = (entry.get("name") or entry.get("system")) if isinstance(entry, dict) else None
    return f"line {name!r}" if isinstance(name, str) and key == "lines" else f"entry {number} of {key}"


def _text(where: str, values: dict[str, Any], key: str) -> str:
    value = values[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {key} is {value!r}, expected a text (in quotes if it looks like a number)")
    return value.strip()


def _unit(where: str, values: dict[str, Any]) -> str:
    unit = _text(where, values, "unit")
    if is_other_money(unit):
        raise ValueError(f"{where}: unit is {unit!r}, expected US dollars (USD): convert it at a dated rate")
    return unit


def _check_date(where: str, date: str) -> None:
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        found = repr(date) if date else "missing"
        raise ValueError(f"{where} is a price and its date is {found}, expected date: YYYY-MM-DD") from None


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known))
    return f" (did you mean {' or '.join(near)}?)" if near else ""
