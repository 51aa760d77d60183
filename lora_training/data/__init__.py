"""Captioned pictures, and the latents and text embeddings made of them once."""
