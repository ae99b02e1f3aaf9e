"""The `auto` kernel: picks, per load, what ran fastest on this machine in a short measurement when the model was loaded.

Four forms compete on copies of one of the model's experts: NumPy, the native kernel, oneDNN on the weights where they lie,
and oneDNN on its packed copy. A form is measured as it will run: short bursts of calls, as a layer makes them, in turns so
that a disturbance hits all alike, each form on its own copies in rotation so that none finds weights that another has just
read into the cache.

A packed copy costs time and memory, so an expert gets one when its own calls would have saved that time: both sides of this
ski-rental rule are the measured figures. Until then, and past the memory limit, the best of the others runs.

What was measured once holds for every later start on the same machine (choices.py): give the records of a profile as `known`, and nothing
is measured where one of them fits.

oneDNN computes no quantised experts, so for those NumPy and the native kernel compete. Forms that are not installed do not compete. BLAS threads are taken as they are: limit them first. All forms are measured on
one thread; a call on several goes to the native kernel, the only one that spreads one expert over them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.choices import NATIVE, PACKED, PLAIN, REFERENCE, Measurement, file_digest, key_of
from hybrimoe_jax.formats.plain import F32, ExpertWeights, aligned_copy, check_expert
from hybrimoe_jax.host_kernels.kernel import HostKernel, run_experts
from hybrimoe_jax.host_kernels.native.library import path as native_path
from hybrimoe_jax.formats.packing import HostExpert, PackedExpert, check_packed, pack_expert
from hybrimoe_jax.host_kernels.reference import ReferenceKernel

LOADS = (1, 2, 4, 8, 16, 32, 64, 128)
SAMPLE_BYTES = 64 << 20  # of copies, so that weights come from memory where the model's would
SAMPLE_WIDTH, SAMPLE_HIDDEN = 2048, 1024  # larger experts are cropped: both are then bound by memory alike
SECONDS_PER_LOAD = 0.06
MIN_ROUNDS, MAX_ROUNDS = 3, 15
BURST, BURST_LOADS = 4, 8  # a layer runs several experts; where load or expert is large, one is long enough
BURST_BYTES = 32 << 20  # load times an expert's bytes
CLEAR_WIN = 0.95  # a packed copy must beat the best other form by 5 % to be worth its memory


class AutoExpert:
    """A prepared expert: its handle for each library that is there."""

    __slots__ = ("native", "onednn", "weights")

    def __init__(self, weights: HostExpert, native: Any, onednn: Any):
        self.weights, self.native, self.onednn = weights, native, onednn

    def of(self, form: str) -> Any:
        return self.weights if form == REFERENCE else self.native if form == NATIVE else self.onednn


class OneLayout(HostKernel):
    """oneDNN on one layout of the weights, whatever an expert's calls have earned. Args: a OneDnnKernel, its layout's name."""

    name = "onednn"

    def __init__(self, onednn: Any, layout: str, max_load: int):
        self._onednn, self._layout, self._max_load = onednn, layout, max_load

    def prepare(self, weights: ExpertWeights) -> Any:
        return self._onednn.prepare(weights)

    def expert(self, handle: Any, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        if out is None:
            out = np.empty((len(x), handle.shape[0]), np.float32)
        for start in range(0, len(x), self._max_load):
            part = slice(start, start + self._max_load)
            self._onednn.run(handle, self._layout, x[part], out[part])
        return out


class AutoKernel(HostKernel):
    """Args: `sample`, an expert of the model; `threads` and `pack_limit` as in OneDnnKernel; `loads` to measure at; `known` measurements.

    `measured[load][form]` are seconds, `choices["unpacked" | "packed"][load]` the form that runs an expert in that state. `measurement` is
    what they come from, to be kept: None where only NumPy is there, or where memory ran out for oneDNN's copies, which another time need not
    happen; `reused` whether it was one of `known`.
    """

    name = "auto"

    def __init__(
        self,
        sample: HostExpert,
        threads: int = 1,
        pack_limit: int | None = None,
        loads: Sequence[int] = LOADS,
        known: Sequence[Measurement] = (),
    ):
        quantised = isinstance(sample, PackedExpert)
        check_packed(sample, "sample expert") if quantised else check_expert(sample, "sample expert")
        self._reference = ReferenceKernel()
        self._forms: dict[str, HostKernel] = {REFERENCE: self._reference}
        self._onednn, self._native, self.pack_seconds, self.unavailable = None, None, 0.0, []
        self.measured: dict[int, dict[str, float]] = {}
        if not quantised:
            self._add_onednn(threads, pack_limit)
        try:
            from hybrimoe_jax.host_kernels.native.kernel import NativeKernel

            self._native = self._forms[NATIVE] = NativeKernel(threads)
        except UserError as error:
            self.unavailable.append(str(error))
        self.teams = self._native is not None
        self._table = {False: [REFERENCE], True: [REFERENCE]}
        self._gain = [0.0]
        self.measurement, self.reused = None, False
        if self._onednn is not None or self._native is not None:
            self._settle(sample, threads, tuple(sorted(set(loads))), known)
        self.choices = {
            state: {load: table[min(load, len(table) - 1)] for load in (self.measured or LOADS)}
            for state, table in (("unpacked", self._table[False]), ("packed", self._table[True]))
        }

    def _add_onednn(self, threads: int, pack_limit: int | None) -> None:
        try:
            from hybrimoe_jax.host_kernels import onednn

            self._onednn = onednn.OneDnnKernel(threads, pack_limit, earns=self._earned)
            for form, layout in ((PLAIN, onednn.PLAIN), (PACKED, onednn.PACKED)):
                self._forms[form] = OneLayout(self._onednn, layout, onednn.MAX_LOAD)
        except UserError as error:
            self.unavailable.append(str(error))

    def prepare(self, weights: HostExpert) -> AutoExpert:
        kernels = (self._native, self._onednn)
        return AutoExpert(self._reference.prepare(weights), *(k and k.prepare(weights) for k in kernels))

    def expert(self, handle: AutoExpert, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        form = self._form(handle, len(x))
        return self._forms[form].expert(handle.of(form), x, out)

    def run_experts(self, handles, x, tokens, weights, out, threads=1):
        if self._native is None:
            return super().run_experts(handles, x, tokens, weights, out, threads)
        others: list[int] = []
        if threads == 1:
            loads = (len(x) if rows is None else len(rows) for rows in tokens)
            others = [i for i, load in enumerate(loads) if load and self._form(handles[i], load) != NATIVE]
        if others:
            chosen = [[values[i] for i in others] for values in (handles, tokens, weights)]
            super().run_experts(chosen[0], x, chosen[1], chosen[2], out)
            rest = [i for i in range(len(handles)) if i not in others]
            handles, tokens, weights = ([values[i] for i in rest] for values in (handles, tokens, weights))
        return self._native.run_experts([handle.native for handle in handles], x, tokens, weights, out, threads)

    def _form(self, handle: AutoExpert, load: int) -> str:
        onednn = handle.onednn
        packed = onednn is not None and (onednn.is_packed or self._onednn.settle(onednn, load))
        table = self._table[packed]
        return table[load if load < len(table) else -1]

    def record(self, handle: AutoExpert) -> tuple[int, int] | None:
        return self._native.record(handle.native) if self._native else None

    def pack(self, handle: AutoExpert) -> bool:
        """Packs now if a packed copy wins at some load; whether the expert is packed."""
        return any(self._gain) and self._onednn.pack(handle.onednn)

    def warm(self, handle: AutoExpert, loads: Sequence[int]) -> None:
        if self._onednn is not None:
            self._onednn.warm(handle.onednn, loads)

    def set_threads(self, threads: int) -> None:
        if self._onednn is not None:
            self._onednn.set_threads(threads)

    @property
    def packed_bytes(self) -> int:
        return 0 if self._onednn is None else self._onednn.packed_bytes

    def describe(self) -> dict[str, Any]:
        inner = {"unavailable": self.unavailable} if self.unavailable else {}
        for kernel in (self._native, self._onednn):
            inner |= {} if kernel is None else kernel.describe()
        micros = {n: {form: round(s * 1e6, 1) for form, s in row.items()} for n, row in self.measured.items()}
        return {
            **inner,
            "name": self.name,
            "choices": self.choices,
            "measured_us": micros,
            "from_profile": self.reused,
            "pack_us": round(self.pack_seconds * 1e6),
        }

    def _earned(self, load: int) -> float:
        """Share of a packing's time that a packed copy would have saved in one call at this load."""
        return self._gain[load if load < len(self._gain) else -1]

    def _settle(self, sample: HostExpert, threads: int, loads: tuple[int, ...], known: Sequence[Measurement]) -> None:
        """Takes the measurement that fits, or measures."""
        key = key_of(sample, threads, self._libraries())
        found = next((measurement for measurement in known if measurement.covers(key, loads)), None)
        self.reused = found is not None
        measured = found or self._measure(_crop(sample), key, loads)
        complete = self._onednn is None or all(PACKED in row for row in measured.seconds.values())
        self.measurement = measured if complete else None
        self.pack_seconds = measured.pack_seconds
        self.measured = {load: measured.seconds[load] for load in loads}
        self._decide(loads)

    def _libraries(self) -> dict[str, str]:
        """The kernels that compete beside NumPy, and which build each is."""
        found = {}
        if self._native is not None:
            found[NATIVE] = f"{self._native.isa} {file_digest(native_path())}"
        if self._onednn is not None:
            found[PLAIN] = self._onednn.version
        return found

    def _measure(self, sample: HostExpert, key: dict[str, Any], loads: tuple[int, ...]) -> Measurement:
        count = max(2, min(16, SAMPLE_BYTES // sample.nbytes))
        copies = [_copy(sample) for _ in range(count)]
        onednn, packing = self._onednn, []
        handles: dict[str, list] = {REFERENCE: [self._reference.prepare(w) for w in copies]}
        if self._native is not None:
            handles[NATIVE] = [self._native.prepare(w) for w in copies]
        if onednn is not None:
            if sample.down.dtype == F32:
                handles[PLAIN] = [onednn.prepare(w) for w in copies]
            packed = [onednn.prepare(w) for w in copies]
            for handle in packed:
                start = time.perf_counter()
                if not onednn.pack(handle):
                    break
                packing.append(time.perf_counter() - start)
            else:
                handles[PACKED] = packed
        pack_seconds = statistics.median(packing) if packing else 0.0
        return Measurement(key, {load: self._race(handles, load) for load in loads}, pack_seconds)

    def _race(self, handles: dict[str, list], load: int) -> dict[str, float]:
        """Median seconds of an expert per form, rows gathered and results added as in a step (every other row of x)."""
        sample = handles[REFERENCE][0]  # as it is: NumPy prepares nothing
        burst = BURST if load <= BURST_LOADS or load * sample.nbytes <= BURST_BYTES else 1
        tokens = 1 if load == 1 else 2 * load
        x = np.random.default_rng(0).standard_normal((tokens, sample.width), np.float32)
        rows, ones = [np.arange(0, tokens, 2)] * burst, [np.ones(load, np.float32)] * burst
        out, times = np.zeros_like(x), {form: [] for form in handles}
        deadline = None
        for turn in range(MAX_ROUNDS + 1):
            for place, (form, experts) in enumerate(handles.items()):
                first = turn * burst + place * len(experts) // len(handles)
                chosen = [experts[(first + i) % len(experts)] for i in range(burst)]
                start = time.perf_counter()
                run_experts(self._forms[form], chosen, x, rows, ones, out)
                times[form].append((time.perf_counter() - start) / burst)
            deadline = deadline or time.perf_counter() + SECONDS_PER_LOAD  # the first turn only warms up
            if turn >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
        return {form: statistics.median(samples[1:]) for form, samples in times.items()}

    def _decide(self, loads: tuple[int, ...]) -> None:
        """Tables by load, each load taking the measured load nearest in ratio."""
        self._table, self._gain = {False: [], True: []}, []
        for load in range(loads[-1] + 1):
            times = self.measured[min(loads, key=lambda n: abs(np.log2(max(load, 1) / n)))]
            unpacked = min((form for form in times if form != PACKED), key=times.__getitem__)
            wins = PACKED in times and times[PACKED] < CLEAR_WIN * times[unpacked]
            self._table[False].append(unpacked)
            self._table[True].append(PACKED if wins else unpacked)
            self._gain.append((times[unpacked] - times[PACKED]) / self.pack_seconds if wins else 0.0)


def _copy(sample: HostExpert) -> HostExpert:
    if isinstance(sample, PackedExpert):
        return PackedExpert(aligned_copy(sample.data), sample.layout)
    return ExpertWeights(*(aligned_copy(w) for w in sample))


def _crop(sample: HostExpert) -> HostExpert:
    """The sample, or where it is large the top left corner of a plain one, and a made-up one of that shape and the same format."""
    width, hidden = min(sample.width, SAMPLE_WIDTH), min(sample.hidden, SAMPLE_HIDDEN)
    if (width, hidden) == (sample.width, sample.hidden):
        return sample
    if isinstance(sample, PackedExpert):
        shapes = ((hidden, width), (hidden, width), (width, hidden))
        numbers = np.random.default_rng(0)
        return pack_expert(*(numbers.standard_normal(shape, np.float32) for shape in shapes), sample.layout.format)
    full = sample.hidden
    gate, up = sample.gate_up[:hidden, :width], sample.gate_up[full : full + hidden, :width]
    return ExpertWeights(np.concatenate([gate, up]), np.ascontiguousarray(sample.down[:width, :hidden]))
