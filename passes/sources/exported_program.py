"""Reads exported programs (`.pt2` archives), also in a process that has not imported the classes of their outputs."""

from __future__ import annotations

import pkgutil
import re
import zipfile
from pathlib import Path

import torch
from torch.export import ExportedProgram

from memrewrite.errors import ModelError, UserError, in_one_line
from memrewrite.passes.sources.python_file import require_trust

CONTAINER = re.compile(rb'\\"type\\": \\"([\w.]+)\\"')  # in the specs of inputs and outputs, which are JSON in a JSON string


def read_program(file: Path, *, trust_code: bool, kind: type[UserError] = ModelError) -> ExportedProgram:
    """The program in `file`, which must be trusted: it may contain pickles, and the modules that it names are imported.

    Classes that a library registers with torch when it is imported, such as Hugging Face outputs, are imported first. Raises
    `kind` without `trust_code`, and for an archive that cannot be read.
    """
    require_trust(
        trust_code,
        f"{file.name!r} may contain pickles, which run code when they are loaded",
        where=file,
        kind=kind,
    )
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                graphs = [name for name in archive.namelist() if name.endswith("models/model.json")]
                for name in {name for graph in graphs for name in CONTAINER.findall(archive.read(graph))}:
                    pkgutil.resolve_name(name.decode())
        return torch.export.load(file)
    except Exception as error:  # torch raises many classes for a damaged archive
        what, hint = f"the exported program cannot be read: {in_one_line(error)}", "save it again with torch.export.save"
        raise kind(what, where=str(file), hint=hint) from error
