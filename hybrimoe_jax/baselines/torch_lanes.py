"""What runs where: the device's programs in order, and host experts, on this machine's cores, a GPU or a paced device.

A program is a function that torch carries out. `InlineDevice`: this machine's CPU, which computes at once.
`CudaDevice`: kernels queue on the current stream. `PacedDevice`: a thread of its own runs programs in order, and each
lasts as long as a profile says, as those of our own paced device do; its work counts, and it begins when it was issued
or when the one before it ended.
"""

from __future__ import annotations

import abc
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from hybrimoe_jax.baselines.torch_experts import Experts, Work
from hybrimoe_jax.baselines.torch_linear import Tensor
from hybrimoe_jax.engine.lanes.host_pace import HostPace
from hybrimoe_jax.engine.lanes.pacing import Lateness, sleep_until
from hybrimoe_jax.engine.lanes.workers import Worker

if TYPE_CHECKING:
    from hybrimoe_jax.baselines.torch_link import Transfer

now = time.perf_counter


class Program:
    """Work on the device: `needs`, transfers that must have landed; `seconds` that it lasts on a paced device."""

    def __init__(self, run: Callable[[], Any], seconds: float = 0.0, needs: Iterable[Transfer] = ()):
        self.run, self.seconds, self.needs, self.issued = run, seconds, tuple(needs), now()
        self.done: threading.Event | None = None  # of one that another thread runs
        self.result: Any = None
        self.error: BaseException | None = None
        self.event: Any = None  # a GPU's
        self.before: Program | None = None  # with which it fails

    @property
    def running(self) -> bool:
        """Whether another thread has not ended it yet."""
        return self.done is not None and not self.done.is_set()

    def join(self) -> None:
        """Waits for its end, well or not."""
        if self.done is not None:
            self.done.wait()

    def wait(self) -> Any:
        """The result, once it is there."""
        self.join()
        if self.error is not None:
            raise self.error
        return self.result


class Device(abc.ABC):
    """Runs programs in order. `busy`: seconds that it has so far."""

    busy = 0.0
    later = False
    """Whether programs may run after `submit` has returned, on another thread."""

    @abc.abstractmethod
    def submit(self, program: Program) -> Program:
        """Starts a program behind all others. Its `wait` gives what it returned."""

    def recover(self) -> None:  # noqa: B027
        """Takes programs again after one has failed."""

    def close(self) -> None:  # noqa: B027
        """Ends its threads."""


class InlineDevice(Device):
    """This machine's cores: a program is done when `submit` returns."""

    def submit(self, program: Program) -> Program:
        for transfer in program.needs:
            transfer.wait()
        began = now()
        program.result = program.run()
        self.busy += now() - began
        return program


class CudaDevice(Device):
    """A GPU's current stream. `wait` returns at once: whoever reads a result waits for it.

    `busy` counts from a program's issue to the next one's, so it is an upper bound.
    """

    def submit(self, program: Program) -> Program:
        stream = torch.cuda.current_stream()
        for transfer in program.needs:
            transfer.wait_on(stream)
        began = now()
        program.result = program.run()
        program.event = stream.record_event()
        self.busy += now() - began
        return program


class PacedDevice(Device):
    """A thread that runs programs in order, each as long as it should last. `late`, `overrun`: how well it did.

    Nobody waits for most programs, so those behind one that failed fail with it, until `recover`.
    """

    later = True

    def __init__(self):
        self.late, self.overrun, self.overran_s, self._free = Lateness(), 0, 0.0, 0.0
        self._latest: Program | None = None
        self._worker = Worker(self._serve, "torch-device")

    def submit(self, program: Program) -> Program:
        program.done = threading.Event()
        program.before, self._latest = self._latest, program
        self._worker.put(program)
        return program

    def overshoot(self) -> dict[str, float]:
        late = self.late
        return {
            "count": late.count,
            "sum_s": late.sum_s,
            "most_s": late.most_s,
            "overrun": self.overrun,
            "overran_s": self.overran_s,
        }

    def reset(self) -> None:
        self.late.reset()
        self.overrun, self.overran_s = 0, 0.0

    def recover(self) -> None:
        self._latest = None

    def close(self) -> None:
        self._worker.stop()

    def _serve(self, program: Program) -> None:
        try:
            before, program.before = program.before, None
            if before is not None:
                before.wait()
            begin = max(self._free, program.issued)
            for transfer in program.needs:
                transfer.wait()
                begin = max(begin, transfer.landed)
            with torch.inference_mode():
                program.result = program.run()
            end, ended = begin + program.seconds, now()
            if ended > end:
                self.overrun, self.overran_s = self.overrun + 1, self.overran_s + ended - end
            else:
                self.late.note(sleep_until(end))
            self.busy += max(end, ended) - begin
            self._free = max(end, ended)
        except BaseException as error:  # handed to the thread that waits for it
            program.error = error
        assert program.done is not None
        program.done.set()


class Host:
    """Host experts, in torch's fastest form.

    Args:
      experts: what computes them. threaded: beside the device, on a thread of its own; else when they are asked for.
      pace: how long they last; None: as long as they take.
    """

    def __init__(self, experts: Experts, threaded: bool, pace: HostPace | None = None):
        self.experts, self.pace, self.threaded, self.busy = experts, pace, threaded, 0.0
        self._worker = Worker(self._serve, "torch-host") if threaded else None

    def submit(self, work: Work, ids: list[int], out: Tensor, wide: bool) -> Program:
        """Adds experts, called `ids`, to `out` [N, D] in host memory. Call the program's `wait` in any case."""
        program = Program(lambda: self.experts(work, out))
        if self._worker is None:
            began = now()
            program.run()
            self.busy += now() - began
            return program
        program.done = threading.Event()
        if self.pace is not None and ids:
            program.seconds = self.pace.start(ids, [len(rows) for rows in work.rows], wide)[-1][-1]
        self._worker.put(program)
        return program

    def close(self) -> None:
        if self._worker is not None:
            self._worker.stop()

    def _serve(self, program: Program) -> None:
        try:
            with torch.inference_mode():
                program.run()
            if self.pace is not None and program.seconds:
                self.pace.wait(program.seconds)  # the moment at which they end
            self.busy += now() - program.issued
        except BaseException as error:  # handed to the thread that waits for it
            program.error = error
        assert program.done is not None
        program.done.set()
