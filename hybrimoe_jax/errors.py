"""What commands turn into one line on stderr: bad input (exit code 2), and a device that does not do its part (1)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Something the caller can put right. The message says what was wrong, where, and what to do."""


class RuleError(UserError):
    """A cache policy, a scheduler or a predictor broke its contract. The step has ended; nothing of it is kept.

    Args: rule: its name; method: of its class; broken: what it did, with an example; layer: the MoE layer, where
      known.
    """

    def __init__(self, rule: str, method: str, broken: str, layer: int | str | None = None):
        super().__init__(rule, method, broken, layer)
        self.rule, self.method, self.broken, self.layer = rule, method, broken, layer

    def __str__(self) -> str:
        where = "" if self.layer is None else f", layer {self.layer}"
        return f"{self.rule}{where}: {self.method} {self.broken}"


class DeviceError(RuntimeError):
    """The device did not do what it was given. The step has ended; the engine can try the next one."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns what a value of the wrong kind raises in the block into a UserError: `what` cannot be read.

    The block is where it is used first, wherever that may be.
    """
    try:
        yield
    except UserError:
        raise
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"{what} cannot be read: a value in it is malformed ({type(error).__name__}: {error})"
        ) from error
