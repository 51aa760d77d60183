"""The layouts in which LoRA files of diffusers' UNets are found, and the way from each to the others.

- `kohya`: `lora_unet_<module_with_underscores>.lora_down.weight`, `.lora_up.weight`, `.dora_scale`, `.alpha`.
- `diffusers`: `unet.<module>.lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector`; alphas in the header's
  `lora_adapter_metadata`.
- `diffusers-old`: `unet.<module>.lora.down.weight`, `.lora.up.weight`, in attention also `processor.to_q_lora.down.weight`;
  sometimes `.alpha`.
- `animatediff`: AnimateDiff's own of motion modules, `<block>.motion_modules.N.temporal_transformer.transformer_blocks.M.
  attention_blocks.{0,1}.processor.to_q_lora.{down,up}.weight`; no alpha, so that scales are folded into the weights.

A module without an alpha acts with alpha = rank, in every host. DoRA magnitudes are one number an output channel: `(out,)`
here, `(out, 1, ...)` in kohya's files, in PEFT's `(out,)` for a linear module and `(1, out, 1, 1)` for a convolution.
ComfyUI (0.3.64, 0.8.0) reads them but divides by the norm of the base weight, PEFT by that of base and LoRA together: not the
same, unless PCM LoRA Loader makes up for it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from .checks import parse_json, shortened

FORMATS = ("kohya", "diffusers", "peft")  # that can be written; PEFT's names are diffusers'
METADATA_KEY = "lora_adapter_metadata"  # diffusers' own, JSON of a peft.LoraConfig with prefixed entries
PEFT_CONFIG = "adapter_config.json"  # PEFT's own file of the same

# The parts of diffusers' UNet module names. None that holds an underscore can be put together from the others, so that a name
# whose dots became underscores is read back in one way only.
_WORDS = (
    "add_embedding", "conv_in", "conv_out", "conv_shortcut", "down_blocks", "linear_1", "linear_2", "mid_block",
    "motion_modules", "proj_in", "proj_out", "time_emb_proj", "time_embedding", "to_k", "to_out", "to_q", "to_v",
    "transformer_blocks", "up_blocks",
    "attentions", "attn1", "attn2", "conv", "conv1", "conv2", "cond_proj", "downsamplers", "ff", "net", "proj", "resnets",
    "upsamplers",
)  # fmt: skip
_WORD = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))}|\d+)(?:_|$)")

_KOHYA = re.compile(r"lora_unet_([^.]+)\.(lora_down\.weight|lora_up\.weight|alpha|dora_scale)")
_DOTTED = re.compile(
    r"(?:unet\.|base_model\.model\.)*(.+?)(?:\.|_)"
    r"(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?|lora\.down\.weight|lora\.up\.weight|alpha)"
)
TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.")  # prefixes of what diffusers' files have for them
# How old files name the parts of a text encoder, and what the names are today.
_OLD_TEXT = {
    ".to_q_lora.": ".q_proj.lora.", ".to_k_lora.": ".k_proj.lora.", ".to_v_lora.": ".v_proj.lora.",
    ".to_out_lora.": ".out_proj.lora.", ".lora_linear_layer.": ".lora.",
}  # fmt: skip
_OTHERS = ("lora_", "text_encoder", "transformer.")  # of other networks than a UNet, or by other tools
_LONGEST_NAME = 512  # of a tensor; diffusers' have up to 130 letters, and reading one takes longer than it is long
_PARTS = {
    "lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha", "dora_scale": "magnitude",
    "lora_A.weight": "down", "lora_B.weight": "up", "lora.down.weight": "down", "lora.up.weight": "up",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip

# AnimateDiff's names of a motion module's parts, and diffusers'.
_ATTENTION_BLOCKS = {"attention_blocks.0": "attn1", "attention_blocks.1": "attn2"}


def is_motion(name: str) -> bool:
    """Whether a UNet's module, by its path with dots or underscores, is of AnimateDiff's motion modules."""
    return "motion_modules" in name


def is_of_original(name: str) -> bool:
    """Whether a module, by its path with underscores, is called as in the original UNet and not as in diffusers'."""
    return name.startswith(("input_blocks", "middle_block", "output_blocks"))


