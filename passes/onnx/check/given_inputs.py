"""Inputs for a comparison that are read from files: the user's arrays, and sentences for the tokenizer of a model's directory.

Both are data: nothing in them is unpickled, imported or run. What an archive claims to contain is checked before it is read.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from memrewrite.errors import ExportError, in_one_line
from memrewrite.passes.onnx.check.input_sets import NEW, PAST, Feeds, InputSet, evaluated, lengths_of
from memrewrite.passes.onnx.file import Port
from memrewrite.passes.sources.json_text import parse_json
from memrewrite.passes.texts.tokenizer import COPY, TOKENIZER, file_text, unreadable

SETTINGS = "tokenizer_config.json"
MOST_BYTES = 2**32  # of all arrays in an archive: a few bytes may expand to any number
SENTENCES = (
    "A memory layer reads a few rows.",
    "Short.",
    "Where is the river, and why?",
    "x = [1, 2, 3]; print(sum(x))",
)


def real_inputs(real: Sequence[str | Path | Mapping[str, Any]], ports: Sequence[Port], example: Feeds) -> list[InputSet]:
    """The user's inputs: arrays by input name, or `.npz` files of arrays. Raises `ExportError` if they do not fit the file."""
    found = []
    for number, source in enumerate(real):
        where = f"real input {number}" if isinstance(source, Mapping) else str(source)
        arrays = source if isinstance(source, Mapping) else arrays_of(Path(source))
        feeds = {name: _tensor(name, array, where) for name, array in arrays.items()}
        lengths = lengths_of(ports, feeds, where)
        for name, known in example.items():
            if feeds[name].is_floating_point() != known.is_floating_point():
                raise ExportError(f"{name} is {known.dtype} in the file, and {feeds[name].dtype} in {where}")
        converted = {name: feeds[name].to(example[name].dtype) for name in example}
        found.append(InputSet(where, lengths, converted, required=True))
    return found


def _tensor(name: str, array: Any, where: str) -> Tensor:
    try:
        return torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:  # objects, text, lists of unequal lengths
        what = f"{str(name)[:100]!r} of {where} is no array of numbers: {in_one_line(error, kind=False)}"
        raise ExportError(what, hint="give an array of numbers") from error


def arrays_of(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of numbers in an archive that `numpy.savez` wrote. Raises `ExportError` for any other file."""
    hint = "numpy.savez(path, input_ids=..., ...)"
    if path.exists() and not path.is_file():  # a pipe or a device may have no end
        raise ExportError("the inputs cannot be read: it is no file", where=str(path), hint=hint)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if (size := sum(member.file_size for member in members)) > MOST_BYTES:
                what = f"the inputs have {size} bytes; at most {MOST_BYTES} are read"
                raise ExportError(what, where=str(path), hint="give fewer inputs")
            found = {}
            for member in members:
                with archive.open(member) as stream:
                    found[member.filename.removesuffix(".npy")] = _array(stream, member.file_size)
            return found
    except ExportError:
        raise
    except Exception as error:  # zipfile, numpy and the decompressors raise many classes for a damaged archive
        raise ExportError(f"the inputs cannot be read: {in_one_line(error)}", where=str(path), hint=hint) from error


def _array(stream: IO[bytes], size: int) -> NDArray[Any]:
    """An array in numpy's format, of a member with `size` bytes. Raises ValueError unless it is complete, and of numbers."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(stream)
    if version not in readers:
        raise ValueError(f"an array is in version {version} of the format")
    shape, is_transposed, dtype = readers[version](stream)
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise ValueError(f"an array of {dtype} is no array of numbers that torch has")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or stream.tell() + count * dtype.itemsize != size:
        raise ValueError(f"an array of the shape {shape} is incomplete")
    flat = np.frombuffer(stream.read(), dtype, count)
    return flat.reshape(shape, order="F" if is_transposed else "C").astype(dtype.newbyteorder("="))


def text_inputs(directory: str | Path, ports: Sequence[Port]) -> list[dict[str, Tensor]]:
    """Built-in sentences, encoded by `tokenizer.json` in `directory`, for a file whose inputs are only texts and a cache.

    One batch padded to the longest sentence, or one set for each sentence if padding is not possible. `[]` if the file has
    other inputs or the directory has no tokenizer. Raises `ExportError` if the tokenizer is damaged.
    """
    names = {port.name for port in ports if not port.name.startswith("past_key_values.")}
    known = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
    folder = Path(directory)
    text = file_text(folder, TOKENIZER, ExportError) if "input_ids" in names and names <= known else None
    if text is None:
        return []
    from tokenizers import Tokenizer

    settings = _settings(folder)
    try:
        tokenizer = Tokenizer.from_str(text)
        padding = next((key for key in ("pad_token", "eos_token") if _id(tokenizer, settings.get(key)) is not None), None)
        if padding is None or "attention_mask" not in names:
            tokenizer.no_padding()
            batches = [[sentence] for sentence in SENTENCES]
        else:
            side = "left" if settings.get("padding_side") == "left" else "right"
            tokenizer.enable_padding(direction=side, pad_id=_id(tokenizer, settings[padding]))
            batches = [list(SENTENCES)]
        encoded = [tokenizer.encode_batch(batch) for batch in batches]
    except Exception as error:  # of `tokenizers`, which raises plain `Exception`
        what = f"the tokenizer cannot be read: {in_one_line(error)}"
        raise ExportError(what, where=str(folder / TOKENIZER), hint=COPY) from error
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    return [
        _as_text({name: torch.tensor([getattr(one, field) for one in batch]) for name, field in fields.items()}, ports)
        for batch in encoded
    ]


def _settings(folder: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` contains; nothing if there is none."""
    text = file_text(folder, SETTINGS, ExportError)
    try:
        data = {} if text is None else parse_json(text)
    except ValueError as error:
        raise unreadable(folder / SETTINGS, error, ExportError) from error
    return data if isinstance(data, dict) else {}


def _id(tokenizer: Any, token: Any) -> int | None:
    """The number of a special token, which is text or an object with the text."""
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _as_text(encoded: Mapping[str, Tensor], ports: Sequence[Port]) -> dict[str, Tensor]:
    """All inputs of a file for a tokenized batch: positions count the tokens that are not padding, and the cache is empty."""
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    values = {**encoded, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    lengths = {"batch": len(ids), NEW: ids.shape[1], PAST: 0}
    empty = {port.name: torch.zeros([evaluated(dim, lengths) or 0 for dim in port.shape]) for port in ports}
    return {port.name: values.get(port.name, empty[port.name]) for port in ports}
