"""Captioned pictures and clips, and the latents and text embeddings made of them once."""
