"""torch as pyright sees it: reading the real one takes as long as all else, and it may not be installed."""

from typing import Any

def __getattr__(name: str) -> Any: ...
