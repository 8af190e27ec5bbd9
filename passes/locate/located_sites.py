"""What `locate` found: sites, and the graph regions that each of them consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.locate.binding import BoundRegion
from memrewrite.passes.locate.recorded_graph import RecordedGraph
from memrewrite.passes.regions.region import Region
from memrewrite.site import Inspection, Site


@dataclass(frozen=True)
class SiteCall:
    """One region found, and where it is in a segment's recorded graph. A site has one for each call in a forward."""

    segment: Segment
    recorded: RecordedGraph
    region: Region
    bound: BoundRegion


@dataclass(frozen=True)
class LocatedSites:
    """What `locate` found, with the graph regions of each site (`found[site.path]`, one for each call).

    `recorded` has the graphs of every segment, by the segment's path, whether a site is in it or not.
    """

    located: Inspection
    found: Mapping[str, tuple[SiteCall, ...]]
    recorded: Mapping[str, RecordedGraph] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in the order they run."""
        return self.located.sites