def dotted_name(underscored: str) -> str:
    """A UNet module's path from kohya's name for it: `mid_block_attentions_0_proj_in` is `mid_block.attentions.0.proj_in`.

    Raises:
        ValueError: not a module of a diffusers UNet of SD1.5's or SDXL's kind; where reading stopped.
    """
    words, position = [], 0
    while position < len(underscored):
        match = _WORD.match(underscored, position)
        if match is None:
            hint = " It is a name of the original UNet, not of diffusers'." if is_of_original(underscored) else ""
            raise ValueError(f"{underscored} is not a module of a diffusers UNet, from {underscored[position:]!r} on.{hint}")
        words.append(match[1])
        position = match.end()
    return ".".join(words)


@dataclass(frozen=True)
class LoraTensors:
    """The tensors of a LoRA file by module, whatever its layout.

    Attributes:
        layouts: that were met; usually one.
        modules: by the module's path with underscores: `down` (rank, in, ...), `up` (out, rank, ...), and if stored `alpha` ()
            and `magnitude` (out,).
        paths: the dotted paths, as far as the file says them.
        strangers: keys that have no place in the LoRA of a UNet, or whose place another layout's name has taken already.
    """

    layouts: tuple[str, ...]
    modules: dict[str, dict[str, torch.Tensor]]
    paths: dict[str, str]
    strangers: tuple[str, ...]

    def path(self, name: str) -> str:
        """The dotted path of a module; see `dotted_name`."""
        return self.paths.get(name) or dotted_name(name)

    def alpha(self, name: str) -> float:
        """The stored alpha of a module, or its rank."""
        parts = self.modules[name]
        return float(parts["alpha"]) if "alpha" in parts else float(parts["down"].shape[0])

    @property
    def without_alpha(self) -> list[str]:
        """The modules of which nobody says alpha, where a layout has a place for it (AnimateDiff's has none)."""
        return (
            [name for name, parts in self.modules.items() if "alpha" not in parts] if self.layouts != ("animatediff",) else []
        )

    def stating(self, alpha: float | None = None) -> LoraTensors:
        """The same, with this alpha for every module of which nobody says one; None: its rank, as hosts take it."""
        modules = {
            name: {"alpha": torch.tensor(self.alpha(name) if alpha is None else float(alpha))} | parts
            for name, parts in self.modules.items()
        }
        return replace(self, modules=modules)

    def folded(self) -> LoraTensors:
        """The same effect with alpha = rank everywhere: scales are folded into `up`, in float32."""
        modules = {}
        for name, parts in self.modules.items():
            rank = parts["down"].shape[0]
            up = parts["up"].float() * (self.alpha(name) / rank)
            modules[name] = {**parts, "up": up, "alpha": torch.tensor(float(rank))}
        return replace(self, modules=modules)

    def only(self, wanted: Callable[[str], bool]) -> LoraTensors:
        """The modules of these names."""
        return replace(self, modules={name: parts for name, parts in self.modules.items() if wanted(name)})

    @property
    def is_zero(self) -> bool:
        """Whether no matrix adds anything."""
        return not any(_computable(parts["up"]).any() for parts in self.modules.values() if "up" in parts)

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is a DoRA."""
        return any("magnitude" in parts for parts in self.modules.values())

    def not_finite(self) -> list[str]:
        """The modules with numbers from which every picture would be black."""
        return [
            name for name, parts in self.modules.items() if not all(_computable(t).isfinite().all() for t in parts.values())
        ]

    def misfits(self) -> list[str]:
        """What keeps modules from acting at all, a sentence each: lacking matrices, or shapes that do not go together."""
        found = []
        for name, parts in self.modules.items():
            if not {"down", "up"} <= parts.keys():
                stored = "only one" if {"down", "up"} & parts.keys() else "none"
                found.append(f"{name} has {stored} of its two matrices.")
                continue
            down, up = parts["down"], parts["up"]
            if down.ndim < 2 or up.ndim < 2 or up.shape[1] != down.shape[0]:
                ranks = f"rank {down.shape[0]} and {up.shape[1]}" if min(down.ndim, up.ndim) > 1 else "not both are matrices"
                found.append(f"The matrices of {name} do not fit: {ranks}.")
            elif not (down.numel() and up.numel()):
                found.append(f"A matrix of {name} is empty: {tuple(down.shape)} and {tuple(up.shape)}.")
            elif not (down.is_floating_point() and up.is_floating_point()):
                found.append(f"The matrices of {name} are not of floating-point numbers: {down.dtype} and {up.dtype}.")
            elif "magnitude" in parts and parts["magnitude"].shape != up.shape[:1]:
                found.append(
                    f"The DoRA magnitudes of {name} are {tuple(parts['magnitude'].shape)}, not one for each of its "
                    f"{up.shape[0]} output channels."
                )
            if "alpha" in parts and parts["alpha"].numel() != 1:
                found.append(f"The alpha of {name} is not one number.")
        return found


def sort_tensors(tensors: Mapping[str, torch.Tensor], header: Mapping[str, str] | None = None) -> LoraTensors:
    """Find out which tensor of a LoRA file is which.

    Args:
        tensors: of the file.
        header: of the file; diffusers keeps alpha there, and PEFT in a `PEFT_CONFIG` beside it, which is here under that name.

    Raises:
        ValueError: nothing that a known layout has, or diffusers' metadata that cannot be read.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    paths: dict[str, str] = {}
    layouts, strangers = set(), []
    for key, tensor in tensors.items():
        if len(key) > _LONGEST_NAME:
            strangers.append(f"{key[:40]}... of {len(key)} letters")
            continue
        if match := _KOHYA.fullmatch(key):
            layouts.add("kohya")
            name = match[1]
        elif (match := _DOTTED.fullmatch(key)) and not key.startswith(_OTHERS):
            if "lora" in match[2]:
                old = "animatediff" if ".temporal_transformer." in key else "diffusers-old"
                layouts.add(old if match[2].startswith("lora.") else "diffusers")
            path = _plain_path(match[1])
            name = path.replace(".", "_")
            paths[name] = path
        else:
            strangers.append(key)
            continue
        part, parts = _PARTS[match[2]], modules.setdefault(name, {})
        if part in parts:  # in no host would both act, and which one does is chance
            strangers.append(f"{key} (a second tensor for one place)")
            continue
        parts[part] = _channel_vector(tensor) if part == "magnitude" else tensor
    if not any({"down", "up"} & parts.keys() for parts in modules.values()):
        example = f", such as {min(tensors)[:_LONGEST_NAME]}," if tensors else ""
        raise ValueError(
            f"holds no LoRA of a UNet: none of its {len(tensors)} tensors{example} is named as in kohya's or diffusers' layout."
        )
    _add_stated_alphas(modules, paths, header or {})
    return LoraTensors(tuple(sorted(layouts)), modules, paths, tuple(strangers))


