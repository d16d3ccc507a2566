"""Trains several configurations in shards, in each process that a launcher starts.

Usage: sharded_processes.py FILE FOLDER. FILE is JSON, name to leaves, and `deliver` to the names
whose files are written, too. A name that ends in `again`
goes on with the run of that name from the checkpoint before its last, which is kept as
NAME.before. The main process leaves what
was seen in FOLDER as NAME.json, and the weights of the last checkpoint stand in the run's folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import losses, never
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trainer import engine, results, shards
from trainer.job import RunFolder
from trainer.looking import looks_of
from trainer.processes import Launched
from trainer.resolve import Layer, resolve

AGAIN = " again"


def rows_come_and_go() -> bool:
    """Whether tensors with few and odd rows are taken apart and put together to the bit."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fine = True
    for rows in (1, 2, 5):
        whole = torch.arange(rows * 3.0).view(rows, 3)
        like = distribute_tensor(whole, mesh, [Shard(0)])
        own = shards.part(like)
        fine &= torch.equal(shards.part_of(whole, like), own)
        fine &= torch.equal(shards.whole(own, like), whole)
        fine &= torch.allclose(shards.norm([like]), whole.norm())
    return fine


def train_one(leaves: dict[str, Any], run: Path, *, deliver: bool) -> dict[str, Any]:
    """Trains a configuration, delivers its files where that is wanted, and tells what was seen."""
    folder = RunFolder(run)
    config = resolve([Layer("test", leaves, explicit=True)])
    with Launched(config.run.rank_timeout, folder, never) as processes:
        composing = engine.compose(config, folder, processes)
        while True:
            try:
                next(composing)
            except StopIteration as end:
                composed = end.value
                break
        training = composed.training
        processes.wait()
        list(training.resume(folder))
        sharded = [p for p in training.denoiser.parameters() if shards.is_sharded(p)]
        facts = {
            "part": sum(shards.part(parameter).numel() for parameter in sharded),
            "whole": sum(parameter.numel() for parameter in sharded),
            "odd": rows_come_and_go() if processes.count > 1 else None,
        }
        looks = looks_of(composed.config, training, composed.held_out, folder)
        facts["losses"] = losses(list(training.steps(folder, never, looks)))
        training.put_together()
        processes.wait()
        if deliver and processes.is_main:
            made = composed.config, composed.base, composed.precision
            list(results.deliver(*made, training, folder))
        processes.wait()
    return facts if processes.is_main else {}


def main() -> None:
    """Trains every configuration of the file."""
    file, folder = map(Path, sys.argv[1:])
    content = json.loads(file.read_text())
    for name, leaves in content["trainings"].items():
        run = folder / f"{name.removesuffix(AGAIN)}.run"
        if name.endswith(AGAIN) and os.environ["RANK"] == "0":
            (run / "checkpoints/step-4").rename(folder / f"{name}.before")
        facts = train_one(leaves, run, deliver=name in content["deliver"])
        if facts:
            (folder / f"{name}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
