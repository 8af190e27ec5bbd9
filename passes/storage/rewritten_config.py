"""A config of transformers that carries a rewrite, so that whatever transformers saves can be loaded as rewritten again.

Flow of saving: `carry` gives a rewritten model such a config → `save_pretrained`, trainers and hubs write it. config.json
then has the `model_type` "memrewrite", which transformers alone does not know, so that it does not load the model without its
memory. The other fields are the base's own, and the rewrite is in the field for changes that are made before weights are
loaded: `quantization_config`. Flow of loading: `rewritten_model`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from memrewrite.plans import Plan
from memrewrite.record import RewriteRecord

TYPE = "memrewrite"  # `model_type` in config.json, and the method of the change
BASE_TYPE = "memrewrite_base_model_type"  # the field that has the base's `model_type`
CHANGE = "quantization_config"
AUTO_FILE, AUTO_CLASS = "memrewrite_auto", "MemrewriteConfig"
_AUTO_SOURCE = f'''"""Makes transformers load the memory layers: with `trust_remote_code=True`, or after `import memrewrite`."""

import memrewrite  # noqa: F401 - pip install memrewrite; the import registers the config
from transformers import CONFIG_MAPPING

{AUTO_CLASS} = CONFIG_MAPPING["{TYPE}"]
'''
_FIELD = "_memrewrite"  # of the config object; not among the fields that `to_dict` returns


def carry(model: nn.Module, record: RewriteRecord, done: Callable[[Callable[[], object]], None]) -> None:
    """Make the config of a rewritten model of transformers carry `record`; no effect on other models.

    The model gets a copy of its config, in all modules that share it: other models may have been built from the same object.
    `done` receives what undoes this.
    """
    if not is_transformers_model(model):
        return
    config: Any = model.config
    carrying = copy.copy(config)
    if not isinstance(config, _Carrying):
        base: Any = type(config)
        carrying.__class__ = _carrying_class(base)
    carrying.__dict__[_FIELD] = rewrite_data(record)
    for module in model.modules():
        if vars(module).get("config") is config:
            module.config = carrying
            done(partial(setattr, module, "config", config))


def is_transformers_model(model: nn.Module) -> bool:
    """True for a model whose class is one of transformers itself: its config builds it again."""
    return type(model).__module__.startswith("transformers.") and hasattr(model, "config")


def is_rewritten(data: Any) -> bool:
    """True for a parsed config.json that carries a rewrite."""
    return isinstance(data, Mapping) and data.get("model_type") == TYPE and BASE_TYPE in data


def base_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json as transformers would write it for the base, without the rewrite."""
    fields = with_base_type(data)
    change = fields.get(CHANGE)
    if isinstance(change, Mapping) and change.get("quant_method") == TYPE:
        del fields[CHANGE]
    return fields


def with_base_type(data: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json with the type of the base, for the class of its config."""
    if not is_rewritten(data):
        return dict(data)
    others = {key: value for key, value in data.items() if key not in (BASE_TYPE, "auto_map")}
    return others | {"model_type": data[BASE_TYPE]}


def rewrite_data(record: RewriteRecord) -> dict[str, Any]:
    """What of a record is in a config: plain data."""
    graphs = None if record.graphs is None else json.loads(record.graphs)
    plan = Plan.model_validate_json(record.plan)  # complete: a plan of an earlier version lacks fields
    return {"quant_method": TYPE, "plan": plan.model_dump(mode="json"), "recipe": record.recipe, "graphs": graphs}


def record_from(data: Mapping[str, Any]) -> RewriteRecord:
    """The record in a config. It may come from a file: readers of its parts check them."""
    graphs = data.get("graphs")
    text = None if graphs is None else json.dumps(graphs, indent=1)
    return RewriteRecord(plan=json.dumps(data.get("plan"), indent=1), recipe=data.get("recipe"), graphs=text)


class _Carrying:
    """What a config class gets so that its objects carry a rewrite; only files that it writes show it."""

    base: type

    def to_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        fields.pop(_FIELD, None)
        return fields

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        data = json.loads(self.to_json_string(use_diff=use_diff))  # type: ignore[attr-defined]
        rewrite = vars(self).get(_FIELD)
        if rewrite is not None:
            auto = {"AutoConfig": f"{AUTO_FILE}.{AUTO_CLASS}"}
            data |= {"model_type": TYPE, BASE_TYPE: data["model_type"], "auto_map": auto, CHANGE: rewrite}
            Path(json_file_path).with_name(f"{AUTO_FILE}.py").write_text(_AUTO_SOURCE, encoding="utf-8")
        Path(json_file_path).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self).base, vars(self))


def _restored(base: Any, fields: dict[str, Any]) -> Any:
    config: Any = object.__new__(_carrying_class(base))
    config.__dict__.update(fields)
    return config


@cache
def _carrying_class(base: Any) -> Any:
    """The class of configs of the class `base` that carry a rewrite.

    It has the name of the base, by which transformers finds models, tokenizers and processors.
    """
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (_Carrying, base), {**names, "base": base})