def sort_text_tensors(tensors: Mapping[str, torch.Tensor], header: Mapping[str, str], prefix: str) -> LoraTensors | None:
    """The LoRA of a text encoder in a diffusers file, by the paths of its modules; None if there is none that is known.

    Args:
        tensors, header: of the file.
        prefix: of `TEXT_ENCODERS`.

    Raises:
        ValueError: diffusers' metadata that cannot be read.
    """
    own = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            for old, today in _OLD_TEXT.items():
                name = name.replace(old, today)
            own[name] = tensor
    told = {}
    if METADATA_KEY in header:
        try:
            stated = parse_json(header[METADATA_KEY]).items()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"has {METADATA_KEY} in its header that cannot be read: {error}") from error
        told = {key.removeprefix(prefix): value for key, value in stated if key.startswith(prefix)}
    if not any(_DOTTED.fullmatch(key) for key in own):
        return None
    return sort_tensors(own, {METADATA_KEY: json.dumps(told)} if told else {})


def _plain_path(path: str) -> str:
    """A dotted path as the module is called today: attention processors held the LoRA once, and `to_out` for `to_out.0`.

    Of motion modules also AnimateDiff's own names.
    """
    path = path.replace(".processor.", ".").replace(".temporal_transformer.", ".")
    for theirs, ours in _ATTENTION_BLOCKS.items():
        path = path.replace(f".{theirs}.", f".{ours}.")
    return path + ".0" if path.endswith(".to_out") else path


