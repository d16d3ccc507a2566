"""How the server is run: every setting once, with its default and meaning.

`trainer serve` takes each as a flag, a settings file takes them by name.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

# Keys of clients, and programs in the place of the trainer's own: a training and its preparation
# with `{config}` and `{output}`, and one that makes pictures for the folders on its input.
KEYS = "TRAINER_KEYS"
JOB_COMMAND = "TRAINER_JOB_COMMAND"
GENERATION_COMMAND = "TRAINER_GENERATION_COMMAND"
PREPARATION_COMMAND = "TRAINER_PREPARATION_COMMAND"

GIBIBYTE = 2**30
MEBIBYTE = 2**20


class ServerSettings(BaseModel):
    """The settings of one server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path = Field(
        Path("trainer-server"), description="Folder of queue, uploads, runs and results."
    )
    host: str = Field("127.0.0.1", description="Address to listen at.")
    port: int = Field(8700, ge=1, le=65535, description="Port to listen at.")
    key_file: Path | None = Field(
        None,
        description="File with one API key a line; TRAINER_KEYS holds further ones, with commas "
        "between. Without any key only this machine is served.",
    )
    keys: tuple[SecretStr, ...] = Field(
        (), description="API keys.", json_schema_extra={"flag": False}
    )
    public_url: str | None = Field(
        None,
        pattern="^https?://[^/]+$",
        description="Address under which clients reach the server, for links in answers. None: "
        "the one that each client used.",
    )
    allowed_hosts: tuple[str, ...] = Field(
        (), description="Host names served beside this machine's and the services' own."
    )
    allowed_origins: tuple[str, ...] = Field(
        (), description="Web pages, such as https://app.example, whose scripts may ask."
    )
    allowed_roots: tuple[Path, ...] = Field(
        (), description="Folders that requests may name base models and pictures in."
    )
    tls: bool = Field(
        False,
        description="Serve https too, by an authority of this server's own, and stand in for the "
        "hosted services' names.",
    )
    tls_port: int = Field(8743, ge=1, le=65535, description="Port for https.")
    proxy_port: int = Field(
        8744, ge=1, le=65535, description="Port of the proxy for unmodified clients, with tls."
    )
    overrides: Path | None = Field(
        None, description="Configuration file over every request, such as what saves memory."
    )
    backend: Literal["local", "slurm", "command"] = Field(
        "local", description="What runs trainings: this machine, Slurm, or commands of your own."
    )
    gpus: tuple[str, ...] | None = Field(
        None,
        description="GPUs of this machine, one training at a time on each. None: all there are; "
        "the processor where there are none.",
    )
    sbatch_script: Path | None = Field(
        None,
        description="Script of sbatch that runs every training of the slurm backend, whose command "
        "it is given: those of configs/deploy/slurm, or one like them. None: the command alone.",
    )
    sbatch_options: str | None = Field(
        None,
        description="Options of sbatch for every training of the slurm backend. None: what the "
        "script says; without one --gpus=1.",
    )
    submit_command: str = Field(
        "",
        description="Command backend: hands over the job {id}, whose own command stands for "
        "{command} and whose folder is {folder}.",
    )
    state_command: str = Field(
        "",
        description="Command backend: prints waiting, running, or gone with the exit code, for "
        "{id}.",
    )
    stop_command: str = Field("", description="Command backend: stops {id}.")
    grace_seconds: float = Field(
        60, gt=0, description="Seconds that a stopped training has for its checkpoint."
    )
    wall_hours: float | None = Field(
        None, gt=0, description="Hours after which a training is stopped. None: no limit."
    )
    inference_idle_seconds: float = Field(
        300, ge=0, description="Seconds without a request after which inference frees the GPU."
    )
    client_seconds: float = Field(
        30,
        gt=0,
        description="Seconds that a client has for the head of a request, and for a body that "
        "hardly comes.",
    )
    max_queued: int = Field(1000, ge=1, description="Jobs that may wait.")
    requests_per_second: float = Field(
        100, gt=0, description="Lasting rate of writing requests for each key; bursts are taken."
    )
    max_body_mib: int = Field(
        280, ge=1, description="Largest request in MiB: pictures may be in it, as base64."
    )
    max_upload_mib: int = Field(4096, ge=1, description="Largest uploaded file in MiB.")
    max_data_gib: float | None = Field(
        None, gt=0, description="Size of the data folder from which on nothing more is taken."
    )
    keep_days: float | None = Field(
        None,
        gt=0,
        description="Days that ended jobs, their results and uploads are kept. None: for good.",
    )
    min_finetune_iterations: int = Field(
        100, ge=1, description="Fewest iterations of a finetune that are taken, for trials."
    )

    @field_validator("sbatch_script")
    @classmethod
    def _script_is_there(cls, script: Path | None) -> Path | None:
        if script is not None and not script.is_file():
            raise ValueError(f"`{script}` is not a file")
        return script

    @model_validator(mode="after")
    def _commands_of_backend(self) -> ServerSettings:
        commands = (self.submit_command, self.state_command, self.stop_command)
        if self.backend == "command" and not all(commands):
            raise ValueError(
                "the backend `command` needs --submit-command, --state-command and --stop-command"
            )
        return self

    @model_validator(mode="after")
    def _keys_where_others_reach_it(self) -> ServerSettings:
        if not self.keys and not is_loopback(self.host):
            raise ValueError(
                f"`{self.host}` is reached by others, and there is no key; "
                "give `--key-file`, or listen at 127.0.0.1"
            )
        return self

    @property
    def max_body_bytes(self) -> int:
        """Largest request."""
        return self.max_body_mib * MEBIBYTE

    @property
    def max_upload_bytes(self) -> int:
        """Largest uploaded file."""
        return self.max_upload_mib * MEBIBYTE


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
