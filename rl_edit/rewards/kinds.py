"""Lists the kinds of reward terms. A new one is a file of its own and a line of the list here."""

from __future__ import annotations

from rl_edit.rewards.clip import ClipSimilarity
from rl_edit.rewards.concentration import Concentration
from rl_edit.rewards.custom import PythonReward
from rl_edit.rewards.lpips import Lpips
from rl_edit.rewards.pixel_terms import Psnr, Ssim
from rl_edit.rewards.preservation import Preservation, Similarity
from rl_edit.rewards.shapes_judge import ShapesJudge
from rl_edit.rewards.vlm.editscore import EditScore
from rl_edit.rewards.vlm.region_judge import RegionJudge

# The list to add a kind to. Its order is that of the settings page and changes nothing else.
Term = (
    ShapesJudge
    | Preservation
    | Similarity
    | Psnr
    | Ssim
    | Lpips
    | ClipSimilarity
    | Concentration
    | EditScore
    | RegionJudge
    | PythonReward
)
"""Every built-in term that scores candidates as they are. A composite wraps one of these."""
