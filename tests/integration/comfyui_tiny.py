"""For the hosts, in ComfyUI's own Python: its start, packs loaded as it loads them, and a tiny random SD1.5."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

CONFIG = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1], "context_dim": 64,
    "num_heads": 4, "use_spatial_transformer": True, "legacy": False, "use_checkpoint": False, "adm_in_channels": None,
    "use_temporal_attention": False, "use_linear_in_transformer": False,
}  # fmt: skip


def start(comfyui, *flags):
    """ComfyUI reads its arguments when it is imported: nothing of it may be before this."""
    sys.argv = ["main.py", "--cpu", *flags]
    sys.path.insert(0, str(comfyui))
    import comfy.options

    comfy.options.enable_args_parsing()


def load_pack(folder, name):
    """A folder of custom_nodes under any name, as ComfyUI imports it."""
    spec = importlib.util.spec_from_file_location(
        name.replace(".", "_x_"), Path(folder) / "__init__.py", submodule_search_locations=[str(folder)]
    )
    pack = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = pack
    spec.loader.exec_module(pack)
    return pack


def load_our_nodes(folder):
    """Our nodes by their ids."""
    extension = asyncio.run(load_pack(folder, "a pack-of.any name").comfy_entrypoint())
    return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}


def tiny_model(**changes):
    """A MODEL, every weight drawn: ComfyUI leaves them as it found the memory.

    Norms are about 1. At 0 all that follows them is 0, and a network that answers 0 shows nothing about a sampler.
    """
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    torch.manual_seed(0)
    config = comfy.supported_models.SD15(CONFIG | changes)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
        if p.ndim == 1 and name.endswith("weight"):
            p.data += 1
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def tiny_lora(model):
    """Tensors in kohya's layout of a LoRA of every module of a MODEL that one can adapt: rank 4, alpha 0.5."""
    import comfy.utils
    import torch

    drawn, weights, lora = torch.Generator().manual_seed(0), model.model.state_dict(), {}
    for name, key in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items():
        weight = weights.get(f"diffusion_model.{key}")
        if name.endswith(".weight") and weight is not None and weight.ndim > 1:
            module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            ones = [1] * (weight.ndim - 2)
            lora[f"{module}.lora_down.weight"] = 0.05 * torch.randn(4, *weight.shape[1:], generator=drawn)
            lora[f"{module}.lora_up.weight"] = 0.05 * torch.randn(weight.shape[0], 4, *ones, generator=drawn)
            lora[f"{module}.alpha"] = torch.tensor(0.5)
    return lora


def tiny_prompts():
    """Two CONDITIONINGs."""
    import torch

    return [[[torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(i)), {}]] for i in (1, 2)]
