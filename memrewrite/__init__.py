"""memrewrite rewrites transformers: it finds their MLPs by dataflow and replaces them with memory layers.

The public API. Names are imported on first use: `import memrewrite` loads neither torch nor the passes.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memrewrite.errors import MemrewriteError, VerificationError
    from memrewrite.fused import RowwiseAdagrad, RowwiseAdam, fuse
    from memrewrite.layers.moe import aux_loss
    from memrewrite.passes.onnx.export import export_onnx
    from memrewrite.passes.onnx.session import onnx_session
    from memrewrite.passes.pipeline import apply, explain, inspect, plan
    from memrewrite.passes.storage.checkpoint import save
    from memrewrite.passes.storage.load import load
    from memrewrite.passes.torch_compile.backend import backend
    from memrewrite.recipes.schema import Recipe
    from memrewrite.report import Report
    from memrewrite.training import param_groups

__version__ = version("memrewrite")

_MODULES = {
    "MemrewriteError": "memrewrite.errors",
    "Recipe": "memrewrite.recipes.schema",
    "Report": "memrewrite.report",
    "RowwiseAdagrad": "memrewrite.fused",
    "RowwiseAdam": "memrewrite.fused",
    "VerificationError": "memrewrite.errors",
    "apply": "memrewrite.passes.pipeline",
    "aux_loss": "memrewrite.layers.moe",
    "backend": "memrewrite.passes.torch_compile.backend",
    "explain": "memrewrite.passes.pipeline",
    "export_onnx": "memrewrite.passes.onnx.export",
    "fuse": "memrewrite.fused",
    "inspect": "memrewrite.passes.pipeline",
    "load": "memrewrite.passes.storage.load",
    "onnx_session": "memrewrite.passes.onnx.session",
    "param_groups": "memrewrite.training",
    "plan": "memrewrite.passes.pipeline",
    "save": "memrewrite.passes.storage.checkpoint",
}
__all__ = [
    "MemrewriteError",
    "Recipe",
    "Report",
    "RowwiseAdagrad",
    "RowwiseAdam",
    "VerificationError",
    "apply",
    "aux_loss",
    "backend",
    "explain",
    "export_onnx",
    "fuse",
    "inspect",
    "load",
    "onnx_session",
    "param_groups",
    "plan",
    "save",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'memrewrite' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
