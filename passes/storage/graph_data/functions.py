"""The functions that graphs.json can name, and which arguments each may have.

They are operators of ATen that compute tensors from tensors, the forward operators of memory layers, and arithmetic on numbers.
A name is looked up in tables and in torch's registry of operators; nothing is imported.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from memrewrite.errors import ModelError
from memrewrite.passes.storage.graph_data.arithmetic import NUMBER_FUNCTIONS, result_of_numbers
from memrewrite.passes.storage.graph_data.fields import Malformed, shown
from memrewrite.passes.storage.graph_data.results import NUMBER, TENSOR, TENSORS, Result

GETITEM = "_operator.getitem"  # of the results of an operator
MEMORY = ("sparse_lookup", "sparse_dots", "product_keys", "product_key_topk")
# The operators of ATen whose names begin with an underscore and that torch.export writes. The others are parts of kernels,
# which do not check their arguments, or are of no use in a forward.
PRIVATE = """
    __and__ __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__ __ixor__ __ilshift__ __irshift__ _adaptive_avg_pool2d
    _adaptive_avg_pool3d _addmm_activation _aminmax _batch_norm_no_update _batch_norm_with_update _cast_Byte _cast_Char
    _cast_Double _cast_Float _cast_Half _cast_Int _cast_Long _cast_Short _cdist_forward _chunk_cat _conj _conj_physical
    _convolution _convolution_mode _embedding_bag _euclidean_dist _fft_c2c _fft_c2r _fft_r2c _fused_rms_norm _grouped_mm _int_mm
    _is_all_true _is_any_true _linalg_det _linalg_eigh _linalg_slogdet _linalg_solve_ex _linalg_svd _local_scalar_dense
    _log_softmax _logcumsumexp _masked_softmax _native_batch_norm_legit _native_batch_norm_legit_functional
    _native_batch_norm_legit_no_training _native_multi_head_attention _neg_view _pad_circular _pad_enum _prelu_kernel
    _reshape_alias _safe_softmax _scaled_dot_product_attention_math _scaled_dot_product_cudnn_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_grouped_mm _scaled_mm _shape_as_tensor _softmax _stack _to_copy
    _transformer_encoder_layer_fwd _trilinear _unique2 _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_int4pack_mm _weight_int8pack_mm
    _weight_norm
"""
# Names of operators that change the storage of a tensor, read memory that their arguments describe without a check,
# differentiate, or are of one library.
REFUSED = re.compile(
    r"from_file|resize|sparse|nested|jagged|quantized|quantize_per|_backward|mkldnn|fbgemm|cudnn|miopen|mps_|vulkan|qscheme"
    r"|pin_memory|record_stream|requires_grad_|retain_grad|^set_?$|^set_data$|_seed$|^seed$"
)
TO_NUMBER = ("sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "item", "_local_scalar_dense")
# The arguments that are text: a choice of the operator, or the equation of einsum.
TEXTS = """
    equation approximate rounding_mode reduce norm pad_mode mode indexing side ord p UPLO driver padding padding_side
    interpolation backend gradient
