"""What an application of fal's customers does: uploads, trains, watches, downloads.

Arguments: the archive, where to leave the results, and further fields of the request as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fal_client
import requests

archive, target, fields = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])

address = fal_client.upload_file(archive)
handle = fal_client.submit(
    "fal-ai/personalization",
    arguments={"images_data_url": address, "photo_class": "Person", **fields},
)
lines: list[str] = []
states: list[str] = []
for update in handle.iter_events(with_logs=True):
    states.append(type(update).__name__)
    for entry in (getattr(update, "logs", None) or [])[len(lines) :]:
        lines.append(entry["message"])
result = handle.get()
for file in result.values():
    if isinstance(file, dict) and "url" in file:
        (target / file["file_name"]).write_bytes(requests.get(file["url"], timeout=60).content)
print(
    json.dumps(
        {
            "result": result,
            "lines": lines,
            "states": list(dict.fromkeys(states)),
            "patched": "trainer.compat" in sys.modules or "trainer" in sys.modules,
        }
    )
)
