"""Exported programs on disk: a `.pt2` archive, read in a process that may not know yet what its outputs are made of."""

from __future__ import annotations

import pkgutil
import re
import zipfile
from pathlib import Path

import torch
from torch.export import ExportedProgram

CONTAINER = re.compile(rb'\\"type\\": \\"([\w.]+)\\"')  # in the specs of inputs and outputs, which are JSON inside of JSON


def read_program(file: Path) -> ExportedProgram:
    """The program in `file`, a file to be trusted: its archive may hold pickles, and it names modules that are imported.

    A class that a library's import registers with torch, such as a Hugging Face output, is imported first. Raises
    ImportError or AttributeError where there is no such class, and what `torch.export.load` raises.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            graphs = [name for name in archive.namelist() if name.endswith("models/model.json")]
            for found in {name for graph in graphs for name in CONTAINER.findall(archive.read(graph))}:
                pkgutil.resolve_name(found.decode())
    return torch.export.load(file)