"""


def name_of(target: Any) -> str:
    """The name of a function in graphs.json. Raises `ModelError` for a function that cannot be written."""
    if isinstance(target, OpOverload):
        return f"torch.ops.{target}"
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
    if name == GETITEM or name in NUMBER_FUNCTIONS:
        return name
    raise ModelError(f"a graph that calls {target!r} cannot be saved")


def function_named(name: str, *, trust_code: bool) -> Callable[..., Any]:
    """The function of a name of `name_of`. Raises `Malformed` for any other name.

    `trust_code` allows every operator that is registered in this process, those of other libraries too.
    """
    if name in NUMBER_FUNCTIONS:
        return NUMBER_FUNCTIONS[name].function
    if name == GETITEM:
        return operator.getitem
    found = re.fullmatch(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)", name, re.ASCII)
    overload: Any = torch.ops
    for part in found.groups() if found else ():
        overload = getattr(overload, part, None)
    if not isinstance(overload, OpOverload) or f"torch.ops.{overload}" != name:
        raise Malformed(f"it names the function {shown(name)}, which is not allowed")
    why = None if trust_code else _why_not(overload)
    if why is not None:
        raise Malformed(f"it names the operator {shown(name)}, which is not allowed: {why}")
    return overload


def _why_not(overload: OpOverload) -> str | None:
    """Why a file may not name an operator, or None if it may."""
    schema = overload._schema
    namespace, _, name = schema.name.partition("::")
    if namespace == "memrewrite":
        return None if name in MEMORY else "it is no operator of a forward"
    if namespace != "aten":
        return "it is of another library (allowed with --trust-code, load(..., trust_code=True))"
    if REFUSED.search(name) or (name.startswith("_") and name not in PRIVATE.split()):
        return "it is no operator of a forward"
    returns = [_kind(str(each.real_type)) for each in schema.returns]
    if not returns or None in returns or (NUMBER in returns and name not in TO_NUMBER):
        return "it does not compute tensors"
    return None


def result_of(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], known: Mapping[fx.Node, Result]
) -> Result:
    """What a call returns; `known` are the results of the nodes among its arguments.

    Raises `Malformed` for arguments that the function does not take.
    """
    if isinstance(function, OpOverload):
        return _result_of_operator(function, args, kwargs, known)
    if kwargs:
        raise Malformed("it has keyword arguments, and a function of numbers has none")
    if function is operator.getitem:
        return _result_of_getitem(args, known)
    return result_of_numbers(function, args, known)


def _result_of_getitem(args: Sequence[Any], known: Mapping[fx.Node, Result]) -> Result:
    if len(args) != 2 or not isinstance(args[0], fx.Node) or type(args[1]) is not int or args[1] < 0:
        raise Malformed(f"getitem takes the result of a node and a number, and this one has {shown(tuple(args))}")
    source, index = known[args[0]], args[1]
    if source.kind == "tensors":
        return TENSOR
    if index >= len(source.parts):
        raise Malformed(f"getitem takes the item {index} of a result that has {len(source.parts)} items")
    return source.parts[index]


def _result_of_operator(
    overload: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], known: Mapping[fx.Node, Result]
) -> Result:
    schema = overload._schema
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    if len(args) > len(positional):
        raise Malformed(f"it has {len(args)} arguments, and {overload} takes {len(positional)}")
    given = {argument.name: value for argument, value in zip(positional, args, strict=False)}
    twice = given.keys() & kwargs.keys()
    if twice:
        raise Malformed(f"it has the argument {shown(min(twice))} twice")
    given |= kwargs
    if any(keyword.iskeyword(name) for name in kwargs):
        raise Malformed("it has an argument by a keyword of Python, which must be given by position")
    for argument in schema.arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                raise Malformed(f"it lacks the argument {argument.name!r} of {overload}")
            continue
        value, kind = given.pop(argument.name), str(argument.real_type)
        if not _fits(kind, value, known) and not (getattr(argument, "N", None) and _fits(_item(kind), value, known)):
            raise Malformed(f"the argument {argument.name!r} of {overload} is {shown(value)}, and must be {kind}")
        if isinstance(value, str) and argument.name not in TEXTS.split():
            raise Malformed(f"the argument {argument.name!r} of {overload} may be no text")
    if given:
        raise Malformed(f"{overload} has no argument {shown(min(given))}")
    returns = [_kind(str(each.real_type)) or Result("other") for each in schema.returns]
    return returns[0] if len(returns) == 1 else Result("several", tuple(returns))


def _kind(name: str) -> Result | None:
    """What a type of a schema is; None if graphs have no such values."""
    kinds = {"Tensor": TENSOR, "List[Tensor]": TENSORS}
    return kinds.get(name) or (NUMBER if name in ("int", "float", "bool", "number") else None)


def _item(kind: str) -> str:
    """The type of one item, which an operator takes in place of a list of a fixed length."""
    return kind.removeprefix("Optional[").removeprefix("List[").rstrip("]")


def _fits(kind: str, value: Any, known: Mapping[fx.Node, Result]) -> bool:
    """Whether a value is of a type of a schema."""
    if kind.startswith("Optional["):
        return value is None or _fits(kind.removeprefix("Optional[")[:-1], value, known)
    if isinstance(value, fx.Node):
        result = known[value]
        return result == _kind(kind) or (result.kind == "number" and kind in (*NUMBERS, "Tensor"))
    if kind.startswith("List["):
        inner = kind.removeprefix("List[")[:-1]
        return isinstance(value, (list, tuple)) and all(_fits(inner, item, known) for item in value)
    in_range = kind == "number" or type(value) is not int or -(2**63) <= value < 2**63  # a scalar may also be a uint64
    return in_range and type(value) in CLASSES.get(kind, ())


NUMBERS = ("int", "float", "bool", "number")
CLASSES: dict[str, tuple[type[Any], ...]] = {
    "Tensor": (int, float, bool),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "number": (int, float, bool),
    "str": (str,),
    "Device": (torch.device,),
    "ScalarType": (torch.dtype,),
    "Layout": (torch.layout,),
    "MemoryFormat": (torch.memory_format,),
}
