"""Reads exported programs (`.pt2` archives), also in a process that has not imported the classes of their outputs."""

from __future__ import annotations

import pkgutil
import re
import zipfile
from pathlib import Path

import torch
from torch.export import ExportedProgram

CONTAINER = re.compile(rb'\\"type\\": \\"([\w.]+)\\"')  # in the specs of inputs and outputs, which are JSON in a JSON string


def read_program(file: Path) -> ExportedProgram:
    """The program in `file`, which must be trusted: it may contain pickles, and the modules that it names are imported.

    Classes that a library registers with torch when it is imported, such as Hugging Face outputs, are imported first. Raises
    ImportError or AttributeError where there is no such class, and what `torch.export.load` raises.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            graphs = [name for name in archive.namelist() if name.endswith("models/model.json")]
            for name in {name for graph in graphs for name in CONTAINER.findall(archive.read(graph))}:
                pkgutil.resolve_name(name.decode())
    return torch.export.load(file)
