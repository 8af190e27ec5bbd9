"""One run, in a process of its own: `one.py SETTING` with a setting as JSON; the record is printed as JSON."""

from __future__ import annotations

import json
import sys

import torch
from settings import Setting
from train import run

torch.set_num_threads(1)
print(json.dumps(run(Setting(**json.loads(sys.argv[1])))))
