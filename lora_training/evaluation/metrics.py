"""What is measured: every metric's name, unit, direction and needs, for tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One column of a table.

    Attributes:
        title: its heading.
        unit: of its figures; empty for pure numbers.
        better: which figures are; None where more is not simply better or worse.
        needs: what it is computed from beside the method's own pictures.
    """

    title: str
    unit: str
    better: Literal["smaller", "larger"] | None
    needs: tuple[
        Literal[
            "features", "reference", "scorer", "lpips", "many steps", "many noises", "teacher", "guidance", "clips", "flow",
        ],
        ...,
    ]  # fmt: skip


METRICS = {
    "frechet_distance": Metric("Frechet distance", "", "smaller", ("features", "reference")),
    "kernel_distance": Metric("kernel distance", "", "smaller", ("features", "reference")),
    "precision": Metric("precision", "share", "larger", ("features", "reference")),
    "recall": Metric("recall", "share", "larger", ("features", "reference")),
    "video_frechet_distance": Metric("Frechet video distance", "", "smaller", ("clips", "features", "reference")),
    "alignment": Metric("alignment", "", "larger", ("scorer",)),
    "motion": Metric("motion as told", "share", "larger", ("clips", "scorer")),
    "temporal_consistency": Metric("temporal consistency", "cosine", "larger", ("clips", "features")),
    "flow": Metric("flow", "pixels a frame", None, ("clips", "flow")),  # noise flows too: the reference's is what to be near
    "consistency": Metric("consistency", "cosine", "larger", ("features", "many steps")),
    "perceptual_distance": Metric("LPIPS between step counts", "", "smaller", ("lpips", "many steps")),
    "diversity": Metric("diversity", "1 - cosine", None, ("features", "many noises")),
    "ode_error": Metric("ODE error", "root mean square of x_t", "smaller", ("teacher",)),
    "guidance_response": Metric("guidance response", "", None, ("scorer", "guidance")),
    "negative_prompt_response": Metric("negative-prompt response", "share", None, ("scorer", "guidance")),
}
