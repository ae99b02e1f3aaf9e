"""What messages quote: printable, short, with its length."""

import pathlib

import numpy as np
import pytest

from hybrimoe_jax.__main__ import command_main
from hybrimoe_jax.decide.watch import Watch
from hybrimoe_jax.errors import RuleError, UserError, printable, shown, shown_name
from hybrimoe_jax.formats.layout import check_format
from hybrimoe_jax.formats.sizes import expert_bytes
from hybrimoe_jax.host_kernels import get_kernel
from hybrimoe_jax.machine.paced import parse_device
from hybrimoe_jax.machine.shapes import get_shape
from hybrimoe_jax.trace.export import export_trace

nested: list = []
for _ in range(100_000):
    nested = [nested]


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("silu", "'silu'"),
        (np.str_("silu"), "'silu'"),
        (2.5, "2.5"),
        (None, "None"),
        ([1, "a"], "[1, 'a']"),
        (pathlib.Path("a/b"), "'a/b'"),
        ("\x1b[2Jé\udce9\u202e\n", r"'\x1b[2Jé\udce9\u202e\n'"),
        ("x" * 1_000_000, f"'{'x' * 100}'... (1,000,000 characters)"),
        (b"\0" * 200, "b'" + r"\x00" * 100 + "'... (200 bytes)"),
        (10**5000, "an integer of 16,610 bits"),
        (list(range(1000)), "[0, 1, 2, 3, 4, 5, ...] (1,000 items)"),
        ({"a": "x" * 300}, "{'a': '" + "x" * 100 + "'... (300 characters)}"),
        (nested, "[[[[...]]]]"),
    ],
    ids=lambda value: "",
)
def test_a_quoted_value_is_printable_and_short(value, text):
    assert shown(value) == text


@pytest.mark.parametrize(
    "call",
    [
        get_shape,
        get_kernel,
        check_format,
        lambda text: expert_bytes(8, 8, text),
        parse_device,
        lambda text: parse_device(f"paced:a6000-paper:{text}"),
        lambda text: export_trace(None, "nowhere", text),
        lambda text: Watch("cache", object.__new__(Unprintable)).number("value", text),
        lambda text: command_main("generate")(["--prompt-ids", text]),
    ],
    ids=lambda call: call.__name__,
)
def test_a_value_of_a_megabyte_is_quoted_short_whoever_refuses_it(call):
    with pytest.raises((UserError, RuleError), match=r"'x{100}'?\.\.\. \(1,000,000 characters\)"):
        call("x" * 1_000_000)


def test_a_value_without_a_repr_is_shown():
    assert "Unprintable" in shown(Unprintable())


def test_a_name_is_quoted_only_where_it_must_be():
    assert shown_name("model.layers.0.mlp.gate.weight") == "model.layers.0.mlp.gate.weight"
    assert shown_name("a\x1b]0;b\x07") == r"'a\x1b]0;b\x07'"
    assert shown_name("") == "''" and shown_name(3) == "3"


def test_an_error_is_one_line():
    assert str(UserError("a\nb.json: no such file")) == "a b.json: no such file"


def test_what_an_error_says_is_printable_and_bounded():
    assert str(UserError("a\x1bb\nc")) == "a\\x1bb c"
    message = str(UserError("t.json: a key is '" + "x" * 10_000_000 + "'; save it again"))
    assert len(message) < 2000 and message.startswith("t.json: a key") and message.endswith("; save it again")
    assert str(RuleError("own", "victims", "gave \x1b", 3)) == "own, layer 3: victims gave \\x1b"
    assert printable("naïve 日本 🙂\t\0") == "naïve 日本 🙂\\t\\x00"
