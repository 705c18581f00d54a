"""What the passes leave alone, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Refused:
    """What the passes leave alone, each with its cause.

    nodes: by name. regions: by weights that they hold. everything: the cause where the whole
    program is refused, at `source`.
    """

    nodes: Mapping[str, str] = field(default_factory=dict)
    regions: Mapping[frozenset[str], str] = field(default_factory=dict)
    everything: str = ""
    source: str = ""

    def __contains__(self, name: str) -> bool:
        return bool(self.everything) or name in self.nodes

    def __bool__(self) -> bool:
        return bool(self.everything or self.nodes or self.regions)

    def why(self, name: str) -> str:
        """The cause for a node that is refused."""
        return self.nodes.get(name) or self.everything

    def region(self, weights: Iterable[str]) -> str:
        """The cause for a region with these weights, if it is refused."""
        names = set(weights)
        return next((why for held, why in self.regions.items() if held <= names), "")

    @property
    def told(self) -> dict[str, str]:
        """All of it, with the causes, to be compared over the ranks."""
        regions = {", ".join(sorted(g)): why for g, why in self.regions.items()}
        whole = {"the whole graph": self.everything} if self.everything else {}
        return {**self.nodes, **regions, **whole}


NOTHING = Refused()
