"""The adapter file: one `.safetensors` that diffusers and ComfyUI both load, and that says how it was trained.

Keys are kohya's over diffusers' module names (`lora_unet_down_blocks_0_..._to_q.lora_down.weight`, `.lora_up.weight`,
`.alpha`): the only layout that every host maps in full. The settings are in the header under `pcm.*`, beside the
standard `modelspec.*` and `ss_*` keys. Published PCM adapters have no such header; their file names or hashes serve instead.

    python -m pcm_scheduler.lora_file FILE...       what a file says of itself, and whether it is whole
    python -m pcm_scheduler.lora_file FILE --convert kohya --output NEW       the same adapter in another layout
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checks import finite_number, shortened, whole_number
from .lora_layouts import (
    FORMATS,
    METADATA_KEY,
    PEFT_CONFIG,
    LoraTensors,
    dotted_name,
    is_motion,
    sort_tensors,
    to_animatediff,
    to_diffusers,
    to_kohya,
    to_peft,
)
from .noise_schedule import check_beta_schedule, check_prediction_type
from .phases import PhaseGrid
from .published import published_name

ARCHITECTURES = {
    "sd15": "stable-diffusion-v1",
    "sdxl": "stable-diffusion-xl-v1-base",
    "animatediff": "stable-diffusion-v1",
}
# Of an adapter's settings, the least and the most. More guidance than this is no guidance that anybody has sampled with.
_RANGES = {
    "training_guidance_scale": (0.0, 1e6),
    "guidance_scale": (0.0, 1e6),
    "eta": (0.0, 1.0),
    "beta_start": (0.0, 1.0),
    "beta_end": (0.0, 1.0),
}
# What `save_pretrained` of a PEFT model writes.
PEFT_FILE, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."
_LONGEST_CONFIG = 2**24  # bytes; patterns for every module of SDXL take a hundredth
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")  # of tensors, in headers
HEADER_PREFIX = "pcm."
HEADER_VERSION = "1"


@dataclass(frozen=True)
class AdapterSettings:
    """How an adapter was trained and how it wants to be sampled.

    Attributes:
        base_model: the family, `sd15`, `sdxl` or `animatediff`.
        phase_edges: the trained edges as ascending timesteps, 0 and T - 1 included.
        num_solver_steps: N of the training grid.
        num_train_timesteps: T.
        prediction_type: of the network in training.
        training_guidance_scale: g of the teacher's solver, in diffusers' convention; 1 means unguided.
        guidance_scale: recommended g for sampling; 1 means without a negative prompt.
        num_inference_steps: recommended steps.
        eta: recommended; 0 deterministic, 1 stochastic as LCM is.
        inferred: guessed from a published file's name or hash instead of stated by who trained it.
        assumed: the file says nothing; the phases and points are what somebody told, all else, the family too, is a default.
        beta_schedule: of the noise in training, as diffusers names it; None: that of whatever model it is used with.
        beta_start, beta_end: of that schedule; None: as `beta_schedule`.

    Raises:
        ValueError: a value that none of these can have, or edges that are not the grid's; which.
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
    assumed: bool = False
    beta_schedule: str | None = None
    beta_start: float | None = None
    beta_end: float | None = None

    def __post_init__(self) -> None:
        if self.base_model not in ARCHITECTURES:
            raise ValueError(f"Unknown base_model {shortened(self.base_model)}; choose one of {', '.join(ARCHITECTURES)}.")
        check_prediction_type(self.prediction_type)
        if self.beta_schedule is not None:
            check_beta_schedule(self.beta_schedule)
        for name, (least, most) in _RANGES.items():
            if getattr(self, name) is not None:
                finite_number(getattr(self, name), name, least, most)
        steps, most_steps = whole_number(self.num_inference_steps, "num_inference_steps"), self.grid.num_solver_steps
        if not 1 <= steps <= most_steps:
            raise ValueError(f"num_inference_steps must be from 1 to num_solver_steps={most_steps}; got {shortened(steps)}.")

    @property
    def grid(self) -> PhaseGrid:
        """The trained phase grid."""
        return PhaseGrid.from_timesteps(self.phase_edges, self.num_solver_steps, self.num_train_timesteps)

    @property
    def scheduler_config(self) -> dict[str, object]:
        """What `PCMScheduler.from_config` needs to be told."""
        betas = {name: getattr(self, name) for name in ("beta_schedule", "beta_start", "beta_end")}
        stated = {name: value for name, value in betas.items() if value is not None}
        return {
            "num_phases": self.grid.num_phases,
            "phase_edges": list(self.grid.edges),
            "num_solver_steps": self.num_solver_steps,
            **({**stated, "trained_betas": None} if stated else {}),
        }

    def to_header(self) -> dict[str, str]:
        """As strings under `pcm.*`, which is all that a safetensors header holds."""
        values = {name: value for name, value in asdict(self).items() if value is not None and value is not False}
        values["phase_edges"] = ",".join(map(str, self.phase_edges))
        return {HEADER_PREFIX + "version": HEADER_VERSION} | {HEADER_PREFIX + k: str(v) for k, v in values.items()}

    @classmethod
    def from_header(cls, header: Mapping[str, str]) -> AdapterSettings | None:
        """Read `pcm.*` entries; None if there are none.

        Raises:
            ValueError: entries of another version, that cannot be read, or that contradict each other.
        """
        found = {k.removeprefix(HEADER_PREFIX): v for k, v in header.items() if k.startswith(HEADER_PREFIX)}
        if not found:
            return None
        version = found.get("version", HEADER_VERSION)
        if version != HEADER_VERSION:
            raise ValueError(
                f"The adapter's header is of version {shortened(version, 20)}, and this program reads {HEADER_VERSION}: "
                "it was written by a newer one. Update phased-consistency."
            )
        readers = {
            "int": int,
            "float": float,
            "str": str,
            "str | None": str,
            "float | None": float,
            "bool": lambda v: v == "True",
            "tuple[int, ...]": lambda v: tuple(int(t) for t in v.split(",")),
        }
        lacking = [HEADER_PREFIX + f.name for f in fields(cls) if f.default is MISSING and f.name not in found]
        if lacking:
            raise ValueError(f"The adapter's header cannot be used: it lacks {', '.join(lacking)}.")
        values = {}
        for f in fields(cls):
            if f.name in found:
                try:
                    values[f.name] = readers[str(f.type)](found[f.name])  # type: ignore[operator]
                except ValueError as error:
                    said = f"{HEADER_PREFIX}{f.name} is {shortened(found[f.name])}"
                    raise ValueError(
                        f"The adapter's header cannot be used: {said}, which cannot be read as {f.type}."
                    ) from error
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"The adapter's header cannot be used: {error}") from error


