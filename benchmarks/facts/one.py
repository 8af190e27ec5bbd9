"""One run, in a process of its own: `one.py SETTING` with a setting as JSON; the record is printed as JSON.

The record has the processor time of the whole process, start and evaluation included, besides what `train.run` returns.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from settings import Setting
from train import run

torch.set_num_threads(1)
record = run(Setting(**json.loads(sys.argv[1])))
print(json.dumps(record | {"processor_seconds": time.process_time()}))
