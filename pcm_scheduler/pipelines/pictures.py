"""Pictures and masks in the forms that people have them, to tensors and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

OUTPUT_TYPES = ("pil", "np", "pt")

Pictures = Image.Image | np.ndarray | torch.Tensor | Sequence[Any]
"""One picture or several: PIL; numpy (H, W), (H, W, 3) or (N, H, W, 3); tensors (3, H, W) or (N, 3, H, W). uint8 or [0, 1]."""


def _array_to_tensor(array: np.ndarray) -> torch.Tensor:
    """(H, W), (H, W, C) or (N, H, W, C) to (N, C, H, W), same numbers."""
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))  # PIL lends its memory for reading only
    if tensor.ndim == 2:
        tensor = tensor[..., None]
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.ndim != 4:
        raise ValueError(f"A numpy picture has shape (H, W), (H, W, 3) or (N, H, W, 3); got {tuple(array.shape)}.")
    return tensor.permute(0, 3, 1, 2)


def _tensor(given: Pictures, name: str, colours: str) -> torch.Tensor:
    """(N, C, H, W) float32 in [0, 1]; PIL pictures are turned by their EXIF orientation and brought to `colours`."""
    if isinstance(given, Image.Image):
        tensor = _array_to_tensor(np.asarray(_eight_bit(ImageOps.exif_transpose(given), name).convert(colours)))
    elif isinstance(given, np.ndarray):
        tensor = _array_to_tensor(given)
    elif isinstance(given, torch.Tensor):
        tensor = given[None] if given.ndim == 3 else given[None, None] if given.ndim == 2 else given
        if tensor.ndim != 4:
            raise ValueError(f"{name}: a tensor has shape (C, H, W) or (N, C, H, W); got {tuple(given.shape)}.")
    elif isinstance(given, Sequence) and not isinstance(given, str) and len(given):
        parts = [_tensor(one, name, colours) for one in given]
        sizes = {tuple(part.shape[-2:]) for part in parts}
        if len(sizes) > 1:
            raise ValueError(f"{name}: pictures of one call have one size; got {sorted(sizes)} (height, width).")
        return torch.cat(parts)
    else:
        raise ValueError(f"{name} must be PIL pictures, numpy arrays or tensors, one or a list; got {type(given).__name__}.")
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    tensor = tensor.float()
    low, high = tensor.aminmax()
    if not (tensor.isfinite().all() and low >= 0 and high <= 1):
        raise ValueError(
            f"{name} must be uint8, or floats in [0, 1]; got values from {low.item():g} to {high.item():g}. "
            "A picture in [-1, 1] becomes one with x / 2 + 0.5."
        )
    return tensor


def eight_bit_grey(picture: Image.Image) -> Image.Image:
    """Of 16 bits of grey 8, white for white; others as they are. PIL's own way to other modes makes all above 255 white."""
    if not picture.mode.startswith("I;16"):
        return picture
    return Image.fromarray((np.asarray(picture).astype(np.float32) / 257).round().astype(np.uint8))


def _eight_bit(picture: Image.Image, name: str) -> Image.Image:
    """8 bits a channel.

    Raises:
        ValueError: integers or floats of no stated range.
    """
    picture = eight_bit_grey(picture)
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"{name} has PIL's mode {picture.mode}, which does not say what white is. Convert it to 8 bits, or pass floats in "
            "[0, 1] as a numpy array."
        )
    return picture


def to_pictures(given: Pictures, name: str = "image") -> torch.Tensor:
    """To (N, 3, H, W) float32 in [-1, 1]; greyscale becomes three equal channels.

    Raises:
        ValueError: another type, shape, range or number of channels; what was given.
    """
    tensor = _tensor(given, name, "RGB")
    if tensor.shape[1] == 1:
        tensor = tensor.expand(-1, 3, -1, -1)
    if tensor.shape[1] != 3:
        raise ValueError(f"{name} has {tensor.shape[1]} channels; a picture has 3, or 1. Drop the alpha channel first.")
    return tensor * 2 - 1


def to_levels(given: Pictures, name: str = "image") -> torch.Tensor:
    """To (N, 3, H, W) uint8 on the CPU, one after the other, so that a long clip is never whole in float32.

    Raises:
        ValueError: as `to_pictures`, or several sizes.
    """
    several: Iterable[Any] = [given] if isinstance(given, Image.Image) or getattr(given, "ndim", 4) != 4 else given
    parts = [((to_pictures(one, name) / 2 + 0.5) * 255).round().byte().cpu() for one in several]
    sizes = sorted({tuple(part.shape[-2:]) for part in parts})
    if len(sizes) != 1:
        raise ValueError(f"{name}: pictures of one call have one size; got {sizes or 'none'} (height, width).")
    return torch.cat(parts)


def to_mask(given: Pictures, size: tuple[int, int]) -> torch.Tensor:
    """To (N, 1, H, W) float32 in [0, 1]: 1 where white, which is what is drawn anew, as in diffusers.

    Raises:
        ValueError: not of the picture's size.
    """
    tensor = _tensor(given, "mask_image", "L").mean(dim=1, keepdim=True)
    if tuple(tensor.shape[-2:]) != size:
        raise ValueError(
            f"mask_image is {tensor.shape[-2]} x {tensor.shape[-1]} and the picture {size[0]} x {size[1]} (height x width); "
            "give them one size."
        )
    return tensor


def from_pictures(pictures: torch.Tensor, output_type: str) -> Any:
    """(N, 3, H, W) in [-1, 1] to a list of PIL pictures (`pil`), (N, H, W, 3) numpy (`np`) or a tensor (`pt`), in [0, 1]."""
    check_output_type(output_type)
    tensor = (pictures.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return tensor
    array = tensor.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(one) for one in (array * 255).round().astype(np.uint8)]


def check_output_type(output_type: str) -> None:
    """Raise ValueError unless it is one of `OUTPUT_TYPES`."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}.")