_PUBLISHED = re.compile(r"pcm_(sd15|sdxl)_(?:(smallcfg|normalcfg)_(2|4|8|16)step|(lcmlike)_lora)")
SOLVER_STEPS = {"sd15": 50, "sdxl": 40}


def published_settings(name: str) -> AdapterSettings | None:
    """Settings of the adapters published with the paper, inferred from a file name such as `pcm_sd15_smallcfg_4step_converted`.

    Their files do not state their settings. `N step` is taken to mean N phases, on 50 solver steps for SD1.5 and 40 for
    SDXL; `lcmlike` one phase, sampled stochastically. None for other names.
    """
    match = _PUBLISHED.search(name)
    if match is None:
        return None
    family, regime, steps, lcmlike = match.groups()
    solver_steps = SOLVER_STEPS[family]
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
    """What an adapter file says of itself: its header, or failing that a published name or hash; None if none speaks.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or a header that cannot be used.
    """
    with _opened(path) as file:
        header = file.metadata() or {}
    try:
        own = AdapterSettings.from_header(header)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    stated = own or published_settings(Path(path).name)
    return stated or published_settings(published_name(path) or "")


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its header.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or a truncated one.
    """
    with _opened(path) as file:
        return {key: _tensor(file, key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL")
_MOST_DIMENSIONS = 8  # PyTorch counts and compares up to 64 and lays out any number, slowly; models have up to 5


def _tensor(file: Any, key: str) -> torch.Tensor:
    """One tensor of an open file; its shape is looked at first, as safetensors compares no more than its product.

    Raises:
        ValueError: a shape that no tensor can have, or a type that PyTorch cannot compute with; which.
    """
    part = file.get_slice(key)
    shape, dtype = part.get_shape(), str(part.get_dtype())
    if dtype not in _DTYPES:
        raise ValueError(f"its tensor {shortened(key)} is of {dtype}, and weights are read of {', '.join(_DTYPES)}")
    # with a 0 among them the others are bounded by nothing
    if len(shape) > _MOST_DIMENSIONS or math.prod(max(size, 1) for size in shape) > 2**48:
        raise ValueError(f"its tensor {shortened(key)} has the shape {shortened(tuple(shape))}, which no weight has")
    return file.get_tensor(key)


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
    """A safetensors file; whatever is wrong with it inside is a ValueError with its name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, or not a safetensors file.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, not a safetensors file.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def read_lora(path: str | os.PathLike) -> LoraTensors:
    """The LoRA in a file of any layout that `lora_layouts` knows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or no LoRA of a UNet; what is wrong.
    """
    tensors, header = read_lora_tensors(path)
    try:
        return sort_tensors(tensors, header)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def read_lora_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """`read_tensors`, and in the header also what PEFT says of alpha, as `sort_tensors` looks for it.

    PEFT's `save_pretrained` writes that in a file beside the tensors and nowhere else.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or the file beside is longer than any configuration.
    """
    tensors, header = read_tensors(path)
    config = Path(path).with_name(PEFT_CONFIG)
    if METADATA_KEY in header or not any(key.startswith(PEFT_PREFIX) for key in tensors) or not config.is_file():
        return tensors, header
    if config.stat().st_size > _LONGEST_CONFIG:
        raise ValueError(f"{path} has beside it a {PEFT_CONFIG} of {config.stat().st_size} bytes, more than {_LONGEST_CONFIG}")
    return tensors, header | {PEFT_CONFIG: config.read_text(encoding="utf-8", errors="replace")}


