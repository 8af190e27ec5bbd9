"""memrewrite rewrites transformers: it finds their MLPs by dataflow and replaces them with memory layers.

The public API. Names are imported on first use: `import memrewrite` loads neither torch nor the passes. Where torch or
transformers is imported, they learn of the operators and of the config of rewritten models.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from memrewrite.on_import import when_imported

if TYPE_CHECKING:
    from memrewrite.clipping import clip_grad_norm_, unscale_
    from memrewrite.errors import MemrewriteError, VerificationError
    from memrewrite.fused import RowwiseAdagrad, RowwiseAdam, fuse
    from memrewrite.layers.moe import aux_loss
    from memrewrite.lazy_adam import LazyAdam, catch_up
    from memrewrite.passes.initialize.calibrate import calibrate
    from memrewrite.passes.match_outputs import match_outputs
    from memrewrite.passes.onnx.export import export_onnx
    from memrewrite.passes.onnx.session import onnx_session
    from memrewrite.passes.pipeline import apply, explain, inspect, plan
    from memrewrite.passes.storage.checkpoint import save
    from memrewrite.passes.storage.load import load
    from memrewrite.passes.torch_compile.backend import backend
    from memrewrite.recipes.schema import Recipe
    from memrewrite.report import Report
    from memrewrite.training import freeze, param_groups, schedule
    from memrewrite.usage.trainer_callback import UsageCallback
    from memrewrite.usage.watch import watch

__version__ = version("memrewrite")


def _register_operators() -> None:
    """Files of torch.export, AOTInductor and TorchScript name the operators, and torch must know them to read the files.

    Not while a module of the kernels imports torch: it is not complete yet, and the operators need it.
    """
    if not any(name.startswith("memrewrite.kernels.") for name in sys.modules):
        import_module("memrewrite.kernels.ops")


def _register_config() -> None:
    """Directories that transformers wrote of rewritten models name a `model_type` that it must know to load them."""
    import_module("memrewrite.passes.storage.rewritten_model").register_config()


def _register_change() -> None:
    """These directories also name what places the layers."""
    import_module("memrewrite.passes.storage.rewritten_model").register_change()


when_imported("torch", _register_operators)
when_imported("transformers.models.auto.configuration_auto", _register_config)
when_imported("transformers.quantizers.auto", _register_change)

_MODULES = {
    "LazyAdam": "memrewrite.lazy_adam",
    "MemrewriteError": "memrewrite.errors",
    "Recipe": "memrewrite.recipes.schema",
    "Report": "memrewrite.report",
    "RowwiseAdagrad": "memrewrite.fused",
    "RowwiseAdam": "memrewrite.fused",
    "UsageCallback": "memrewrite.usage.trainer_callback",
    "VerificationError": "memrewrite.errors",
    "apply": "memrewrite.passes.pipeline",
    "aux_loss": "memrewrite.layers.moe",
    "backend": "memrewrite.passes.torch_compile.backend",
    "calibrate": "memrewrite.passes.initialize.calibrate",
    "catch_up": "memrewrite.lazy_adam",
    "clip_grad_norm_": "memrewrite.clipping",
    "explain": "memrewrite.passes.pipeline",
    "export_onnx": "memrewrite.passes.onnx.export",
    "freeze": "memrewrite.training",
    "fuse": "memrewrite.fused",
    "inspect": "memrewrite.passes.pipeline",
    "load": "memrewrite.passes.storage.load",
    "match_outputs": "memrewrite.passes.match_outputs",
    "onnx_session": "memrewrite.passes.onnx.session",
    "param_groups": "memrewrite.training",
    "plan": "memrewrite.passes.pipeline",
    "save": "memrewrite.passes.storage.checkpoint",
    "schedule": "memrewrite.training",
    "unscale_": "memrewrite.clipping",
    "watch": "memrewrite.usage.watch",
}
__all__ = [
    "LazyAdam",
    "MemrewriteError",
    "Recipe",
    "Report",
    "RowwiseAdagrad",
    "RowwiseAdam",
    "UsageCallback",
    "VerificationError",
    "apply",
    "aux_loss",
    "backend",
    "calibrate",
    "catch_up",
    "clip_grad_norm_",
    "explain",
    "export_onnx",
    "freeze",
    "fuse",
    "inspect",
    "load",
    "match_outputs",
    "onnx_session",
    "param_groups",
    "plan",
    "save",
    "schedule",
    "unscale_",
    "watch",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'memrewrite' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
