"""All rows of the matrix, in the order of the sections, and what the code behind them knows of.

Where not every family is asked for, pictures, masks, captions, update rules and names of files are
looked at in one family each: that code never meets a family. What knows no more than the kind of
family is looked at in one of each kind: the forms of an adapter other than LoRA are PEFT's, and
meet linear layers and convolutions in UNets or linear layers alone in transformers; objective,
loss and the halves of a batch are of DDPM in `sd15` and `sdxl`, of rectified flow in `flux` and
`flux2`. Everything else is looked at in all families.
"""

from __future__ import annotations

from collections.abc import Mapping

from options.matrix import Observable, Row, knowing
from options.rows_adapter import ADAPTER
from options.rows_captions import CAPTION
from options.rows_data import DATA
from options.rows_faces import FACE
from options.rows_frozen import FROZEN
from options.rows_loss import LOSS
from options.rows_masks import MASK
from options.rows_model import MODEL
from options.rows_optim import OPTIM
from options.rows_output import OUTPUT
from options.rows_refusals import NOT_TAKEN
from options.rows_running import RUN
from options.rows_tokens import PRIORS, TOKEN
from options.rows_watching import SAMPLE
from options.rows_whole import WHOLE_ROWS
from options.rows_windows import WINDOWS

# Seen on a GPU alone, and in what: tests/test_frozen.py, tests/reliability/test_same_bytes.py,
# tests/test_pace.py and tests/test_recording.py look at what they do.
ON_A_GPU = {
    "offload_models": "memory",
    "offload_blocks": "memory",
    "deterministic": "arithmetic",
    "tf32": "arithmetic",
    "cuda_graph": "time",
}

_SIZES = ("resolution_width", "resolution_height")

ROWS: tuple[Row, ...] = (
    *MODEL,
    *knowing("nothing", DATA),
    *knowing("nothing", WINDOWS, family=(*_SIZES, "cache_latents")),
    *knowing("nothing", MASK),
    *knowing("nothing", FACE),
    *knowing("nothing", CAPTION),
    *TOKEN,
    *(row for row in ADAPTER if row.form == "lora"),
    *knowing("kind", (row for row in ADAPTER if row.form != "lora")),
    *knowing("kind", PRIORS, family=("class_inference_steps", "class_guidance_scale")),
    *knowing("kind", LOSS, family=("guidance_scale",)),
    *knowing("nothing", OPTIM, family=("text_encoder_lr",)),
    *knowing(
        "nothing", RUN, family=("mixed_precision", "gradient_checkpointing", "checkpointing_share")
    ),
    *knowing("nothing", SAMPLE, family=("validation_prompts",)),
    *knowing("nothing", OUTPUT, family=("save_dtype", "extract_rank", "kohya_dora")),
    *knowing("kind", WHOLE_ROWS),
    *knowing("kind", FROZEN),
    *knowing("nothing", NOT_TAKEN),
)


def observables() -> Mapping[str, tuple[Observable, ...]]:
    """For every leaf with a row, where its effect is seen, each place once."""
    found: dict[str, dict[Observable, None]] = {}
    for row in ROWS:
        found.setdefault(row.leaf, {}).update(dict.fromkeys(row.acts_on))
    return {leaf: tuple(places) for leaf, places in found.items()}
