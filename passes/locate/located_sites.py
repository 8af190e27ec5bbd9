"""What `locate` found: sites, and the graph regions behind each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.locate.binding import BoundRegion
from memrewrite.passes.locate.recorded_graph import RecordedGraph
from memrewrite.passes.regions.region import Region
from memrewrite.site import Inspection, Site


@dataclass(frozen=True)
class SiteCall:
    """One region found: where it is in which segment's recorded graph. A site has one for each call."""

    segment: Segment
    recorded: RecordedGraph
    region: Region
    bound: BoundRegion


@dataclass(frozen=True)
class LocatedSites:
    """What `locate` found, with the graph regions behind each site (`found[site.path]`, one for each call)."""

    located: Inspection
    found: Mapping[str, tuple[SiteCall, ...]]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in the order they run."""
        return self.located.sites
