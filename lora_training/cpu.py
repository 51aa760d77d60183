"""Two habits that make small networks nearly twice as fast to train on CPUs."""

from __future__ import annotations

import ctypes
import sys

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of returning it and paying page faults at every step; elsewhere do nothing."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        except (OSError, AttributeError):
            pass  # another C library


def use_plain_attention(unet: UNet2DConditionModel) -> None:
    """On CPUs the backward of fused attention takes longer than the rest of the step; plain matrix products are faster."""
    unet.set_attn_processor(AttnProcessor())
