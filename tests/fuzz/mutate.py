"""What files and arguments are mutated with: bytes, JSON and text, each mutation told in a few words.

Every function takes a `random.Random` first and gives the mutated thing and what was done to it, so that a seed alone
repeats a case.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

DEEP = "[" * 100_000 + "]" * 100_000
NUMBERS = (0, -1, 1, 2, 3, 0.5, -0.0, 1e308, -1e308, 1e-310, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**12, 10**40)
WORDS = (
    "",
    " ",
    "x",
    "5",
    "true",
    "\x1b[31mred",
    "\x00",
    "é",
    "\u202e",
    "\ud800",
    "a" * 100_000,
    "../../x",
    "/dev/full",
)
ODD: tuple[Any, ...] = (
    *NUMBERS,
    *WORDS,
    None,
    True,
    False,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [1],
    {"a": 1},
    [None] * 1000,
)
"""What stands where something else is wanted."""


def odd(rng: random.Random, there: Any = None) -> Any:
    """Something else than `there`: of another kind, or near it."""
    near = []
    if isinstance(there, (int, float)) and not isinstance(there, bool):
        near = [there + 1, there - 1, there * 2, -there, str(there), [there], float(there) + 0.5, there * 10**9]
    elif isinstance(there, str):
        near = [there + "x", there.upper(), there[:-1], [there], {"content": there}, there * 50]
    elif isinstance(there, list):
        near = [there[:-1], there * 2, there[::-1], [there], {str(i): v for i, v in enumerate(there)}]
    elif isinstance(there, dict):
        near = [list(there), {**there, "more": 1}, dict(list(there.items())[1:]), [there]]
    return copy.deepcopy(rng.choice(near if near and rng.random() < 0.5 else ODD))


def brief(value: Any) -> str:
    said = ascii(value)
    return said if len(said) <= 60 else f"{said[:50]} ... ({len(said)} characters)"


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of everything inside a JSON value, itself left out; of long lists, a few."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, inner) in enumerate(items):
        if number < 60:
            yield (*path, key)
            yield from places(inner, (*path, key))


def change_json(rng: random.Random, value: Any, keys: tuple[str, ...] = ()) -> tuple[Any, str]:
    """A JSON value with one place changed, dropped, renamed or added; `keys`: names that an object may be given."""
    value = copy.deepcopy(value)
    found = list(places(value))
    if not found or rng.random() < 0.03:
        return (other := odd(rng, value)), f"the whole is {brief(other)}"
    if keys and isinstance(value, dict) and rng.random() < 0.3:
        key = rng.choice(keys)
        value[key] = odd(rng, value.get(key))
        return value, f"{key} = {brief(value[key])}"
    *path, last = rng.choice(found)
    holder = value
    for part in path:
        holder = holder[part]
    where = "/".join(map(str, [*path, last]))
    what = rng.choice(("change",) * 6 + ("drop", "rename", "swap"))
    if what == "change":
        holder[last] = odd(rng, holder[last])
        return value, f"{where} = {brief(holder[last])}"
    if what == "swap":
        other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[last], holder[other] = holder[other], holder[last]
        return value, f"{where} and {other} swapped"
    taken = holder.pop(last)
    if what == "rename" and isinstance(holder, dict):
        name = rng.choice((f"{last}_", str(last).upper(), "", "\x1b[2J"))
        holder[name] = taken
        return value, f"{where} renamed {brief(name)}"
    return value, f"{where} dropped"


def json_text(rng: random.Random, value: Any) -> tuple[bytes, str]:
    """The text of a JSON value: mostly as it is, else spoilt as files are."""
    text = json.dumps(value)
    if rng.random() < 0.8:
        return text.encode("utf-8", "surrogatepass"), ""
    kinds = {
        "cut": text[: rng.randrange(len(text) + 1)],
        "with a mark": "\ufeff" + text,
        "in UTF-16": text,
        "twice": text + text,
        "ending in a comma": text[:-1] + ",}",
        "with a number of 5000 digits": text.replace("1", "1" * 5000, 1),
        "too deep": f'{{"x": {DEEP}, {text[1:]}' if text[:1] == "{" else DEEP,
        "with a key twice": f'{text[:-1]}, "model_type": "x"}}' if text[-1:] == "}" else text,
        "with unknown bytes": text,
    }
    how = rng.choice(list(kinds))
    raw = kinds[how].encode("utf-16" if how == "in UTF-16" else "utf-8", "surrogatepass")
    return raw + b"\xff\xfe" * (how == "with unknown bytes"), f"text {how}"


def change_bytes(rng: random.Random, data: bytes, most: int | None = None) -> tuple[bytes, str]:
    """Bytes with one thing done to them, at a place below `most`."""
    end = min(len(data), most or len(data))
    at = rng.randrange(end + 1)
    size = rng.choice((1, 2, 4, 8, 64))
    what = rng.choice(("flip", "cut", "drop", "insert", "repeat", "fill", "append", "empty"))
    if what == "flip" and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :], f"a bit of byte {at} flipped"
    filler = rng.choice((b"\0", b"\xff", b"\x7f")) * size
    made = {
        "flip": data[:-1],
        "cut": data[:at],
        "drop": data[:at] + data[at + size :],
        "insert": data[:at] + filler + data[at:],
        "repeat": data[: at + size] + data[at:],
        "fill": data[:at] + filler + data[at + size :],
        "append": data + filler,
        "empty": b"",
    }
    return made[what], f"{what} {size} at {at} of {len(data)} ({filler[:1].hex()})"
