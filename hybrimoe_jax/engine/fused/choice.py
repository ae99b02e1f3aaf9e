"""Which of two ways decode steps take, chosen from what steps took: at load, and again while they run.

A choice that was made in a bad moment, or that fits no more (a longer context, other work on the machine), must not
last. So the median of the running steps is compared with the best that was seen of the other way. Where it is clearly
worse, a few steps take the other way: answers are the same, and it is seen what it takes now. The faster one is kept.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

WINDOW, TRIAL = 16, 6
"""Steps between two looks; steps of a trial, of which the first is left out."""
CLEARLY, BETTER = 1.5, 0.9
"""A trial begins where steps take longer than the other way's best by the first factor, and changes the way where that
one takes less than the second's share."""
PAUSE, LONGEST_PAUSE = 64, 4096
"""Steps before a trial that changed nothing is repeated: twice as many each time."""


class Switch(NamedTuple):
    """A change of way: to fused decode or away from it, and the seconds of a step that each took."""

    to_fused: bool
    fused_s: float
    layered_s: float


class WayChoice:
    """Args: fused: whether to begin so. fused_s, layered_s: a step, as timed at load.

    Attributes: `fused`: how the next step runs.
    """

    def __init__(self, fused: bool, fused_s: float, layered_s: float):
        self.fused = fused
        self._latest = {True: fused_s, False: layered_s}
        self._best = dict(self._latest)
        self._times: list[float] = []
        self._trial = False
        self._wait, self._pause = 0, PAUSE

    def note(self, seconds: float) -> Switch | None:
        """Takes what a step took, the way that `fused` says; tells if the way has changed for good."""
        self._times.append(seconds)
        if len(self._times) < (TRIAL if self._trial else WINDOW):
            return None
        usual = statistics.median(self._times[1:] if self._trial else self._times)
        self._latest[self.fused] = usual
        self._best[self.fused] = min(usual, self._best[self.fused])
        self._wait -= len(self._times)
        self._times.clear()
        if self._trial:
            self._trial = False
            if usual < BETTER * self._latest[not self.fused]:
                self._wait, self._pause = PAUSE, PAUSE
                return Switch(self.fused, self._latest[True], self._latest[False])
            self.fused = not self.fused
            self._wait, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        elif self._wait <= 0 and usual > CLEARLY * self._best[not self.fused]:
            self._trial, self.fused = True, not self.fused
        return None
