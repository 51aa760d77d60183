"""The adapter file: one `.safetensors` that diffusers and ComfyUI both load, and that says how it was trained.

Keys are kohya's over diffusers' module names (`lora_unet_down_blocks_0_..._to_q.lora_down.weight`, `.lora_up.weight`,
`.alpha`): the only layout that every host maps in full. The settings are in the header under `pcm.*`, beside the
standard `modelspec.*` and `ss_*` keys. Published PCM adapters have no such header; their file names serve instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .noise_schedule import check_prediction_type
from .phases import PhaseGrid

ARCHITECTURES = {"sd15": "stable-diffusion-v1/lora", "sdxl": "stable-diffusion-xl-v1-base/lora"}
HEADER_PREFIX = "pcm."
HEADER_VERSION = "1"


@dataclass(frozen=True)
class AdapterSettings:
    """How an adapter was trained and how it wants to be sampled.

    Attributes:
        base_model: the family, `sd15` or `sdxl`.
        phase_edges: the trained edges as ascending timesteps, 0 and T - 1 included.
        num_solver_steps: N of the training grid.
        num_train_timesteps: T.
        prediction_type: of the network in training.
        training_guidance_scale: g of the teacher's solver, in diffusers' convention; 1 means unguided.
        guidance_scale: recommended g for sampling; 1 means without a negative prompt.
        num_inference_steps: recommended steps.
        eta: recommended; 0 deterministic, 1 stochastic as LCM is.
        inferred: guessed from a published file's name instead of read from its header.
    """

    base_model: str
    phase_edges: tuple[int, ...]
    num_solver_steps: int
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"
    training_guidance_scale: float = 1.0
    guidance_scale: float = 1.0
    num_inference_steps: int = 4
    eta: float = 0.0
    inferred: bool = False

    def __post_init__(self) -> None:
        check_prediction_type(self.prediction_type)
        _ = self.grid  # refuses impossible edges

    @property
    def grid(self) -> PhaseGrid:
        """The trained phase grid."""
        return PhaseGrid.from_timesteps(self.phase_edges, self.num_solver_steps, self.num_train_timesteps)

    @property
    def scheduler_config(self) -> dict[str, object]:
        """What `PCMScheduler.from_config` needs to be told."""
        return {
            "num_phases": self.grid.num_phases,
            "phase_edges": list(self.grid.edges),
            "num_solver_steps": self.num_solver_steps,
        }

    def to_header(self) -> dict[str, str]:
        """As strings under `pcm.*`, which is all that a safetensors header holds."""
        values = {name: value for name, value in asdict(self).items() if name != "inferred"}
        values["phase_edges"] = ",".join(map(str, self.phase_edges))
        return {HEADER_PREFIX + "version": HEADER_VERSION} | {HEADER_PREFIX + k: str(v) for k, v in values.items()}

    @classmethod
    def from_header(cls, header: Mapping[str, str]) -> AdapterSettings | None:
        """Read `pcm.*` entries; None if there are none.

        Raises:
            ValueError: entries that cannot be read, or that contradict each other.
        """
        found = {k.removeprefix(HEADER_PREFIX): v for k, v in header.items() if k.startswith(HEADER_PREFIX)}
        if not found:
            return None
        readers = {
            "int": int,
            "float": float,
            "str": str,
            "tuple[int, ...]": lambda v: tuple(int(t) for t in v.split(",")),
        }
        try:
            return cls(**{f.name: readers[str(f.type)](found[f.name]) for f in fields(cls) if f.name in found})  # type: ignore[operator]
        except (ValueError, TypeError) as error:
            raise ValueError(f"The adapter's header cannot be used: {error}") from error


_PUBLISHED = re.compile(r"pcm_(sd15|sdxl)_(?:(smallcfg|normalcfg)_(2|4|8|16)step|(lcmlike)_lora)")
_SOLVER_STEPS = {"sd15": 50, "sdxl": 40}


def published_settings(name: str) -> AdapterSettings | None:
    """Settings of the adapters published with the paper, inferred from a file name such as `pcm_sd15_smallcfg_4step_converted`.

    Their files do not state their settings. `N step` is taken to mean N phases, on 50 solver steps for SD1.5 and 40 for
    SDXL; `lcmlike` one phase, sampled stochastically. None for other names.
    """
    match = _PUBLISHED.search(name)
    if match is None:
        return None
    family, regime, steps, lcmlike = match.groups()
    solver_steps = _SOLVER_STEPS[family]
    grid = PhaseGrid.even(1 if lcmlike else int(steps), solver_steps)
    return AdapterSettings(
        base_model=family,
        phase_edges=grid.edges,
        num_solver_steps=solver_steps,
        guidance_scale=4.5 if regime == "normalcfg" else 1.0,
        num_inference_steps=4 if lcmlike else int(steps),
        eta=1.0 if lcmlike else 0.0,
        inferred=True,
    )


def read_settings(path: str | os.PathLike) -> AdapterSettings | None:
    """What an adapter file says of itself: its header, or failing that a published name; None if neither speaks.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or a header that cannot be used.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return AdapterSettings.from_header(header) or published_settings(Path(path).name)