def read_whole_lora(path: str | os.PathLike) -> LoraTensors:
    """`read_lora`, and every tensor of it has its place and its match."""
    lora = read_lora(path)
    if lora.strangers:
        raise ValueError(
            f"{path}: {len(lora.strangers)} tensors have no place in the LoRA of a UNet, such as {lora.strangers[0]}."
        )
    for misfit in lora.misfits():
        raise ValueError(f"{path}: {misfit}")
    return lora


def write_safetensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write to a temporary name and rename, so that nobody meets half a file; the folder is made if missing."""
    path = Path(path)
    # a folder for this process alone: two may fill one cache, and safetensors' own temporary file has a name that nobody knows
    folder = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{path.name}.part"
        temporary.touch()
        mode = temporary.stat().st_mode  # as every new file here; safetensors would let the owner alone read it
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, metadata=dict(metadata or {}))
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def differing_shapes(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Size | None, torch.Size | None]]:
    """The shapes, ours and theirs, of every name whose shapes differ or that one of the two has not; sorted by name."""
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (ours, theirs)]
    pairs = {name: (shapes[0].get(name), shapes[1].get(name)) for name in sorted(ours.keys() | theirs.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def kohya_state_dict(peft_state_dict: Mapping[str, torch.Tensor], alphas: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Rename PEFT's LoRA tensors (`<module>.lora_A.weight`, `<module>.lora_B.weight`) to kohya's, alpha included.

    DoRA's `<module>.lora_magnitude_vector` becomes `dora_scale`.

    Args:
        peft_state_dict: of the UNet, as `peft.get_peft_model_state_dict` gives it.
        alphas: lora_alpha of each module path.

    Raises:
        ValueError: a tensor that is none of the three, or one of a pair that is missing.
    """
    return to_kohya(adapter_tensors(peft_state_dict, alphas))


def adapter_tensors(peft_state_dict: Mapping[str, torch.Tensor], alphas: Mapping[str, float]) -> LoraTensors:
    """PEFT's LoRA tensors by module, each with its alpha; arguments and errors as of `kohya_state_dict`."""
    lora = sort_tensors(peft_state_dict)
    if lora.strangers:
        raise ValueError(f"{lora.strangers[0]} has no place in a kohya LoRA file; it takes LoRA and DoRA weights only.")
    for misfit in lora.misfits():
        raise ValueError(misfit)
    for name, parts in lora.modules.items():
        parts["alpha"] = torch.tensor(float(alphas[lora.path(name)]))
    return lora


