"""The one exception for bad input: commands turn it into one line on stderr and exit code 2."""

from __future__ import annotations


class UserError(ValueError):
    """Something the caller can put right. The message says what was wrong, where, and what to do."""
