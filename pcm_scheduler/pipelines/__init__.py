"""What works on whole diffusers pipelines."""

from .load_pcm_lora import load_pcm_lora

__all__ = ["load_pcm_lora"]
