"""Loads what transformers saved of a rewritten model, by transformers' own classes: `AutoModel...from_pretrained`, pipelines.

Flow: config.json → `MemrewriteConfig`, registered for the type "memrewrite" → a config of the base that carries the rewrite →
for its class, every auto class gets a subclass of the base's model class → its constructor builds the base, then places the
layers of the plan, on meta or not, before transformers loads the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from memrewrite.errors import CheckpointError, MemrewriteError, in_one_line
from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.passes.sources.hugging_face import needed_architecture, quiet
from memrewrite.passes.sources.json_text import parse_json
from memrewrite.passes.storage.base_model import CONFIG
from memrewrite.passes.storage.graph_json import hosts_from_json
from memrewrite.passes.storage.rewritten_config import TYPE, base_data, carried, is_rewritten, with_rewrite
from memrewrite.passes.storage.saved_plan import plan_from
from memrewrite.passes.storage.unwrapped import set_record
from memrewrite.plans import Plan
from memrewrite.record import RewriteRecord
from memrewrite.training import freeze

_building = ContextVar("_building", default=False)  # in the constructor of a rewritten model


@cache
def auto_config() -> type:
    """The class that transformers reads a config.json of the type "memrewrite" with. No object of it exists."""
    import transformers

    class MemrewriteConfig(transformers.PreTrainedConfig):  # type: ignore[no-untyped-call]
        """Its `from_dict` returns a config of the base, which carries the rewrite."""

        model_type = TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Raises `CheckpointError` for a rewrite of a model type that transformers does not have."""
            return _config_from(config_dict, kwargs)

    return MemrewriteConfig


def register() -> None:
    """Make transformers' auto classes load rewritten models."""
    import transformers

    transformers.AutoConfig.register(TYPE, auto_config(), exist_ok=True)


def _config_from(data: dict[str, Any], options: dict[str, Any]) -> Any:
    import transformers

    if not is_rewritten(data):
        raise CheckpointError(f"config.json has no field {TYPE!r} with the plan", hint="save the model again")
    fields = base_data(data)
    name = str(fields["model_type"])
    if name not in list(transformers.CONFIG_MAPPING):
        what = f"the model was rewritten from the type {name!r}, which transformers {transformers.__version__} does not have"
        raise CheckpointError(what, hint="upgrade transformers")
    found = transformers.CONFIG_MAPPING[name].from_dict(fields, **options)
    config, *unused = found if isinstance(found, tuple) else (found,)
    config = with_rewrite(config, data[TYPE])
    kind: Any = type(config)
    _register_models(kind)
    return (config, *unused) if unused else config


@cache
def _register_models(kind: Any) -> None:
    """Register model classes for a class of configs that carry a rewrite, with every auto class that has one for its base."""
    for mapping in _mappings():
        if kind.base in mapping:
            found = mapping[kind.base]
            several = isinstance(found, (tuple, list))
            mapping.register(kind, tuple(map(model_class, found)) if several else model_class(found), exist_ok=True)


def _mappings() -> Iterator[Any]:
    from transformers.models.auto import modeling_auto

    for auto in vars(modeling_auto).values():
        mapping = vars(auto).get("_model_mapping") if isinstance(auto, type) else None
        if mapping is not None:
            yield mapping


@cache
def model_class(base: Any) -> Any:
    """A subclass of a model class whose constructor builds the rewritten model, as an object of `base` itself.

    A model with a head may build the model without it by an auto class: the outermost places all layers.
    """

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        outermost = not _building.get()
        token = _building.set(True)
        try:
            base.__init__(self, config, *args, **kwargs)
        finally:
            _building.reset(token)
        self.__class__ = base  # it can be pickled, and nothing sees another class
        record = carried(config)
        if outermost and record is not None:
            _rewrite(self, record)

    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (base,), {**names, "__init__": init})


def _rewrite(model: Any, record: RewriteRecord) -> None:
    """Place the layers of a recorded plan in a model that was built a moment ago."""
    plan = _as_built(_fitting(plan_from(record.plan, Path(CONFIG)), model), model)
    hosts = {} if record.graphs is None else hosts_from_json(record.graphs)
    constants = [f"{path}.{name}" for path, host in hosts.items() for name in host.constants]
    if constants:
        what = f"{len(constants)} constants of graphs are not in files that transformers writes: {', '.join(constants[:3])}"
        raise CheckpointError(what, hint="save with memrewrite.save, and load with memrewrite.load")
    on_meta = any(p.is_meta for p in model.parameters())
    substitute(model, plan, hosts=hosts, initialise=not on_meta).commit()
    set_record(model, RewriteRecord(plan=plan.model_dump_json(indent=1), recipe=record.recipe, graphs=record.graphs))
    if plan.train == "memory_only":
        freeze(model)


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
    """The parsed config.json of a directory that transformers wrote of a rewritten model; None for any other directory."""
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
    options = {"dtype": "auto", "local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    config = with_rewrite(found.config, data[TYPE])
    kind: Any = model_class(found.kind)
    with quiet():
        try:
            model, info = kind.from_pretrained(directory, config=config, **options)
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
