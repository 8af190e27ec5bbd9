"""Checks a saved model again: hashes of its files; that it loads and runs; that layers share their tables and can be trained.

The checks against the original model (null, untouched, frame, identity) are in the saved report. The hashes show that the
files are the ones that were saved with it.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memrewrite.passes.models.exclusive import exclusive
from memrewrite.passes.models.forward import run
from memrewrite.passes.rewrite.edit_module import layers_of
from memrewrite.passes.rewrite.look import Step
from memrewrite.passes.storage.manifest import SavedFiles, read_manifest
from memrewrite.passes.storage.saved_plan import read_plan, read_report
from memrewrite.passes.storage.source import load_source
from memrewrite.passes.verify.checks import coverage, sharing
from memrewrite.passes.verify.evidence import RewrittenModel
from memrewrite.passes.verify.gradient_flow import gradient
from memrewrite.passes.verify.layer_locality import tokenwise
from memrewrite.passes.verify.verify import stepped
from memrewrite.phases import Phases
from memrewrite.report import Check, Report


@exclusive
def verify_saved(directory: str | Path, *, trust_code: bool = False, step: Step | None = None) -> Report:
    """The saved report, its checks replaced by those that can run without the original model.

    Args:
        directory: what `memrewrite.save` wrote.
        trust_code: allow running saved Python code, and unpickling an exported graph.
        step: receives the name of each stage as it begins.

    Raises:
        CheckpointError: the directory is incomplete or was changed, or its base model cannot be built.
        ModelError: the loaded model does not run on its example inputs.
    """
    begun = time.perf_counter()
    with Phases(step) as phases:
        checks, files = _checked(directory, trust_code, phases)
    changed = {"checks": checks, "seconds": time.perf_counter() - begun, "phases": tuple(phases.ended)}
    return read_report(files).model_copy(update=changed)


def _checked(directory: str | Path, trust_code: bool, step: Step) -> tuple[tuple[Check, ...], SavedFiles]:
    step("hashing every file")
    files = read_manifest(directory, every_bit=True)
    count = len(files.names())
    checks = [
        Check(name="files", outcome="passed", number=count, sentence=f"all {count} files are as they were saved, bit for bit")
    ]
    step("loading the model")
    source = load_source(str(directory), trust_code=trust_code)
    step("running it")
    if isinstance(source.model, nn.Module):
        model, plan, inputs = source.model, read_plan(files), source.inputs
        checks.append(_finite(run(model, inputs)))
        if files.base.kind != "graph":
            rewritten = RewrittenModel(model, plan, inputs, layers_of(model, plan))
            checks += [stepped(check, rewritten, step) for check in (coverage, sharing, tokenwise, gradient)]
    return tuple(checks), files


def _finite(outputs: object) -> Check:
    """Are all output elements finite?"""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    bad = sum(int((~torch.isfinite(t)).sum()) for t in tensors)
    sentence = f"{bad} output elements are not finite" if bad else "every output is finite"
    return Check(name="finite", outcome="failed" if bad else "passed", number=bad, sentence=sentence)
