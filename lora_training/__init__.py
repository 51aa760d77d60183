"""Distillation of phased consistency adapters: `accelerate launch lora_training/train.py --config my.yaml`."""
