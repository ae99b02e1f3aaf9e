"""Bytes of an expert by weight format: the one formula that budgets, costs and traces share."""

from __future__ import annotations

from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.formats.layout import QUANTISED, ExpertLayout, Format, is_format

BITS_PER_WEIGHT = {"f32": 32, "bf16": 16, "int8": 8, "int4": 4}
SCALE_BITS = 16
FORMATS = ("f32", "bf16", "int8", "int8-g128", "int4", "int4-g32", "int4-g64", "int4-g128")
"""Weight formats that sizes are listed for. `int8` and `int4` alone count no scales; `-g64` adds a 16-bit scale per 64
inputs."""


def expert_bytes(hidden: int, moe_width: int, fmt: str) -> int:
    """Bytes of one routed expert (gate, up and down matrices, `hidden` x `moe_width` each) in weight format `fmt`.

    A quantised format of `formats.layout` takes what its layout says, padding and zero points included. Any other is a
    name of BITS_PER_WEIGHT. Integers may have `-g<n>` behind it: a 16-bit scale for every n weights along the inputs.
    """
    if is_format(fmt):
        return ExpertLayout(Format.parse(fmt), hidden, moe_width).nbytes
    plain, grouped, group = fmt.partition("-g")
    fits = plain in BITS_PER_WEIGHT and (
        not grouped or (plain.startswith("int") and group.isdecimal() and len(group) < 10 and int(group) > 0)
    )
    if not fits:
        known = ", ".join(BITS_PER_WEIGHT)
        raise UserError(
            f"weight format {shown(fmt)} is unknown (known: {known}; int8 and int4 with groups of any size, as "
            f"int4-g256; or {QUANTISED})"
        )
    bits = 3 * hidden * moe_width * BITS_PER_WEIGHT[plain]
    if group:
        bits += SCALE_BITS * (2 * moe_width * -(-hidden // int(group)) + hidden * -(-moe_width // int(group)))
    return -(-bits // 8)
