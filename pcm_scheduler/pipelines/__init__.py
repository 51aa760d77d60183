"""What works on whole diffusers pipelines."""

from .load_pcm_lora import load_pcm_lora
from .load_pcm_unet import load_pcm_unet
from .pcm_edit import PCMEditOutput, PCMEditPipeline, Strategy

__all__ = ["PCMEditOutput", "PCMEditPipeline", "Strategy", "load_pcm_lora", "load_pcm_unet"]
