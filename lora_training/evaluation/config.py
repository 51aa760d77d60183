"""An evaluation, typed: a YAML file, with command-line overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..config import ClipConfig, ModelConfig, check_finite_settings
from .alignment import ScorerConfig
from .features import FeatureConfig
from .methods import MethodConfig
from .video import FlowConfig


@dataclass
class ReferenceConfig:
    """The pictures that a method's should be like.

    Attributes:
        folder: of pictures, or of clips in any form that training reads, such as the data's own; turned upright, scaled and
            cropped to `size` as training does it. Empty: drawn by `method`.
        method: usually the teacher at many steps.
        seed: of its noise: none of the methods', so that it is a distribution and not the same pictures.
    """

    folder: str = ""
    method: MethodConfig = field(
        default_factory=lambda: MethodConfig("reference", scheduler="ddim", steps=(50,), guidance_scale=5.0)
    )
    seed: int = 1000


@dataclass
class PairConfig:
    """Two methods between which consistency is measured, such as an adapter for 1 step and another for 16.

    Attributes:
        few, many: their names.
        steps: of each.
    """

    few: str
    many: str
    steps: tuple[int, int] = (1, 16)


@dataclass
class GuidanceConfig:
    """How methods answer guidance.

    Attributes:
        scales: g; none: not measured.
        methods: their names; none: all.
        steps: of sampling.
        count: prompts, the first of all.
    """

    scales: tuple[float, ...] = ()
    methods: tuple[str, ...] = ()
    steps: int = 4
    count: int = 64


@dataclass
class OdeConfig:
    """How far adapters leave their teacher's ODE.

    Of methods with an adapter, a `pcm` scheduler at the grid's own times, and no new noise. Adapters whose file does not state
    the guidance of the ODE that they were trained on, as those published with the paper, are left out.

    Attributes:
        count: prompts, the first of all; 0: not measured.
        steps: of sampling.
        solver_steps: of the teacher's own, Heun's; must have the adapters' edges among its points.
    """

    count: int = 0
    steps: tuple[int, ...] = (1, 2, 4, 8)
    solver_steps: int = 500


@dataclass
class NegativeConfig:
    """How methods answer a negative prompt: in what share of pictures the thing that it names is.

    Attributes:
        pairs: a `.jsonl` file with a `prompt`, and under `thing` what the negative prompt names; empty: not measured.
        methods: their names; none: all.
        guidance_scale: g, above 1.
        steps: of sampling.
        threshold: a thing is in a picture where the judge's score of its name is above this. None: 0.5, for a `factory` whose
            judge says 1 or 0; other judges have scores of any size, and need one.
    """

    pairs: str = ""
    methods: tuple[str, ...] = ()
    guidance_scale: float = 4.0
    steps: int = 4
    threshold: float | None = None


@dataclass
class ClipsConfig:
    """Clips instead of pictures, and what is measured of them beside their single frames.

    Judges and features of clips see (N, F, 3, H, W) in [-1, 1]; none come with this package, so they are your own: `factory`,
    or for features `torchscript`. Where a network wants its clips otherwise, such as I3D, the factory wraps it.

    Attributes:
        frames: F.
        stride, fps: which frames of the clips in `reference.folder` are taken, as in `data.clips` of training.
        alignment: the judge of whole clips beside their prompts, in place of one of their frames.
        motion: a judge that says 1 where a clip makes the motion that its prompt names, else 0.
        features: the space of the Frechet video distance.
        flow: how motion is read off the pixels.
    """

    frames: int = 16
    stride: int = 1
    fps: float = 0.0
    alignment: ScorerConfig | None = None
    motion: ScorerConfig | None = None
    features: FeatureConfig | None = None
    flow: FlowConfig | None = None

    @property
    def of_reference(self) -> ClipConfig:
        """How the clips of a folder are read."""
        return ClipConfig(self.frames, self.stride, self.fps)

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        self.of_reference.check("clips")
        if self.frames < 2:
            raise ValueError(
                f"clips.frames must be at least 2, for neighbours to compare; got {self.frames}. Or draw pictures."
            )
        for name, config, kinds in (
            ("alignment", self.alignment, ("factory",)),
            ("motion", self.motion, ("factory",)),
            ("features", self.features, ("factory", "torchscript")),
        ):
            if config is not None and config.kind not in kinds:
                raise ValueError(
                    f"clips.{name}.kind: {config.kind} looks at pictures, and this is for whole clips: {' or '.join(kinds)}. "
                    "What looks at pictures is set outside of clips, and sees the single frames."
                )


@dataclass
class EvaluationConfig:
    """One report.

    Of clips, what is said of pictures holds for their frames: those of all clips make up distances, precision and recall; the
    alignment of a clip is the mean of its frames', and in diversity and consistency a frame is beside that of its own number.

    Attributes:
        model: that all methods draw with.
        methods: the rows.
        prompts: a file, see `read_prompts`.
        count: of pictures for each row, the first prompts; 0: all.
        size: (height, width).
        clips: what is drawn are clips, by a model of family `animatediff`; None: pictures.
        seeds: of noise; from several, figures are means with standard deviations, and diversity is measured.
        batch_size: pictures, or clips, at a time.
        precision: of the networks; with `bf16` only the UNet's inside, for latents need more than its 8 bits, and a processor
            without bfloat16 computes in float32.
        reference: what distances are to; with `features`.
        features: the space of distances; None: they are not measured.
        similarity: the space of consistency; None: that of distances.
        pairs: of methods, for consistency between them; each method's fewest and most steps are compared anyway.
        alignment: the judge of pictures beside prompts; None: they are not judged.
        lpips_weights: for LPIPS between step counts, see `objective.lpips_weights`; empty: not measured.
        guidance: how methods answer it.
        negative: how they answer negative prompts.
        ode: how far adapters leave the teacher's.
        shown: prompts in the grid of pictures; 0: no grid.
        output: a folder for pictures, `report.json`, `report.md` and plots.
        title: of the report.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    methods: tuple[MethodConfig, ...] = ()
    prompts: str = "prompts.txt"
    count: int = 0
    size: tuple[int, int] = (512, 512)
    clips: ClipsConfig | None = None
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 16
    precision: Literal["no", "fp16", "bf16"] = "no"
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    features: FeatureConfig | None = None
    similarity: FeatureConfig | None = None
    pairs: tuple[PairConfig, ...] = ()
    alignment: ScorerConfig | None = None
    lpips_weights: str = ""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    negative: NegativeConfig = field(default_factory=NegativeConfig)
    ode: OdeConfig = field(default_factory=OdeConfig)
    shown: int = 4
    output: str = "outputs/evaluation"
    title: str = "Report"

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        check_finite_settings(self)
        if not self.methods:
            raise ValueError("methods: name at least one to evaluate.")
        self._check_clips()
        if self.reference.method.name in {method.name for method in self.methods}:
            raise ValueError(f"methods: {self.reference.method.name!r} is the reference's name; choose another.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive; got {self.batch_size}.")
        not_negative = {"count": self.count, "shown": self.shown, "ode.count": self.ode.count}
        for name, value in not_negative.items():
            if value < 0:
                raise ValueError(f"{name} must be 0 or more; got {value}.")
        if self.count == 1 and (self.features or (self.clips and self.clips.features)):
            raise ValueError("count is 1, and distances between distributions need more pictures: leave features out.")
        if len(self.reference.method.steps) != 1:
            raise ValueError(f"reference.method.steps: it is drawn in one number of steps; got {self.reference.method.steps}.")
        self._check_responses()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: name at least one, and each once; got {self.seeds}.")
        if self.reference.seed in self.seeds:
            raise ValueError(f"reference.seed: {self.reference.seed} is among seeds; the reference needs noise of its own.")
        names = [method.name for method in self.methods]
        for asked, chosen in (("guidance", self.guidance.methods), ("negative", self.negative.methods)):
            if unknown := set(chosen) - set(names):
                raise ValueError(
                    f"{asked}.methods: {', '.join(sorted(unknown))} not among methods, which are {', '.join(names)}."
                )
        drawn = {(method.name, steps) for method in self.methods for steps in method.steps}
        for pair in self.pairs:
            for wanted in zip((pair.few, pair.many), pair.steps, strict=True):
                if wanted not in drawn:
                    raise ValueError(f"pairs: there is no method {wanted[0]!r} at {wanted[1]} steps among methods.")
        judged = self.alignment is not None or (self.clips is not None and self.clips.alignment is not None)
        if self.guidance.scales and not judged:
            raise ValueError("guidance.scales needs a judge: set alignment.")
        if self.negative.pairs and not judged:
            raise ValueError("negative.pairs needs a judge: set alignment.")

    def _check_responses(self) -> None:
        """What would be refused only when all is drawn."""
        if self.guidance.scales:
            for name, value in (("count", self.guidance.count), ("steps", self.guidance.steps)):
                if value < 1:
                    raise ValueError(f"guidance.{name} must be positive; got {value}.")
            if min(self.guidance.scales) < 1:
                raise ValueError(
                    f"guidance.scales must be 1 or more: pipelines draw below it as at 1; got {min(self.guidance.scales):g}."
                )
        if self.negative.pairs and self.negative.guidance_scale <= 1:
            raise ValueError(
                "negative.guidance_scale must be above 1, without which a negative prompt does nothing; got "
                f"{self.negative.guidance_scale:g}."
            )
        if self.negative.pairs and self.negative.steps < 1:
            raise ValueError(f"negative.steps must be positive; got {self.negative.steps}.")
        judge = self.alignment.kind if self.alignment else "factory"
        if self.negative.pairs and judge == "aesthetic":
            raise ValueError("negative.pairs needs a judge that reads: alignment.kind aesthetic sees no text.")
        if self.negative.pairs and judge != "factory" and self.negative.threshold is None:
            raise ValueError(
                f"negative.threshold: say above which score of {judge} a thing is in a picture, which depends on the weights: "
                "try halfway between scores of pictures with it and without it."
            )

    def _check_clips(self) -> None:
        self.model.check()
        video = self.model.family == "animatediff"
        if self.clips is None and video:
            raise ValueError("model.family animatediff draws clips: set clips, `clips: {frames: 16}` for the usual.")
        if self.clips is None:
            return
        if not video:
            raise ValueError(f"clips is for model.family animatediff; {self.model.family} draws pictures. Leave clips out.")
        if self.model.image_adapter:
            raise ValueError(
                "model.image_adapter lies beneath an adapter while that is trained, and is in the files that training writes: "
                "name those in methods. To measure it alone, name it there too."
            )
        self.clips.check()
        if self.alignment is not None and self.clips.alignment is not None:
            raise ValueError("alignment judges frames and clips.alignment whole clips; leave one of them out.")