def _computable(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in a type that every torch (from 2.6) can ask about: of float8 it only stores."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _channel_vector(magnitude: torch.Tensor) -> torch.Tensor:
    """(out,) from any shape in which output channels are where PEFT or kohya has them; others stay as they are."""
    stored = magnitude.shape
    at_first = magnitude.ndim > 0 and stored[0] == magnitude.numel()
    peft_convolution = magnitude.ndim > 2 and stored[1] == magnitude.numel()
    return magnitude.reshape(-1) if at_first or peft_convolution else magnitude


def _add_stated_alphas(
    modules: dict[str, dict[str, torch.Tensor]], paths: Mapping[str, str], header: Mapping[str, str]
) -> None:
    """Put what diffusers' or PEFT's metadata say of alpha beside each module that has none of its own."""
    key = next((key for key in (METADATA_KEY, PEFT_CONFIG) if key in header), None)
    if key is None:
        return
    try:
        stated = {name.removeprefix("unet."): value for name, value in parse_json(header[key]).items()}
        default, patterns = stated.get("lora_alpha"), _Patterns(stated.get("alpha_pattern") or {})
        for name, path in paths.items():
            alpha = patterns.value(path, default)
            parts = modules[name]
            if alpha is None or "alpha" in parts or "down" not in parts or not parts["down"].ndim:
                continue
            # rank-stabilised LoRA divides by the root of the rank
            factor = parts["down"].shape[0] ** 0.5 if stated.get("use_rslora") else 1.0
            parts["alpha"] = torch.tensor(float(alpha) * factor)
            if not parts["alpha"].isfinite():  # beyond what float32 holds, too
                raise ValueError(f"its alpha is {shortened(alpha)}")
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"has {key} {'in its header' if key == METADATA_KEY else 'beside it'} that cannot be read: {error}"
        ) from error


class _Patterns:
    """PEFT's `alpha_pattern`: names of modules, or their endings, and values.

    To PEFT they are regular expressions. One in a file may be such that matching it takes years, so what is taken here are
    names, `^` before and `$` after them, dots that stand for themselves, and `.*`, which is what is written in practice.

    Raises:
        ValueError: a pattern with anything else in it, or too many with `.*`; which.
    """

    _MOST = 64  # with `.*`, each of which every module is compared with

    def __init__(self, patterns: Mapping[str, Any]):
        self._exact: dict[str, tuple[int, Any]] = {}  # by the whole path
        self._endings: dict[str, tuple[int, Any]] = {}  # by its last parts
        self._globs: list[tuple[tuple[str, ...], int, Any]] = []  # any of these forms
        for number, (key, value) in enumerate(patterns.items()):
            plain = key.removesuffix("$").removeprefix("^").replace("\\.", ".")
            if not re.fullmatch(r"[\w.-]*", plain.replace(".*", "")):
                raise ValueError(f"alpha_pattern {shortened(key)} is not a module's name, with `.*` for what may vary")
            if ".*" in plain:
                glob = plain.replace(".*", "*")
                self._globs.append(((glob,) if key.startswith("^") else (glob, f"*.{glob}"), number, value))
            (self._exact if key.startswith("^") else self._endings).setdefault(plain, (number, value))
        if len(self._globs) > self._MOST:
            raise ValueError(f"alpha_pattern has {len(self._globs)} entries with `.*`, more than {self._MOST}")

    def value(self, path: str, default: Any) -> Any:
        """Of the first pattern that a path matches."""
        parts = path.split(".")
        found = [self._endings.get(".".join(parts[i:])) for i in range(len(parts))] + [self._exact.get(path)]
        for globs, number, value in self._globs:
            if any(fnmatchcase(path, glob) for glob in globs):
                found.append((number, value))
        return min((entry for entry in found if entry), key=lambda entry: entry[0], default=(0, default))[1]


def to_kohya(lora: LoraTensors) -> dict[str, torch.Tensor]:
    """The tensors in kohya's layout, alpha for every module."""
    tensors = {}
    for name, parts in lora.modules.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = parts["down"]
        tensors[f"lora_unet_{name}.lora_up.weight"] = parts["up"]
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(lora.alpha(name))
        if "magnitude" in parts:
            ones = (1,) * (parts["down"].ndim - 1)
            tensors[f"lora_unet_{name}.dora_scale"] = parts["magnitude"].reshape(-1, *ones)
    return tensors


