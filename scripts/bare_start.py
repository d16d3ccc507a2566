"""Imports torch and diffusers and reads a base model's weights once, for bench_start.py.

Nothing of the trainer is here: what this takes is what no training can start without. Prints the
time at which it was done.
"""

import json
import sys
import time
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    # diffusers imports a pipeline, with all that it needs, when it is named.
    getattr(diffusers, json.loads((folder / "model_index.json").read_text())["_class_name"])
    with torch.inference_mode():
        for path in sorted(folder.rglob("*.safetensors")):
            for tensor in load_file(path).values():
                # What is mapped into memory is read when it is touched.
                tensor.view(torch.uint8).flatten()[::4096].sum()
    print(time.time())
