"""What works on whole diffusers pipelines."""

from .clips import export_clip
from .load_pcm_lora import load_pcm_lora
from .load_pcm_unet import load_pcm_unet
from .pcm_edit import PCMEditOutput, PCMEditPipeline

__all__ = ["PCMEditOutput", "PCMEditPipeline", "export_clip", "load_pcm_lora", "load_pcm_unet"]
