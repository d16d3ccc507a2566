"""What starts a script: the options of `accelerate launch` and of `torchrun`, each with its end.

Source: `commands/launch.py` and `utils/launch.py` of accelerate, `torch.distributed.run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config_files import parse_json, parse_yaml
from trainer.errors import InputError
from trainer.importers import reasons
from trainer.importers.desk import Desk, Row, Table
from trainer.importers.documents import Document
from trainer.importers.rows import belonging, chosen, computed, needless, secret, without
from trainer.importers.words import PRECISIONS
from trainer.leaves import nearest

ACCELERATE = "accelerate"
_DEEPSPEED = f"{ACCELERATE} --use_deepspeed"
_FILE = "config_file"
_DEEPSPEED_FILE = "deepspeed_config_file"
_PRECISION = "mixed_precision"
# Options that say how many processes there are, or how many machines have as many.
_PROCESSES = ("num_processes", "nproc_per_node", "num_gpus")
_MACHINES = ("nnodes", "num_nodes")
# What a file of accelerate's says that its command line can say, too.
_IN_FILE = (
    *(_PRECISION, "num_processes", "num_machines"),
    *("gradient_accumulation_steps", "gradient_clipping", _DEEPSPEED_FILE),
)
_PARADIGMS: Mapping[str, str] = {
    "DEEPSPEED": "use_deepspeed",
    "FSDP": "use_fsdp",
    "MEGATRON_LM": "use_megatron_lm",
}
_STARTED = "is of how processes are started: see docs/processes.md"
_SHARDS = "what is shared out among GPUs, FSDP2 shares out here: see docs/processes.md"
_DEVICE = "the GPU of this machine is taken, else its processor"
_SPEED = "changes only how fast it is computed"
_OF_DEEPSPEED = "is of DeepSpeed, which is not here"


@dataclass(frozen=True)
class Launcher:
    """What a command line says of how its script is started.

    Args:
        program: that starts it.
        options: of that program, with what a file says that they name.
        is_file_gone: whether they name a file that is not here.
    """

    program: str
    options: Mapping[str, Any]
    is_file_gone: bool = False

    @property
    def processes(self) -> int | None:
        """Processes that it starts; None where it does not say how many."""
        given = next((self.options[n] for n in _PROCESSES if n in self.options), None)
        if given is None and self.program not in ("python", "torchrun"):
            return None
        # Without a number accelerate and deepspeed take every GPU, torchrun and Python one.
        given = 1 if given is None else given
        machines = next((self.options[n] for n in _MACHINES if n in self.options), 1)
        counted = _count(given) * _count(machines)
        return counted or None

    @property
    def is_precision_open(self) -> bool:
        """Whether accelerate's own configuration may say a number format that is not known here."""
        knows_all = _FILE in self.options and not self.is_file_gone
        knows_all &= _DEEPSPEED_FILE not in self.options
        return self.program == ACCELERATE and _PRECISION not in self.options and not knows_all