def write_safetensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write to a temporary name and rename, so that nobody meets half a file; the folder is made if missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.touch()
    mode = temporary.stat().st_mode  # as every new file here; safetensors would let the owner alone read it
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, metadata=dict(metadata or {}))
    temporary.chmod(mode)
    os.replace(temporary, path)


def kohya_state_dict(peft_state_dict: Mapping[str, torch.Tensor], alphas: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Rename PEFT's LoRA tensors (`<module>.lora_A.weight`, `<module>.lora_B.weight`) to kohya's, alpha included.

    Args:
        peft_state_dict: of the UNet, as `peft.get_peft_model_state_dict` gives it.
        alphas: lora_alpha of each module path.

    Raises:
        ValueError: a tensor that is not one of the two.
    """
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in peft_state_dict.items():
        module, _, kind = key.removesuffix(".weight").rpartition(".")
        if kind not in ("lora_A", "lora_B"):
            raise ValueError(f"{key} has no place in a kohya LoRA file; it takes lora_A and lora_B weights only.")
        name = "lora_unet_" + module.replace(".", "_")
        tensors[f"{name}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{name}.alpha"] = torch.tensor(float(alphas[module]))
    return tensors


def write_adapter(
    path: str | os.PathLike,
    peft_state_dict: Mapping[str, torch.Tensor],
    alphas: Mapping[str, float],
    settings: AdapterSettings,
    title: str,
    extra: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write an adapter that every host loads; to a temporary name first, then renamed.

    Args:
        path: the `.safetensors` file; its folder is made if missing.
        peft_state_dict: of the UNet, as `peft.get_peft_model_state_dict` gives it.
        alphas: lora_alpha of each module path.
        settings: for the header.
        title: a human name for the file.
        extra: further header entries, e.g. `pcm_trainer.*` of the training configuration.
        dtype: of the stored tensors.
    """
    path = Path(path)
    tensors = {k: v.to("cpu", dtype) for k, v in kohya_state_dict(peft_state_dict, alphas).items()}
    ranks = {t.shape[0] for k, t in tensors.items() if k.endswith(".lora_down.weight")}
    header = settings.to_header() | {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES[settings.base_model],
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if settings.prediction_type == "v_prediction" else settings.prediction_type,
        "modelspec.usage_hint": _usage_hint(settings),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(_only(list(alphas.values()))),
    }
    write_safetensors(tensors, path, {**header, **(extra or {})})


def restate(
    path: str | os.PathLike, output: str | os.PathLike, settings: AdapterSettings, extra: Mapping[str, str] | None = None
) -> None:
    """The same tensors under a header that says something else, such as another recommended guidance.

    Args:
        path: an adapter file.
        output: where the new one is written; may be `path`.
        settings: for the new header; entries that are not settings are kept.
        extra: further entries, new or replaced.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = file.metadata() or {}
    stated = settings.to_header() | {"modelspec.usage_hint": _usage_hint(settings)}
    write_safetensors(tensors, output, header | stated | dict(extra or {}))


def _usage_hint(settings: AdapterSettings) -> str:
    return f"PCMScheduler, {settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}, eta {settings.eta:g}"


def _only(values: Sequence[float]) -> float | str:
    return values[0] if len(set(values)) == 1 else "Dynamic"


def with_overrides(settings: AdapterSettings | None, **overrides: object) -> AdapterSettings:
    """Settings with some entries replaced; `num_phases` stands for even edges.

    Raises:
        ValueError: there is nothing to override and the overrides do not say the phases.
    """
    num_phases = overrides.pop("num_phases", None)
    given = {k: v for k, v in overrides.items() if v is not None}
    if settings is None and num_phases is None and "phase_edges" not in given:
        raise ValueError(
            "The file does not say how it was trained (no pcm.* header, no published name). "
            "Pass num_phases or phase_edges, and num_solver_steps if it is not 50."
        )
    if settings is None:
        settings = AdapterSettings(base_model="sd15", phase_edges=(0, 999), num_solver_steps=50)
        num_phases = num_phases if "phase_edges" not in given else None
    if "num_solver_steps" in given and "phase_edges" not in given and num_phases is None:
        num_phases = settings.grid.num_phases
    if num_phases is not None:
        steps = given.get("num_solver_steps", settings.num_solver_steps)
        given["phase_edges"] = PhaseGrid.even(num_phases, steps, settings.num_train_timesteps).edges  # type: ignore[arg-type]
    return replace(settings, **given)  # type: ignore[arg-type]
