"""An editor family of your own: two classes in one file, and no edit anywhere else.

    PYTHONPATH=examples rl-edit train --preset tiny-flow-grpo \\
        'editor={kind: own_editor:PatchConfig}' 'lora.targets=[hidden, out]'

The editor is a toy in pixel space: a token is a patch of 4 x 4 pixels, and a small network reads
the noisy patch, the source patch, the letters of the instruction and the noise level. The seam is
``rl_edit/editors/family.py``, where the contract of each method stands.
"""

from collections.abc import Sequence
from string import ascii_lowercase
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rl_edit.editors import EditorFacts, EditorSettings
from rl_edit.method.attention import MassTally
from rl_edit.types import Conditioning, EditTask

SIDE = 4
CHANNELS = 3 * SIDE**2


class PatchConfig(EditorSettings):
    """Settings, as they stand under ``editor:``; ``kind`` is the path of this very class."""

    kind: Literal["own_editor:PatchConfig"] = "own_editor:PatchConfig"
    # Shown in run.json and reports; a real family has its weights there.
    path: str = "own_editor"
    attention_layers: int = 0
    width: int = 32

    def identity(self) -> str:
        """Names the frozen base, which is made from the width and a seed."""
        return f"own_editor:{self.width}"

    def inspect(self) -> EditorFacts:
        """Returns facts that need no weights."""
        return EditorFacts(pixels_per_token=SIDE)

    def load(self) -> "PatchEditor":
        """Makes the editor. A real family reads ``self.path`` here."""
        return PatchEditor(self)


class Network(nn.Module):
    """Corrects the velocity, patch by patch. LoRA goes onto its linear layers, by their names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * CHANNELS + len(ascii_lowercase) + 1, width)
        self.out = nn.Linear(width, CHANNELS)

    def forward(self, features: Tensor) -> Tensor:
        correction: Tensor = self.out(F.silu(self.hidden(features)))
        return correction


class PatchEditor:
    """The editor: everything that rollout, learner and evaluation ask for."""

    def __init__(self, config: PatchConfig) -> None:
        self.config, self.pixels_per_token = config, SIDE
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # every process makes the same base
            self.transformer: nn.Module = Network(config.width).requires_grad_(False)

    def encode(self, task: EditTask) -> Conditioning:
        height, width, _ = task.source.shape
        pixels = (task.source.float() / 127.5 - 1).permute(2, 0, 1)
        text = task.instruction.lower()
        letters = torch.tensor([float(text.count(letter)) for letter in ascii_lowercase])
        return Conditioning(
            source_latents=F.unfold(pixels[None], SIDE, stride=SIDE)[0].T.contiguous(),
            grid=(height // SIDE, width // SIDE),
            tensors={"letters": letters / max(len(text), 1)},  # names that only this file reads
        )

    def latent_shape(self, conditioning: Conditioning) -> tuple[int, int]:
        tokens, channels = conditioning.source_latents.shape
        return tokens, channels

    def sigmas(self, num_steps: int, conditioning: Conditioning) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1)

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning | Sequence[Conditioning],
        tally: MassTally | None = None,
    ) -> Tensor:
        many = (
            [conditioning] * len(latents)
            if isinstance(conditioning, Conditioning)
            else conditioning
        )
        # Row by row: a row's bits must not depend on the batch it is in.
        rows = [self._row(*row) for row in zip(latents, sigma, many, strict=True)]
        if tally is not None:
            tally.add(latents.new_full(latents.shape[:2], float("nan")))  # none is measured
        return torch.stack(rows)

    def _row(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        source = conditioning.source_latents
        context = torch.cat([conditioning.tensors["letters"], sigma[None]])
        features = torch.cat([latents, source, context.expand(len(latents), -1)], dim=1)
        # (x - clean) / sigma is noise - clean: without the network the source comes back unchanged.
        return (latents - source) / sigma + self.transformer(features)

    def decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        size = (conditioning.grid[0] * SIDE, conditioning.grid[1] * SIDE)
        pixels = F.fold(latents.transpose(1, 2), size, SIDE, stride=SIDE).permute(0, 2, 3, 1)
        images: Tensor = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return images
