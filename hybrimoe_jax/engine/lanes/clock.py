"""The clock every measured time comes from. A time is shown with the name of its clock."""

from __future__ import annotations

import time


class WallClock:
    """Monotonic seconds of this machine."""

    name = "wall"

    def now(self) -> float:
        return time.perf_counter()
