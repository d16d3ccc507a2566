"""Models that look at pictures, as rows ask for them: simple enough to know what they do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_vision
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

# Sees a red square above a blue one as a face; see `samples/make_red_square_yunet.py`.
SQUARES = Path(__file__).parent.parent / "samples" / "red_square_yunet.onnx"

# What captioners say of every picture.
SAYS = "a man sits on the red table."
ALSO_SAYS = "one green cat smiles."
SAYS_WHOLE, SAYS_IN_4_BITS = "a red table.", "a red cup."

# What the restorers make of the left and the right half of an upright face, in [-1, 1].
SHADES = {"restorer": (-0.8, 0.6), "other restorer": (0.6, -0.8)}


def clipseg(folder: Path, seed: int) -> Path:
    """A CLIPSeg whose maps are not flat."""
    folder = tiny_vision.tiny_clipseg(folder, seed=seed)
    path = folder / "model.safetensors"
    weights = load_file(path)
    last = "decoder.transposed_convolution."
    save_file(
        {name: 12 * w if name.startswith(last) else w for name, w in weights.items()},
        path,
        metadata={"format": "pt"},
    )
    return folder


def captioner_of_two_minds(folder: Path) -> Path:
    """A LLaVA that says one sentence as it is and another where it is kept in 4 bits.

    One weight of a layer that is packed decides what follows `red`. It is so small beside the
    largest of its block, which belongs to a word that is never said, that 4 bits make 0 of it.
    """
    tiny_vision.tiny_llava(folder, says=SAYS_IN_4_BITS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    red, table, stop, unsaid, turn = tokenizer.convert_tokens_to_ids(
        ["red", "table", ".", "<pad>", "<unk>"]
    )
    path = folder / "model.safetensors"
    weights = load_file(path)
    gate, up, down = (
        weights[f"language_model.model.layers.0.mlp.{name}_proj.weight"].zero_()
        for name in ("gate", "up", "down")
    )
    gate[0, red], up[0, unsaid], up[0, red], down[turn, 0] = 10.0, 1.0, 0.03, 1.0
    following = weights["language_model.lm_head.weight"]
    following[table, turn] = following[stop, table] = 10.0
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def restorer(path: Path) -> Path:
    """Weights of a restorer, as spandrel's stand-in takes them."""
    path = path.with_suffix(".safetensors")
    save_file({"shades": torch.tensor(SHADES[path.stem])}, path)
    return path


class _Network(torch.nn.Module):
    """Paints the halves of every face in the two shades of its weights."""

    def __init__(self, shades: torch.Tensor) -> None:
        super().__init__()
        self.shades = torch.nn.Parameter(shades)

    def forward(
        self, values: torch.Tensor, *, return_rgb: bool, randomize_noise: bool
    ) -> tuple[torch.Tensor]:
        assert values.shape == (1, 3, 512, 512)
        assert not return_rgb
        assert not randomize_noise
        halves = self.shades.repeat_interleave(256)
        return (halves.expand(1, 3, 512, 512),)


class _ModelLoader:
    def __init__(self, device: str) -> None:
        self.device = device

    def load_from_state_dict(self, state: dict[str, torch.Tensor]) -> SimpleNamespace:
        network = _Network(state["shades"]).to(self.device)
        return SimpleNamespace(model=network, architecture=SimpleNamespace(id="GFPGAN"))


class _UnsupportedModelError(Exception):
    pass


_SPANDREL = SimpleNamespace(
    UnsupportedModelError=_UnsupportedModelError,
    canonicalize_state_dict=lambda state: state,
    ModelLoader=_ModelLoader,
)


@contextmanager
def spandrel(*, is_installed: bool) -> Iterator[None]:
    """While this lasts, spandrel is a stand-in, or not installed; it is in no test environment.

    It is the one library that the option face_restore takes architectures from.
    """
    with pytest.MonkeyPatch.context() as patching:
        patching.setitem(sys.modules, "spandrel", _SPANDREL if is_installed else None)
        yield