def to_diffusers(lora: LoraTensors) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors in diffusers' layout, bit for bit, and the JSON for the header that keeps their ranks and alphas.

    Raises:
        ValueError: a name that does not say its module; see `dotted_name`.
    """
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, parts in lora.modules.items():
        path = lora.path(name)
        tensors |= {f"unet.{key}": tensor for key, tensor in _peft_tensors(path, parts).items()}
        ranks[path], alphas[path] = parts["down"].shape[0], lora.alpha(name)
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    stated: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{path}": value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{path}": value for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "use_dora": lora.has_magnitudes,
    }
    return tensors, json.dumps({f"unet.{key}": value for key, value in stated.items()}, sort_keys=True)


def to_animatediff(lora: LoraTensors) -> dict[str, torch.Tensor]:
    """Motion modules under AnimateDiff's own names, as ComfyUI-AnimateDiff-Evolved reads them; scales folded into `up`.

    Attention modules have the names that AnimateDiff's published motion LoRAs have. Those have no others; the feed-forward ones
    are named in the same way, which AnimateDiff-Evolved's reader takes too.

    Raises:
        ValueError: modules that are not linear ones of motion modules, or DoRA magnitudes; which.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parts in lora.modules.items():
        path = lora.path(name)
        if not is_motion(path) or ".transformer_blocks." not in path or parts["down"].ndim != 2 or "magnitude" in parts:
            raise ValueError(f"AnimateDiff's layout holds plain LoRA matrices of motion modules only, and no {path}.")
        path = path.replace(".transformer_blocks.", ".temporal_transformer.transformer_blocks.", 1).removesuffix(".0")
        for theirs, ours in _ATTENTION_BLOCKS.items():
            path = path.replace(f".{ours}.", f".{theirs}.processor.")
        tensors[f"{path}_lora.down.weight"] = parts["down"]
        scale = lora.alpha(name) / parts["down"].shape[0]
        tensors[f"{path}_lora.up.weight"] = parts["up"] if scale == 1 else parts["up"].float() * scale
    return tensors


def stacked(first: LoraTensors, second: LoraTensors) -> LoraTensors:
    """One LoRA that acts as two together: where both adapt a module, their ranks are added and their scales folded in.

    Raises:
        ValueError: a module of both has DoRA magnitudes, whose effects do not add.
    """
    modules = first.modules | second.modules
    for name in first.modules.keys() & second.modules.keys():
        both = [lora.modules[name] for lora in (first, second)]
        if any("magnitude" in parts for parts in both):
            raise ValueError(f"{name} has DoRA magnitudes, which do not add to another LoRA.")
        ups = [lora.modules[name]["up"].float() * (lora.alpha(name) / lora.modules[name]["down"].shape[0])
               for lora in (first, second)]  # fmt: skip
        down = torch.cat([parts["down"].float() for parts in both])
        modules[name] = {"down": down, "up": torch.cat(ups, dim=1), "alpha": torch.tensor(float(len(down)))}
    layouts = tuple(sorted({*first.layouts, *second.layouts}))
    return LoraTensors(layouts, modules, first.paths | second.paths, first.strangers + second.strangers)


def to_peft(lora: LoraTensors, alphas: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """PEFT's own names, `lora_B` scaled in float32 so that an adapter with other alphas acts the same.

    Args:
        lora: whole.
        alphas: lora_alpha of each dotted path of the adapter that will hold the tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path, alpha in alphas.items():
        name = path.replace(".", "_")
        parts = lora.modules[name]
        tensors |= _peft_tensors(path, parts | {"up": parts["up"].float() * (lora.alpha(name) / alpha)})
    return tensors


def _peft_tensors(path: str, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {f"{path}.lora_A.weight": parts["down"], f"{path}.lora_B.weight": parts["up"]}
    if "magnitude" in parts:
        convolution = (1, -1) + (1,) * (parts["down"].ndim - 2)
        shape = (-1,) if parts["down"].ndim == 2 else convolution
        tensors[f"{path}.lora_magnitude_vector"] = parts["magnitude"].reshape(shape)
    return tensors
