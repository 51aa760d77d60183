"""A folder of pictures with captions beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class CaptionedImage:
    """A picture's file and its words."""

    path: Path
    caption: str


def find_images(folder: Path) -> list[CaptionedImage]:
    """Every picture under `folder` that has a caption `.txt` beside it, sorted by path.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: pictures without captions (they are named), or no pictures.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data.folder {folder} does not exist.")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no pictures; looked for {', '.join(sorted(SUFFIXES))}.")
    without = [p for p in paths if not p.with_suffix(".txt").is_file()]
    if without:
        named = ", ".join(p.name for p in without[:5])
        raise ValueError(f"{len(without)} of {len(paths)} pictures have no caption .txt beside them: {named}.")
    return [CaptionedImage(p, p.with_suffix(".txt").read_text(encoding="utf-8").strip()) for p in paths]


def load_image(path: Path, resolution: int) -> torch.Tensor:
    """Decode, turn upright, scale the short side to `resolution` and crop the middle: (3, R, R) in [-1, 1].

    Raises:
        ValueError: the file is not a readable picture.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.fit(
                ImageOps.exif_transpose(file).convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS
            )
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
