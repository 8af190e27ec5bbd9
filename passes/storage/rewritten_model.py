"""Loads what transformers saved of a rewritten model, by transformers' own functions: `from_pretrained`, pipelines.

Flow: config.json → the config of the base, with the rewrite as its `quantization_config` → transformers builds the base on
meta, and calls the "quantizer" of that method before it loads weights → the layers of the plan are placed → weights. Nothing
of that field is left in the model.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memrewrite.errors import CheckpointError, MemrewriteError, in_one_line
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.pool import Pools
from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.passes.rewrite.graph_host import GraphHost
from memrewrite.passes.sources.hugging_face import Architecture, needed_architecture, quiet
from memrewrite.passes.sources.json_text import parse_json
from memrewrite.passes.storage.base_model import CONFIG
from memrewrite.passes.storage.graph_json import hosts_from_json
from memrewrite.passes.storage.manifest import MANIFEST
from memrewrite.passes.storage.pretrained import headers_in
from memrewrite.passes.storage.rewritten_config import (
    BASE_TYPE,
    CHANGE,
    TYPE,
    base_data,
    is_rewritten,
    record_from,
    with_base_type,
)
from memrewrite.passes.storage.saved_plan import PLAN, plan_from
from memrewrite.passes.storage.saved_tensors import bytes_of, refuse_too_large, state_of
from memrewrite.passes.storage.unwrapped import set_record
from memrewrite.plans import Plan
from memrewrite.record import RewriteRecord
from memrewrite.training import freeze


def register_config() -> None:
    """Make transformers read the config.json of rewritten models."""
    import transformers

    class MemrewriteConfig(transformers.PreTrainedConfig):  # type: ignore[no-untyped-call]
        """Reads config.json. No object of this class exists: `from_dict` returns a config of the base."""

        model_type = TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Raises `CheckpointError` for a rewrite of a model type that transformers does not have."""
            return _config_from(config_dict, kwargs)

    transformers.AutoConfig.register(TYPE, MemrewriteConfig)


