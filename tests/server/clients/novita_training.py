"""What an application of Novita's customers does: uploads, trains, watches, generates.

Arguments: the address of the API, where to leave pictures, and the photographs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from novita_client import NovitaClient, Txt2ImgV3LoRA

address, target, *photographs = sys.argv[1:]
client = NovitaClient("any-key", address)
task = client.create_training_subject(
    name="a subject",
    base_model="v1-5-pruned-emaonly",
    images=photographs,
    instance_prompt="a close photo of ohwx person",
    class_prompt="person",
    width=64,
    height=64,
    learning_rate="1e-4",
    max_train_steps=3,
    seed=7,
)
states: list[str] = []
while states[-1:] not in (["SUCCESS"], ["FAILED"]):
    status = client.query_training_subject_status(task)
    states.append(status.task_status)
    time.sleep(0.2)
(listed,) = [found for found in client.list_training() if found.task_id == task]
(model,) = listed.models
pictures = client.txt2img_v3(
    model_name="v1-5-pruned-emaonly.safetensors",
    prompt="a photo of ohwx person",
    image_num=2,
    width=128,
    height=128,
    steps=2,
    seed=5,
    loras=[Txt2ImgV3LoRA(model.model_name, 0.7)],
)
for number, content in enumerate(pictures.images_encoded or []):
    (Path(target) / f"{number}.txt").write_text(content)
print(
    json.dumps(
        {
            "states": list(dict.fromkeys(states)),
            "model": {"name": model.model_name, "status": model.model_status},
            "pictures": [image.image_url for image in pictures.images],
        }
    )
)
