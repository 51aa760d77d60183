"""Contact sheets: rows and columns of pictures with their names."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (30, 30, 30), (255, 255, 255)


def to_pil(image: torch.Tensor) -> Image.Image:
    """A uint8 picture (3, H, W)."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def contact_sheet(rows: Mapping[str, Sequence[torch.Tensor] | torch.Tensor], tile: int = 112) -> Image.Image:
    """One row of pictures per name, beside it.

    Args:
        rows: name -> uint8 pictures (3, H, W), equally many in every row.
        tile: side of a picture on the sheet, in pixels.
    """
    columns = len(next(iter(rows.values())))
    gap, font = 4, ImageFont.load_default(size=15)
    label_width = max(150, *(math.ceil(font.getlength(name)) + 20 for name in rows))
    sheet = Image.new("RGB", (label_width + columns * (tile + gap), len(rows) * (tile + gap) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (name, images) in enumerate(rows.items()):
        y = gap + i * (tile + gap)
        draw.text((10, y + tile // 2), name, fill=INK, font=font, anchor="lm")
        for j, image in enumerate(images):
            sheet.paste(to_pil(image).resize((tile, tile), Image.Resampling.LANCZOS), (label_width + j * (tile + gap), y))
    return sheet


def save(image: Image.Image, path: Path) -> None:
    """Write to a temporary name and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    image.save(temporary, format=path.suffix.lstrip(".").upper().replace("JPG", "JPEG"))
    os.replace(temporary, path)
