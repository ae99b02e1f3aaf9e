"""The one exception for bad input: commands turn it into one line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Something the caller can put right. The message says what was wrong, where, and what to do."""


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
