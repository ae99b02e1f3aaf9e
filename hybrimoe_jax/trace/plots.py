"""Pictures of a trace: the paper's characterisation of experts. Each returns the axes that it drew into."""

from __future__ import annotations

from typing import Any

import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.figures import LINES, SHADES, axes_of, line_style
from hybrimoe_jax.trace import analysis
from hybrimoe_jax.trace.columns import Trace


class TracePlots:
    """`trace.plot`. `ax`: where to draw; a new figure without it. UserError where the trace lacks what is drawn."""

    def __init__(self, trace: Trace):
        self._trace = trace

    def frequency(self, ax: Any = None) -> Any:
        """How often each expert was chosen: a row a layer, darker is oftener."""
        shares = 100 * analysis.frequency(self._trace)
        with axes_of(ax) as axes:
            image = axes.imshow(shares, aspect="auto", cmap=SHADES, vmin=0, interpolation="nearest")
            axes.set_xlabel("expert")
            axes.set_ylabel("MoE layer")
            axes.figure.colorbar(image, ax=axes, label="tokens that chose it [%]")
        return axes

    def concentration(self, ax: Any = None) -> Any:
        """Share of the activations that the most frequent experts have: the mean layer, with the least and most."""
        shares = np.sort(analysis.frequency(self._trace), axis=1)[:, ::-1].cumsum(axis=1)
        shares = 100 * shares[shares[:, -1] > 0] / self._trace.facts.top_k
        at = 100 * np.arange(1, 1 + shares.shape[1]) / shares.shape[1]
        with axes_of(ax) as axes:
            axes.fill_between(at, shares.min(axis=0), shares.max(axis=0), color="0.85", label="all layers")
            axes.plot(at, shares.mean(axis=0), color="black", lw=1, label="their mean")
            axes.plot([0, 100], [0, 100], color="0.4", ls=":", lw=0.8, label="if all were alike")
            axes.set(xlim=(0, 100), ylim=(0, 100))
            axes.set_xlabel("most frequent experts [% of a layer]")
            axes.set_ylabel("their share of\nactivations [%]")
            axes.legend()
        return axes

    def reuse_by_rank(self, ax: Any = None) -> Any:
        """The chance that an expert is chosen by the next token, by the rank of its score."""
        chance = 100 * analysis.reuse_by_rank(self._trace)
        facts = self._trace.facts
        with axes_of(ax) as axes:
            axes.plot(range(1, len(chance) + 1), chance, **line_style(0))
            axes.axhline(100 * facts.top_k / facts.experts, color="0.4", ls=":", lw=0.8, label="chance")
            if len(chance) > facts.top_k:
                axes.axvline(facts.top_k + 0.5, color="0.4", lw=0.6, label="chosen | not chosen")
            axes.set_ylim(0)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("rank of the expert's score")
            axes.set_ylabel("chosen by the next token [%]")
            axes.legend()
        return axes

    def reuse_distance(self, ax: Any = None) -> Any:
        """The share of uses that an LRU cache of each size has kept, first uses counted as misses."""
        found = analysis.reuse_distance(self._trace)
        uses = found.counts.sum() + found.first_uses
        if not uses:
            raise UserError("reuse distance: the trace holds no tokens")
        with axes_of(ax) as axes:
            axes.plot(range(len(found.counts)), 100 * np.cumsum(found.counts) / uses, color="black", lw=1)
            axes.set_ylim(0, 100)
            axes.set_xlabel("distinct experts chosen since")
            axes.set_ylabel("uses at most so far apart [%]")
        return axes

    def similarity(self, ax: Any = None) -> Any:
        """What earlier layers' states tell of a layer's routing, by distance: cosine of its router's judgement, recall.

        Where the trace has no full scores, recall alone.
        """
        trace, facts = self._trace, self._trace.facts
        if not trace.lookahead:
            raise UserError("similarity: the trace holds no lookahead predictions")
        distances = sorted(trace.lookahead)
        with axes_of(ax) as axes:
            if trace.scores is not None:
                cosines = [100 * trace.similarity(d) for d in distances]
                axes.plot(distances, cosines, label="similarity of scores [cosine, %]", **line_style(0))
            axes.plot(
                distances,
                [100 * trace.recall(d) for d in distances],
                label="experts named rightly [%]",
                **line_style(1),
            )
            axes.axhline(100 * facts.top_k / facts.experts, color="0.4", ls=LINES[2], lw=0.8, label="by chance")
            axes.set_ylim(0, 100)
            axes.set_xticks(distances)
            axes.set_xlabel("layers between")
            axes.legend(loc="upper right")
        return axes