def read_adapter(path: str | os.PathLike, alphas: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """The reverse of `write_adapter`: PEFT's LoRA tensors, float32, scaled so that they act the same with other alphas.

    Args:
        path: a LoRA file in any layout that `lora_layouts` knows.
        alphas: lora_alpha of each module path of the adapter that will hold the tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, not a LoRA of these modules, or a pair of matrices that do not fit; what is wrong.
    """
    lora = read_whole_lora(path)
    names = {module.replace(".", "_") for module in alphas}
    unknown, missing = sorted(lora.modules.keys() - names), sorted(names - lora.modules.keys())
    for what, which in (("has modules that this adapter has not", unknown), ("lacks modules of this adapter", missing)):
        if which:
            raise ValueError(f"{path} {what}: {len(which)}, such as {which[0]}.")
    return {key: tensor.float() for key, tensor in to_peft(lora, alphas).items()}


def standard_header(settings: AdapterSettings, title: str, kind: str) -> dict[str, str]:
    """`pcm.*` and `modelspec.*`, as every trained file here has them.

    Args:
        settings: of the file.
        title: a human name.
        kind: after the architecture's name: `/lora`, or nothing for a whole model.
    """
    return _settings_header(settings, kind) | {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
    }


def _settings_header(settings: AdapterSettings, kind: str) -> dict[str, str]:
    """All of `standard_header` that follows from the settings."""
    hint = f"PCMScheduler, {settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}, eta {settings.eta:g}"
    return settings.to_header() | {
        "modelspec.architecture": ARCHITECTURES[settings.base_model] + kind,
        "modelspec.prediction_type": "v" if settings.prediction_type == "v_prediction" else settings.prediction_type,
        "modelspec.usage_hint": hint,
    }


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
    write_kohya(path, adapter_tensors(peft_state_dict, alphas), settings, title, extra, dtype)


def write_kohya(
    path: str | os.PathLike,
    lora: LoraTensors,
    settings: AdapterSettings,
    title: str,
    extra: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """`write_adapter` of tensors that are sorted by module already."""
    header = standard_header(settings, title, kind="/lora") | {"ss_network_module": "networks.lora"} | _network_header(lora)
    write_safetensors(_stored(to_kohya(lora), dtype), path, {**header, **(extra or {})})


def _network_header(lora: LoraTensors) -> dict[str, str]:
    """What kohya's headers say of ranks and alphas."""
    ranks = [parts["down"].shape[0] for parts in lora.modules.values()]
    return {
        "ss_network_dim": str(_only(ranks)),
        "ss_network_alpha": str(_only([lora.alpha(name) for name in lora.modules])),
    }


def _stored(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}


def companion(path: str | os.PathLike, part: str) -> Path:
    """The file beside a video adapter's that holds one part of it, `spatial` or `motion`."""
    path = Path(path)
    return path.with_name(f"{path.stem}_{part}{path.suffix}")


def write_video_adapter(
    path: str | os.PathLike,
    lora: LoraTensors,
    settings: AdapterSettings,
    title: str,
    extra: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[Path, ...]:
    """Write an adapter in the files that its hosts want; each to a temporary name first, then renamed.

    Without motion modules it is the one kohya file of `write_adapter`. With them no file serves all hosts: `path` holds the
    whole in diffusers' layout, and beside it are what ComfyUI loads, `..._motion` in AnimateDiff's own names for
    ComfyUI-AnimateDiff-Evolved, and `..._spatial`, if there is any of it, in kohya's.

    Args:
        path: the `.safetensors` file; its folder is made if missing.
        lora: all modules, each with its two matrices.
        settings, title, extra, dtype: as of `write_adapter`.

    Returns:
        the files written, `path` the first.

    Raises:
        ValueError: a motion module that AnimateDiff's layout cannot hold.
    """
    path = Path(path)
    motion, spatial = lora.only(is_motion), lora.only(lambda name: not is_motion(name))
    if not motion.modules:
        write_kohya(path, lora, settings, title, extra, dtype)
        return (path,)
    for_comfyui = _stored(to_animatediff(motion), dtype)  # refuses before anything is written
    tensors, metadata = to_diffusers(lora)
    header = standard_header(settings, title, kind="/lora") | dict(extra or {})
    write_safetensors(_stored(tensors, dtype), path, header | {METADATA_KEY: metadata})
    motion_header = standard_header(settings, f"{title}: motion modules", kind="/lora") | dict(extra or {})
    write_safetensors(for_comfyui, companion(path, "motion"), motion_header)
    if not spatial.modules:
        return path, companion(path, "motion")
    write_kohya(companion(path, "spatial"), spatial, settings, f"{title}: spatial layers", extra, dtype)
    return path, companion(path, "motion"), companion(path, "spatial")


def restate(
    path: str | os.PathLike, output: str | os.PathLike, settings: AdapterSettings, extra: Mapping[str, str] | None = None
) -> None:
    """The same tensors under a header that says something else, such as another recommended guidance.

    Args:
        path: an adapter file.
        output: where the new one is written; may be `path`.
        settings: for the new header, in place of all that the old one says of them; other entries are kept.
        extra: further entries, new or replaced.
    """
    tensors, header = read_tensors(path)
    kept = {key: value for key, value in header.items() if not key.startswith(HEADER_PREFIX)}
    _, slash, kind = header.get("modelspec.architecture", "/lora").partition("/")
    write_safetensors(tensors, output, kept | _settings_header(settings, slash + kind) | dict(extra or {}))


def convert_adapter(path: str | os.PathLike, output: str | os.PathLike, to: str, alpha: float | None = None) -> None:
    """The same adapter in another layout: same tensors, alphas and header, other names.

    Alpha goes where the layout keeps it: a tensor beside each module for `kohya`, diffusers' own metadata in the header for
    `diffusers`, so that neither rounds a number. Settings that follow from a published name or hash are written down, as
    inferred, because the new file has neither. Of kohya's own header, hashes of the old tensors are left out, and ranks and
    alphas are those of the new file.

    Args:
        path: an adapter file in any layout that `lora_layouts` knows.
        output: the `.safetensors` file to write; to a temporary name first, then renamed.
        to: one of `lora_layouts.FORMATS`.
        alpha: of modules of which the file says none; None writes down what hosts take it for, alpha = rank.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown format, an output that is not `.safetensors`, an alpha that is no number above 0, motion modules
            for `kohya`, or a file that is truncated, mismatched, not finite or no LoRA of a diffusers UNet; what is wrong.
    """
    if to not in FORMATS:
        raise ValueError(f"There is no format {to!r} to convert to; choose one of {', '.join(FORMATS)}.")
    if Path(output).suffix != ".safetensors":
        raise ValueError(f"Only safetensors files are written; {output} does not end in .safetensors.")
    lora = read_whole_lora(path)
    motion = [name for name in lora.modules if is_motion(name)]
    if to == "kohya" and motion:
        raise ValueError(
            f"{path} adapts {len(motion)} motion modules, whose names hosts misread in kohya's layout: diffusers loads "
            "the other modules alone and says nothing. Training writes two files beside the whole one instead: ..._motion for "
            "ComfyUI-AnimateDiff-Evolved, and ..._spatial in kohya's layout."
        )
    if alpha is not None:
        if lora.layouts == ("animatediff",):
            raise ValueError(
                f"{path} is in AnimateDiff's layout, in which scales are in the weights, so that alpha = rank: leave alpha out."
            )
        if not finite_number(alpha, "alpha", least=0):
            raise ValueError("With alpha 0 the adapter would do nothing.")
        lora = lora.stating(alpha)
    try:
        for name in lora.modules:
            dotted_name(name)  # of another model, the new names would mean nothing
            if not math.isfinite(lora.alpha(name)):
                raise ValueError(f"the alpha of {name} is {lora.alpha(name)}.")
        tensors, metadata = (to_kohya(lora), None) if to == "kohya" else to_diffusers(lora)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    header = {key: value for key, value in read_tensors(path)[1].items() if key not in _HASHES}
    header |= {key: value for key, value in _network_header(lora).items() if key in header}
    settings = read_settings(path)
    if settings is not None and settings.inferred:
        header |= settings.to_header()
    header.pop(METADATA_KEY, None)
    write_safetensors(tensors, output, header if metadata is None else header | {METADATA_KEY: metadata})


def _only(values: Sequence[float]) -> float | str:
    """The value that all have, or the word for several."""
    return values[0] if len(set(values)) == 1 else "Dynamic"


def with_overrides(settings: AdapterSettings | None, **overrides: object) -> AdapterSettings:
    """Settings with some entries replaced; `num_phases` stands for even edges.

    Raises:
        ValueError: there is nothing to override and the overrides do not say the phases; num_phases beside phase_edges; or
            another number of solver steps, on whose grid the file's uneven edges are not.
    """
    num_phases = overrides.pop("num_phases", None)
    given = {k: v for k, v in overrides.items() if v is not None}
    if num_phases is not None and "phase_edges" in given:
        raise ValueError(f"num_phases={num_phases} stands for even edges, and phase_edges are given too: pass one of the two.")
    if settings is None and num_phases is None and "phase_edges" not in given:
        raise ValueError(
            "The file does not say how it was trained (no pcm.* header, no published name). "
            "Pass num_phases or phase_edges, and num_solver_steps if it is not 50."
        )
    if settings is None:
        settings = AdapterSettings(base_model="sd15", phase_edges=(0, 999), num_solver_steps=50, assumed=True)
    solver_steps = given.get("num_solver_steps", settings.num_solver_steps)
    if num_phases is None and "phase_edges" not in given and settings.grid.is_even:  # on another grid, even edges stay even
        num_phases = settings.grid.num_phases
    if num_phases is not None:
        given["phase_edges"] = PhaseGrid.even(num_phases, solver_steps, settings.num_train_timesteps).edges  # type: ignore[arg-type]
    if "num_solver_steps" in given:  # on a smaller grid the recommended steps may not fit, which nobody asked for
        steps = min(settings.num_inference_steps, whole_number(solver_steps, "num_solver_steps"))
        given.setdefault("num_inference_steps", max(steps, 1))
    return replace(settings, **given)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Inspection:
    """What can be seen in a LoRA file without a model.

    Attributes:
        layouts: one, of `kohya`, `diffusers`, `diffusers-old` and `animatediff`; some tools mix two.
        modules: how many are adapted.
        ranks: of the modules, ascending.
        parameters: numbers in all matrices.
        magnitudes: whether it is a DoRA.
        problems: what is wrong with it, each a sentence; none in a whole file.
    """

    layouts: tuple[str, ...]
    modules: int
    ranks: tuple[int, ...]
    parameters: int
    magnitudes: bool
    problems: tuple[str, ...]


def inspect_adapter(path: str | os.PathLike) -> Inspection:
    """Read every tensor of a LoRA file and look for what would make a host drop it or draw black pictures.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, a truncated one, or no LoRA in a layout that `lora_layouts` knows.
    """
    lora = read_lora(path)
    problems = []
    if lora.strangers:
        problems.append(f"{len(lora.strangers)} tensors have no place in a LoRA, such as {lora.strangers[0]}.")
    if lora.without_alpha:
        problems.append(
            f"{len(lora.without_alpha)} modules have no alpha, such as {lora.without_alpha[0]}: hosts take alpha = rank, which "
            "is too strong if it was trained with less."
        )
    motion = [name for name in lora.modules if is_motion(name) and name not in lora.paths]  # which kohya's names say not
    if motion:
        problems.append(
            f"{len(motion)} motion modules are in kohya's layout, such as {motion[0]}: diffusers and ComfyUI leave them out. "
            "load_pcm_lora takes them; for load_lora_weights, convert it to diffusers."
        )
    problems += lora.misfits()
    problems += [f"{name} holds numbers that are not finite." for name in lora.not_finite()]
    if lora.is_zero and not lora.has_magnitudes:
        problems.append("Every module is zero: the adapter does nothing.")
    matrices = [tensor for parts in lora.modules.values() for part, tensor in parts.items() if part in ("down", "up")]
    ranks = {parts["down"].shape[0] for parts in lora.modules.values() if "down" in parts and parts["down"].ndim}
    return Inspection(
        lora.layouts,
        len(lora.modules),
        tuple(sorted(ranks)),
        sum(tensor.numel() for tensor in matrices),
        lora.has_magnitudes,
        tuple(problems),
    )


def describe(path: str | os.PathLike) -> str:
    """What an adapter file says of itself, in words, a line each.

    Raises:
        FileNotFoundError, ValueError: as `inspect_adapter`.
    """
    found = inspect_adapter(path)
    size = os.path.getsize(path) / 2**20
    ranks = ", ".join(map(str, found.ranks))
    lines = [
        f"{path}: {size:.1f} MiB, {found.modules} modules of rank {ranks}, {found.parameters / 1e6:.2f} M parameters",
        f"layout         {' and '.join(found.layouts)}{', with DoRA magnitudes' if found.magnitudes else ''}",
    ]
    if found.layouts == ("animatediff",):
        lines.append("               motion modules, for ComfyUI-AnimateDiff-Evolved")
    elif found.layouts != ("kohya",):
        lines.append("               ComfyUI's own loader drops attention modules: use PCM LoRA Loader, or convert it to kohya")
    elif found.magnitudes:
        lines += [
            "               diffusers drops kohya's DoRA magnitudes: load it with load_pcm_lora, or convert it to diffusers;",
            "               ComfyUI's own loader applies them otherwise than PEFT: use PCM LoRA Loader",
        ]
    settings = read_settings(path)
    if settings is None:
        lines.append("It does not say how it was trained; pass num_phases when loading it.")
    else:
        source = "inferred from what was published" if settings.inferred else "stated in its header"
        grid = settings.grid
        negative = "a negative prompt works" if settings.guidance_scale > 1 else "no negative prompt"
        lines += [
            f"family         {settings.base_model}, predicts {settings.prediction_type} ({source})",
            f"phases         {grid.num_phases}, edges at {', '.join(map(str, settings.phase_edges))}, "
            f"{settings.num_solver_steps} solver steps",
            f"guidance       {settings.guidance_scale:g} recommended ({negative})",
            f"steps          {settings.num_inference_steps} recommended, at "
            f"{', '.join(map(str, grid.sampling_timesteps(settings.num_inference_steps)))}",
            f"noise          eta {settings.eta:g}: {'deterministic' if settings.eta == 0 else 'drawn anew between steps'}",
        ]
        if settings.beta_schedule is not None:
            lines.append(f"betas          {settings.beta_schedule}")
        if not settings.inferred:
            lines.append(f"trained with   guidance {settings.training_guidance_scale:g}")
    lines += [f"PROBLEM        {problem}" for problem in found.problems] or ["It is whole."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Describe files, or convert one; 1 if one of them cannot be read or has a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m pcm_scheduler.lora_file", description="What adapter files say of themselves."
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument(
        "--convert", choices=FORMATS, help="write the file in another layout; peft is diffusers' by another name"
    )
    parser.add_argument("--output", metavar="FILE", help="the .safetensors file that --convert writes")
    parser.add_argument("--alpha", type=float, help="what --convert writes for modules of which the file says no alpha")
    given = parser.parse_args(arguments)
    files, failed = given.files, False
    if (given.convert is None) != (given.output is None) or (given.convert and len(files) != 1):
        parser.error("--convert takes one FILE, and --output says where to.")
    if given.alpha is not None and not given.convert:
        parser.error("--alpha is of --convert.")
    if given.convert:
        try:
            guessed = len(read_lora(files[0]).without_alpha) if given.alpha is None else 0
            convert_adapter(files[0], given.output, given.convert, given.alpha)
        except (OSError, ValueError) as error:
            print(error)
            return 1
        if guessed:
            print(
                f"PROBLEM        {files[0]} says no alpha of {guessed} modules: {given.output} says alpha = rank, which is a "
                "guess. If it was trained with another, give it by --alpha."
            )
            failed = True
        files = [given.output]
    for path in files:
        try:
            text = describe(path)
        except (OSError, ValueError) as error:
            text = str(error)
            failed = True
        failed |= any(line.startswith("PROBLEM ") for line in text.splitlines()[1:])
        print(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