def register_change() -> None:
    """Make transformers place the layers before it loads weights."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Rewrite(QuantizationConfigMixin):
        """The rewrite, as a change that is made to a model before its weights are loaded."""

        def __init__(self, **data: Any) -> None:
            self.data: dict[str, Any] = data
            self.quant_method = TYPE  # type: ignore[assignment]

        def to_dict(self) -> dict[str, Any]:
            return {**self.data, "quant_method": TYPE}

    class Rewriter(HfQuantizer):
        """Makes that change."""

        def preprocess_model(self, model: Any, dtype: Any = None, **_: Any) -> None:
            change: Any = self.quantization_config
            _rewrite(model, record_from(change.data))

        def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
            return [*weight_conversions, *_kept_names(weight_conversions, model)]

        def postprocess_model(self, model: Any, **_: Any) -> None:
            del model.hf_quantizer

        def is_serializable(self, **_: Any) -> bool:
            return True

        is_trainable = True

    register_quantization_config(TYPE)(Rewrite)
    register_quantizer(TYPE)(Rewriter)


def _config_from(data: dict[str, Any], options: dict[str, Any]) -> Any:
    import transformers

    if not is_rewritten(data):
        raise CheckpointError(f"config.json has no field {BASE_TYPE!r}", hint="save the model again")
    fields = with_base_type(data)
    name = str(fields["model_type"])
    if name not in list(transformers.CONFIG_MAPPING):
        what = f"the model was rewritten from the type {name!r}, which transformers {transformers.__version__} does not have"
        raise CheckpointError(what, hint="upgrade transformers")
    return transformers.CONFIG_MAPPING[name].from_dict(fields, **options)


def _rewrite(model: Any, record: RewriteRecord) -> None:
    """Place the layers of a recorded plan in a model that was built a moment ago."""
    plan, hosts = _as_built(_fitting(plan_from(record.plan, Path(CONFIG)), model), model), _hosts(record)
    constants = [f"{path}.{name}" for path, host in hosts.items() for name in host.constants]
    if constants:
        what = f"{len(constants)} constants of graphs are not in files that transformers writes: {', '.join(constants[:3])}"
        raise CheckpointError(what, hint="save with memrewrite.save, and load with memrewrite.load")
    counts = {module: len(module._parameters) for module in model.modules()}
    substitute(model, plan, hosts=hosts, initialise=False).commit()
    for module, count in counts.items():
        if len(module._parameters) < count:  # of a replaced MLP in a module that became a graph
            module._is_hf_initialized = True  # else transformers sets weights that it no longer has
    for name in (CHANGE, BASE_TYPE, "auto_map", "model_type"):  # a class that reads its own config.json has all its fields
        vars(model.config).pop(name, None)  # `model_type` is that of the config's class
    set_record(model, RewriteRecord(plan=plan.model_dump_json(indent=1), recipe=record.recipe, graphs=record.graphs))
    if plan.train == "memory_only":
        freeze(model)


def _kept_names(conversions: list[Any], model: Any) -> Iterator[Any]:
    """What undoes transformers' renamings of tensors where they hit those of layers: they are meant for tensors of the base.

    Names are compared without the prefix of the model without its head, which loading adds or removes.
    """
    from transformers.core_model_loading import WeightRenaming

    renamings = [copy.deepcopy(c) for c in conversions if isinstance(c, WeightRenaming)]  # they keep what they have seen
    for path, module in model.named_modules(remove_duplicate=False):
        for tensor in module.state_dict() if isinstance(module, (MemoryLayer, Pools)) else ():
            name = renamed = f"{path}.{tensor}".removeprefix(f"{model.base_model_prefix}.")
            for renaming in renamings:
                renamed, _ = renaming.rename_source_key(renamed)
            if renamed != name:
                yield WeightRenaming(renamed, name)  # patterns; saving applies it backwards


def _hosts(record: RewriteRecord) -> dict[str, GraphHost]:
    return {} if record.graphs is None else hosts_from_json(record.graphs)


def _fitting(plan: Plan, model: Any) -> Plan:
    """The plan for a model with another head than the one that was rewritten, or without a head.

    transformers' heads have the model without a head under the name `base_model_prefix`, and loading adds or removes it.
    """
    prefix = model.base_model_prefix
    if _contains(model, plan) or not prefix:
        return plan
    for moved in (plan.relative_to(prefix), plan.moved_into(prefix)):
        if _contains(model, moved):
            return moved
    what = f"the saved plan names modules that {type(model).__name__} does not have: {plan.substitutions[0].site.path!r}, ..."
    raise CheckpointError(what, hint="load it with the class that was saved: `architectures` in config.json")


def _contains(model: nn.Module, plan: Plan) -> bool:
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    return all(binding.exit in modules for s in plan.substitutions for binding in s.site.bindings)


def _as_built(plan: Plan, model: nn.Module) -> Plan:
    """The plan with the dtype that the MLPs have in this model, for layers and for pools that had the dtype of theirs."""
    now = {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters(remove_duplicate=False)}
    dtypes, pools, substitutions = dict[str, str](), dict(plan.pools), []
    for substitution in plan.substitutions:
        site = substitution.site
        dtype = dtypes[site.dtype] = next((now[name] for name in site.parameters if name in now), site.dtype)
        substitutions.append(substitution.model_copy(update={"site": site.model_copy(update={"dtype": dtype})}))
    for name, spec in pools.items():
        if spec.dtype in dtypes:
            pools[name] = spec.model_copy(update={"dtype": dtypes[spec.dtype]})
    return plan.model_copy(update={"pools": pools, "substitutions": tuple(substitutions)})


def rewritten_data(directory: Path) -> dict[str, Any] | None:
    """The parsed config.json of a directory that transformers wrote of a rewritten model; None for any other directory.

    A directory that `save` wrote is read through its manifest only, also where that is damaged or missing.
    """
    if any(os.path.lexists(directory / name) for name in (MANIFEST, PLAN)):
        return None
    try:
        data = parse_json((directory / CONFIG).read_bytes())
    except (OSError, ValueError):  # no such file, or no JSON: what is wrong is found where it is needed
        return None
    return data if is_rewritten(data) else None


def load_rewritten(directory: Path, data: Mapping[str, Any]) -> nn.Module:
    """The model in a directory that transformers wrote, with the parsed config.json `data`; from safetensors only.

    Raises `CheckpointError` for a plan that does not fit, and weights that are missing, unexpected or of other shapes;
    `ModelError` for a config of which no model can be built.
    """
    found = needed_architecture(base_data(data), directory / CONFIG)
    change = {**(data.get(CHANGE) or {}), "quant_method": TYPE}
    _refuse_before_allocation(directory, found, record_from(change))
    found.config.quantization_config = change
    options = {"dtype": "auto", "local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    with quiet():
        try:
            model, info = found.kind.from_pretrained(directory, config=found.config, **options)
        except MemrewriteError:
            raise
        except Exception as error:  # transformers raises many classes, and passes on those of torch and safetensors
            what = f"transformers cannot load the rewritten model: {in_one_line(error)}"
            raise CheckpointError(what, where=str(directory), hint="copy the whole directory again") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[problem])):
            what = f"{len(names)} tensors of the files are {problem.removesuffix('_keys')}: {', '.join(names[:3])}"
            raise CheckpointError(what, where=str(directory), hint="copy the whole directory again")
    loaded: nn.Module = model.eval()
    return loaded


def _refuse_before_allocation(directory: Path, found: Architecture, record: RewriteRecord) -> None:
    """Raise `CheckpointError` for tensors of the plan that the files do not have, and if the memory does not suffice.

    Only the ends of names are compared: transformers converts names and tensors of the base when it saves.
    """
    headers = headers_in(directory, found)
    saved = {(_end(name), header.shape) for name, header in headers.items()}
    outline = found.outline(len(headers))
    before = set(state_of(outline))
    plan = plan_from(record.plan, directory / CONFIG)
    edit = substitute(outline, plan, hosts=_hosts(record), initialise=False, device=torch.device("meta"))
    for name, tensor in state_of(outline).items():
        if name not in before and (_end(name), tuple(tensor.shape)) not in saved:
            what = (
                f"{name!r} has the shape {tuple(tensor.shape)} by the plan, and no tensor of the files has this name and shape"
            )
            raise CheckpointError(what, where=str(directory), hint="copy the whole directory again")
    edit.commit()
    refuse_too_large(bytes_of(outline), torch.device("cpu"), directory / CONFIG)


def _end(name: str) -> str:
    """The last two parts of a tensor's name: its own, and that of its module."""
    return ".".join(name.split(".")[-2:])
