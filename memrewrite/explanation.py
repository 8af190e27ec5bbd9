"""Why a part of a model is, or is not, an MLP, as plain data: an `Explanation` with one `Finding` per linear op."""

from __future__ import annotations

from typing import Literal

from memrewrite.frozen import Frozen
from memrewrite.site import Site

Verdict = Literal["mlp", "part", "holds", "refused", "no candidate", "not run"]


class Finding(Frozen):
    """One matrix product with a weight, tested as the last matrix of an MLP, and the result.

    Attributes:
        linear: Graph node of the product.
        path: Module that computes it.
        weights: Names of its weights.
        outcome: "site": it belongs to an MLP; "refused": it looked like one and a rule refused it; "never": it cannot be one.
        site: Path of the MLP it belongs to.
        rule: Name of the rule that refused it.
        reason: What the rule found, in words.
        advice: What the user can change.
        node: Graph node at which the rule failed.
        at: Module that computes this node.
        source: Source line of this node, `file:line`.
        line: Text of this source line.
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
    """Why a module, container, parameter or graph node is, or is not, an MLP.

    Attributes:
        asked: The path or name that was requested.
        kind: What it names.
        verdict: "mlp": it is a site. "part": all its operations belong to one site. "holds": it contains sites.
            "refused": it looked like an MLP, and a rule refused it. "no candidate": it runs, and nothing in it looks
            like an MLP. "not run": none of its operations is in the captured forward.
        summary: The verdict in one sentence.
        sites: Sites it is, belongs to, or contains.
        findings: One per matrix product with a weight.
        captured: How the model was captured.
    """

    asked: str
    kind: Literal["module", "parameter", "node"]
    verdict: Verdict
    summary: str
    sites: tuple[Site, ...]
    findings: tuple[Finding, ...]
    captured: str
