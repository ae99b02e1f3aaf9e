"""The tables of docs/reproduction.md by name: the paper's figures beside ours, from records that `experiments` names.

Also places for tables in other documents, which people write: what stands between `<!-- table: NAME -->` and
`<!-- end -->` in them is renewed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

from hybrimoe_jax.reproduce import experiments as e
from hybrimoe_jax.reproduce import routing, times
from hybrimoe_jax.reproduce.figures import Figures, markdown, seconds

__all__ = ["TABLES", "markdown", "places", "renewed", "seconds"]
PLACE = re.compile(r"(?<=<!-- table: )(?P<name>[^>]+?)(?P<mark> -->\n).*?(?=<!-- end -->)", re.DOTALL)
TABLES: dict[str, Callable[[Figures], str]] = {
    **{f"decode, {profile}": functools.partial(times.decode, profile=profile) for profile in e.PROFILES},
    **{f"prefill, {profile}": functools.partial(times.prefill, profile=profile) for profile in e.PROFILES},
    "ablation, prompts": functools.partial(times.ablation, prompt=e.ABLATION_PROMPT),
    **{
        make.__name__: make
        for make in (
            *(times.placement, times.ablation, times.contributions, times.engineered, times.live, times.baseline),
            *(times.costs, times.depth, times.rules, times.links, times.streamed),
            *(routing.hits, routing.alpha, routing.alpha_times, routing.knobs, routing.traces, routing.reuse),
            routing.similarity,
        )
    },
}


def places(text: str) -> list[str]:
    """Names of the tables that a document has a place for, in order."""
    return [match["name"] for match in PLACE.finditer(text)]


def renewed(text: str, tables: Mapping[str, str]) -> str:
    """The document with these tables in their places; a place without one is left as it is."""

    def place(match: re.Match) -> str:
        table = tables.get(match["name"])
        return match[0] if table is None else f"{match['name']}{match['mark']}\n{table}\n"

    return PLACE.sub(place, text)