def launcher_of(document: Document) -> Launcher:
    """The launcher of a command line; what a file says yields to the command line."""
    options = dict(document.launcher or {})
    if document.starter != ACCELERATE or _FILE not in options:
        return Launcher(document.starter, options)
    name = Path(str(options[_FILE]))
    file = next((p for p in (name, document.folder / name) if _is_file(p)), None)
    if file is None:
        return Launcher(document.starter, options, is_file_gone=True)
    return Launcher(document.starter, {**_said_in(file), **options})


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _said_in(file: Path) -> dict[str, Any]:
    """What a file of accelerate's says of numbers and processes.

    Raises:
        InputError: it cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError.of(str(file), "cannot be read as UTF-8 text", "check it") from error
    parse = parse_json if file.suffix.lower() == ".json" else parse_yaml
    content = dict(parse(text, str(file)))
    deepspeed = content.get("deepspeed_config")
    content = {**(deepspeed if isinstance(deepspeed, Mapping) else {}), **content}
    said = {name: content[name] for name in _IN_FILE if content.get(name) is not None}
    paradigm = _PARADIGMS.get(str(content.get("distributed_type")).upper())
    return {**said, **({paradigm: True} if paradigm else {})}


def tell_launcher(desk: Desk, launcher: Launcher, *, own_precision: str = "") -> None:
    """Says what becomes of each option of a launcher, under its own name.

    Args:
        own_precision: why its number format does not count; empty where it does, unless the
            script is given one.
    """
    named = {f"{launcher.program} --{name}": name for name in launcher.options}
    values = {label: launcher.options[name] for label, name in named.items()}
    if desk.given.get(_PRECISION) is not None:
        own_precision = own_precision or "the script's own option goes before it"
    desk.given = {**desk.given, **values}
    for label, name in named.items():
        if name == _PRECISION and own_precision:
            desk.leave(label, own_precision, matters=False)
        elif name == _FILE and launcher.is_file_gone:
            desk.leave(
                label, "there is no such file: look what it says of numbers, GPUs and DeepSpeed"
            )
        else:
            row = _row(name)
            if row is None:
                hint = nearest(name, TABLE)
                desk.leave(label, f"{reasons.UNKNOWN}; {hint}" if hint else reasons.UNKNOWN)
            else:
                row.act(desk, label, values[label])


def _count(value: Any) -> int:
    """A number above 0; 0 where it is none."""
    try:
        return max(0, int(value))
    except (TypeError, ValueError, OverflowError):
        return 0


def _row(name: str) -> Row | None:
    of_group = (row for start, row in _GROUPS.items() if name.startswith(start))
    return TABLE.get(name) or next(of_group, None)


def _take_number(desk: Desk, name: str, value: Any) -> None:
    if str(value).strip() == "1":
        desk.leave(name, reasons.AS_HERE, matters=False)
    elif not _count(value) and isinstance(value, int | float):
        desk.leave(name, "is no number of processes")
    else:
        reason = "each process shows a batch of its own in a step: start as many here, see "
        desk.leave(name, f"{reason}docs/processes.md")


def _take_machines(desk: Desk, name: str, value: Any) -> None:
    """Machines share out the processes, of which there are as many all the same."""
    is_one = str(value).strip() == "1"
    desk.leave(name, reasons.AS_HERE if is_one else reasons.GPUS, matters=False)


TABLE: Table = {
    _FILE: needless("is read, too, for numbers, processes and DeepSpeed"),
    _PRECISION: chosen("mixed_precision", PRECISIONS, reasons.NO_NUMBERS),
    **dict.fromkeys((*_PROCESSES, *_MACHINES), computed(_take_number)),
    "multi_gpu": needless(reasons.GPUS),
    "num_machines": computed(_take_machines),
    **dict.fromkeys(("gpu_ids", "include", "exclude"), needless("CUDA_VISIBLE_DEVICES chooses")),
    **dict.fromkeys(("cpu", "use_cpu", "tpu", "downcast_bf16"), needless(_DEVICE)),
    **dict.fromkeys(
        (
            *("same_network", "machine_rank", "main_process_ip", "main_process_port", "tee"),
            *("log_dir", "role", "rdzv_backend", "rdzv_conf", "max_restarts", "monitor_interval"),
            *("module", "no_python", "debug", "quiet", "mpirun_hostfile", "main_training_function"),
            *("node_rank", "master_addr", "master_port", "rdzv_endpoint", "rdzv_id", "standalone"),
            *("start_method", "redirects", "local_addr", "run_path", "use_env", "hostfile"),
            *("vm", "env", "tpu_cluster", "no_tpu_cluster", "tpu_use_sudo", "logs_specs"),
        ),
        needless(_STARTED),
    ),
    **dict.fromkeys(("num_cpu_threads_per_process", "enable_cpu_affinity"), needless(_SPEED)),
    "use_fsdp": needless(_SHARDS),
    "use_deepspeed": without(f"{_OF_DEEPSPEED}: {_SHARDS}"),
    "use_megatron_lm": without(f"is not here: {_SHARDS}"),
    "use_parallelism_config": without(f"is not here: {_SHARDS}"),
    **dict.fromkeys(
        (
            *("zero_stage", "offload_optimizer_device", "offload_param_device"),
            *("offload_optimizer_nvme_path", "offload_param_nvme_path", "zero3_init_flag"),
            "zero3_save_16bit_model",
        ),
        needless(_OF_DEEPSPEED),
    ),
    "gradient_accumulation_steps": belonging(
        "goes before the script's own under DeepSpeed: give --gradient-accumulation-steps",
        _DEEPSPEED,
    ),
    "gradient_clipping": belonging(
        "is the largest norm of gradients under DeepSpeed: give --max-grad-norm", _DEEPSPEED
    ),
    **dict.fromkeys(
        ("aws_access_key_id", "aws_secret_access_key"), secret("no cloud is reached from here")
    ),
}
# Options by the beginnings of their names.
_GROUPS: Mapping[str, Row] = {
    "dynamo_": needless(reasons.COMPILED),
    "fsdp_": needless(_SHARDS),
    "deepspeed_": needless(_OF_DEEPSPEED),
    "megatron_lm_": needless("belongs to use_megatron_lm"),
    "parallelism_config_": needless("belongs to use_parallelism_config"),
    "fp8_": needless("belongs to mixed_precision"),
}
