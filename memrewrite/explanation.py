"""Why a place in a model is, or is not, an MLP, as plain data: an `Explanation`, resting on one `Finding` for each linear."""

from __future__ import annotations

from typing import Literal

from memrewrite.frozen import Frozen
from memrewrite.site import Site

Verdict = Literal["mlp", "part", "holds", "refused", "no candidate", "not run"]


class Finding(Frozen):
    """One product with a weight, tried as the last matrix of an MLP, and what came of it.

    `site` names the MLP it belongs to. Otherwise `reason` says what `rule` found at the graph node `node`, made by module `at`
    at the source line `source` (`file:line`), whose text is `line`; `advice` says what one could do about it.
    """

    linear: str
    path: str
    weights: tuple[str, ...]
    outcome: Literal["site", "refused", "never"]
    site: str = ""
    rule: str = ""
    reason: str = ""
    advice: str = ""
    node: str = ""
    at: str = ""
    source: str = ""
    line: str = ""


class Explanation(Frozen):
    """The answer to *why*, for a module, a container, a parameter or a graph node.

    mlp:          it is a site.
    part:         everything it does belongs to one site.
    holds:        sites lie inside it.
    refused:      it looked like an MLP, and a rule refused it.
    no candidate: it runs, and nothing in it looks like an MLP.
    not run:      nothing of it is in the captured forward.
    """

    asked: str
    kind: Literal["module", "parameter", "node"]
    verdict: Verdict
    summary: str
    sites: tuple[Site, ...]
    findings: tuple[Finding, ...]
    captured: str
