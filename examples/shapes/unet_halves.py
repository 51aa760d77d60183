"""The UNet in two halves: the way down, which knows of no motion; the middle and the way up, which motion modules change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel


@dataclass(frozen=True)
class Lower:
    """What the middle and the way up are given of N clips; fp16 where it is kept.

    Attributes:
        hidden: what comes out of the way down, (N, F, C, h, w).
        temb: embedding of the timestep, (N, C).
        embeds: of the text, (N, L, C).
        residuals: along the way down, each (N, F, C, h, w); without those of the first block, whose resolution only the
            last block of the way up has, which `layout` leaves out.
    """

    hidden: torch.Tensor
    temb: torch.Tensor
    embeds: torch.Tensor
    residuals: tuple[torch.Tensor, ...]

    def map(self, of_clips, of_frames) -> Lower:
        """Another, of what functions make of the parts that frames share, and of those that each has of its own."""
        own = (of_frames(part) for part in self.residuals)
        return Lower(of_frames(self.hidden), of_clips(self.temb), of_clips(self.embeds), tuple(own))


def lower(unet: UNet2DConditionModel, sample: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> Lower:
    """The way down, which knows of no motion.

    Args:
        unet: of pictures.
        sample: (N, 4, F, 16, 16).
        timesteps: (N,).
        embeds: (N, L, C).
    """
    count, frames = sample.shape[0], sample.shape[2]
    temb = unet.time_embedding(unet.time_proj(timesteps).to(sample.dtype))
    each_temb, each_text = (part.repeat_interleave(frames, 0) for part in (temb, embeds))
    hidden = unet.conv_in(sample.transpose(1, 2).flatten(0, 1))
    kept = []
    for block in unet.down_blocks:
        text = {"encoder_hidden_states": each_text} if getattr(block, "has_cross_attention", False) else {}
        hidden, residuals = block(hidden, each_temb, **text)
        kept.extend(residuals)
    smaller = [part for part in kept if part.shape[-1] < sample.shape[-1]]
    own = [part.unflatten(0, (count, frames)) for part in (hidden, *smaller)]
    return Lower(own[0], temb, embeds, tuple(own[1:]))


def layout(unet: UNetMotionModel, given: Lower) -> None:
    """The middle and the way up but for its last block, for those that see features there.

    Args:
        unet: of clips.
        given: of frames that `FramePositions` knows, in fp32.
    """
    frames = given.hidden.shape[1]
    each = given.map(lambda part: part.repeat_interleave(frames, 0), lambda part: part.flatten(0, 1))
    text = {"encoder_hidden_states": each.embeds}
    hidden, residuals = unet.mid_block(each.hidden, each.temb, num_frames=frames, **text), each.residuals
    for block in unet.up_blocks[:-1]:
        own, residuals = residuals[-len(block.resnets) :], residuals[: -len(block.resnets)]
        of_text = text if getattr(block, "has_cross_attention", False) else {}
        hidden = block(hidden, temb=each.temb, res_hidden_states_tuple=own, num_frames=frames, **of_text)
