"""Checks a saved result again: every bit of its files, that it loads, runs, shares its tables, and can be trained.

What was proved against the original when it was rewritten (null, untouched, frame, identity) stands in its report; here the
files are held against their hashes, so that what was proved then holds for what lies there now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.forward import first_run
from memrewrite.passes.rewrite.edit_module import layers_of
from memrewrite.passes.storage.checkpoint import read_plan, read_report
from memrewrite.passes.storage.manifest import read_manifest
from memrewrite.passes.storage.source import load_source
from memrewrite.passes.verify.checks import coverage, sharing
from memrewrite.passes.verify.evidence import Evidence
from memrewrite.passes.verify.gradient_flow import gradient
from memrewrite.passes.verify.layer_locality import tokenwise
from memrewrite.report import Check, Report
from memrewrite.site import Inspection


def verify_saved(directory: str | Path, *, trust_code: bool = False, step: Callable[[str], None] | None = None) -> Report:
    """The saved report with its checks made anew, where that is possible without the original model.

    Raises `CheckpointError` for a directory that was cut short or changed, or whose base cannot be built.
    """
    begun, say = time.perf_counter(), step or (lambda _: None)
    say("hashing every file")
    manifest = read_manifest(directory, every_bit=True)
    count = len(manifest["files"])
    checks = [
        Check(name="files", outcome="passed", number=count, sentence=f"all {count} files are as they were saved, bit for bit")
    ]
    say("loading the model")
    source = load_source(str(directory), trust_code=trust_code)
    say("running it")
    if isinstance(source.model, nn.Module):
        model, plan = source.model, read_plan(directory)
        checks.append(_finite(first_run(model, source.inputs)))
        if manifest["base"]["kind"] != "graph":
            before = Capture((), source.inputs, plan.captured)
            nothing = LocatedSites(Inspection(sites=(), near_misses=(), captured=plan.captured), {})
            evidence = Evidence(model, plan, before, nothing, {}, layers=layers_of(model, plan))
            checks += [check(evidence) for check in (coverage, sharing, tokenwise, gradient)]
    return read_report(directory).model_copy(update={"checks": tuple(checks), "seconds": time.perf_counter() - begun})


def _finite(outputs: object) -> Check:
    """Are all outputs numbers?"""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    bad = sum(int((~torch.isfinite(t)).sum()) for t in tensors)
    sentence = f"{bad} output elements are not finite" if bad else "every output is finite"
    return Check(name="finite", outcome="failed" if bad else "passed", number=bad, sentence=sentence)
