"""A paced device as people write it: `paced:PROFILE[:SLOWDOWN]`. Imports no jax."""

from __future__ import annotations

import os
from typing import NamedTuple

from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.machine.costs import CostModel, is_profile, slower
from hybrimoe_jax.machine.profile import PROFILES, load_profile

AUTO, PREFIX = "auto", "paced:"


class PacedDevice(NamedTuple):
    """This machine's CPU backend, slowed to a profile's machine with every duration `slowdown` times as long."""

    profile: str
    slowdown: float = 1.0

    def describe(self) -> str:
        """As a run says it: never as measured on that machine."""
        return f"paced: {self.profile}{slower(self.slowdown)}{' than it' if self.slowdown != 1 else ''}"


def parse_device(text: str) -> PacedDevice | None:
    """None for "auto", jax's own device; UserError for anything but a paced one. The profile is not read."""
    if text == AUTO:
        return None
    if not text.startswith(PREFIX) or text == PREFIX:
        raise UserError(f'device {shown(text)} is unknown; say "auto" or "paced:PROFILE[:SLOWDOWN]", as in {example()}')
    rest = text.removeprefix(PREFIX)
    profile, colon, times = rest.rpartition(":")
    if not colon or os.path.exists(rest):
        return PacedDevice(rest)
    try:
        slowdown = float(times)
    except ValueError:
        slowdown = 0.0
    if not 1e-6 <= slowdown <= 1e6:
        raise UserError(
            f"device {shown(text)}: the slowdown must be a number from 1e-6 to 1e6, not {shown(times)}, as in "
            f"{example()}"
        )
    return PacedDevice(profile, slowdown)


def check_device(text: str) -> PacedDevice | None:
    """What `parse_device` gives; UserError also for a profile that cannot be read."""
    device = parse_device(text)
    if device is not None:
        known = device.profile in PROFILES or not is_profile(device.profile)
        (load_profile if known else CostModel.load)(device.profile)
    return device


def example() -> str:
    return f"{PREFIX}{PROFILES[0]}:8"
