"""A pack to try things with: ComfyUI's own checkpoint loader gives the shapes models, and the examples run as they are.

A stand-in file, a few bytes of safetensors whose header names one of the models, takes the place of a checkpoint. ComfyUI knows
SD1.5 and SDXL by their sizes alone, and these models have the same structure in small, so their parts are put together here.
"""

from __future__ import annotations

import json
from pathlib import Path

import comfy.latent_formats
import comfy.ldm.modules.diffusionmodules.model as autoencoder
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.utils
import torch
from comfy.supported_models_base import ClipTarget
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

NODE_CLASS_MAPPINGS: dict[str, type] = {}
SHAPES = Path(__file__).resolve().parents[2] / "shapes"
MARK = "shapes"  # in the header: `model` or `model_xl`


def with_groups(groups: int) -> type:
    """Operations whose group norms have as many groups as the small model; ComfyUI's have 32."""

    class Operations(comfy.ops.manual_cast):
        class GroupNorm(comfy.ops.manual_cast.GroupNorm):
            def __init__(self, num_groups: int, num_channels: int, **options: object):
                super().__init__(groups, num_channels, **options)

    return Operations


def read(folder: Path, name: str = "diffusion_pytorch_model") -> tuple[dict, dict[str, torch.Tensor]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, {k: v.float() for k, v in load_file(folder / f"{name}.safetensors").items()}


class Latents(comfy.latent_formats.SD15):
    def __init__(self, scale_factor: float):
        super().__init__()
        self.scale_factor = scale_factor


def load_unet(folder: Path, scale_factor: float) -> comfy.model_patcher.ModelPatcher:
    config, weights = read(folder / "unet")
    first, *_ = widths = config["block_out_channels"]
    layers = config["layers_per_block"]
    depths = ["CrossAttn" in kind for kind in config["down_block_types"]]
    is_xl = config["addition_embed_type"] == "text_time"
    unet_config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": first,
        "num_res_blocks": [layers] * len(widths), "channel_mult": [width / first for width in widths],
        "transformer_depth": [int(d) for d in depths for _ in range(layers)], "transformer_depth_middle": 1,
        "transformer_depth_output": [int(d) for d in depths for _ in range(layers + 1)],
        "context_dim": config["cross_attention_dim"], "num_heads": config["attention_head_dim"],
        "use_spatial_transformer": True, "legacy": False, "use_checkpoint": False, "use_temporal_attention": False,
        "use_linear_in_transformer": config["use_linear_projection"], "num_classes": "sequential" if is_xl else None,
        "adm_in_channels": config["projection_class_embeddings_input_dim"],
    }  # fmt: skip
    unet_config["channel_mult"] = Widths(unet_config["channel_mult"])
    family = comfy.supported_models.SDXL if is_xl else comfy.supported_models.SD15
    model_config = family(unet_config)
    model_config.unet_config.update(num_heads=config["attention_head_dim"], num_head_channels=-1)
    model_config.set_inference_dtype(torch.float32, None)
    model_config.custom_operations = with_groups(config["norm_num_groups"])
    model_config.latent_format = Latents(scale_factor)
    model = model_config.get_model({}, "")
    if is_xl:
        model.embedder = openaimodel.Timestep(config["addition_time_embed_dim"])
    names = comfy.utils.unet_to_diffusers(model_config.unet_config)
    missing, unexpected = model.diffusion_model.load_state_dict({names[k]: v for k, v in weights.items()}, strict=False)
    assert not missing + unexpected, missing + unexpected
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), cpu, cpu)


class Widths(list):
    """Multiples of the first width that need not be whole; ComfyUI multiplies and wants integers."""

    def __init__(self, multiples: list[float]):
        super().__init__(Multiple(m) for m in multiples)


class Multiple(float):
    def __rmul__(self, channels: int) -> int:
        return round(channels * float(self))

    __mul__ = __rmul__


def load_vae(folder: Path) -> tuple[comfy.sd.VAE, float]:
    config, weights = read(folder / "vae")
    first, *_ = widths = config["block_out_channels"]
    ddconfig = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": first,
        "ch_mult": [width // first for width in widths], "num_res_blocks": config["layers_per_block"], "attn_resolutions": [],
        "dropout": 0.0,
    }  # fmt: skip
    stock, autoencoder.ops = autoencoder.ops, with_groups(config["norm_num_groups"])
    try:
        vae = comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": ddconfig, "embed_dim": 4}}, dtype=torch.float32)
    finally:
        autoencoder.ops = stock
    return vae, config["scaling_factor"]


def load_clip(folder: Path) -> comfy.sd.CLIP:
    """One text encoder, or SDXL's two."""
    config, first = read(folder / "text_encoder", "model")
    ids = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["pad_token_id"]}
    length, width = config["max_position_embeddings"], config["hidden_size"]

    def tokenizer(embedding_directory: str | None = None, tokenizer_data: dict | None = None) -> comfy.sd1_clip.SDTokenizer:
        return comfy.sd1_clip.SDTokenizer(
            str(folder / "tokenizer"), max_length=length, embedding_directory=embedding_directory, embedding_size=width,
            tokenizer_class=PreTrainedTokenizerFast,
        )  # fmt: skip

    def encoder(layer: str, **options: object) -> comfy.sd1_clip.SDClipModel:
        return comfy.sd1_clip.SDClipModel(
            max_length=length, layer=layer, layer_idx=-2 if layer == "hidden" else None, special_tokens=ids,
            textmodel_json_config=dict(config), dtype=torch.float32, layer_norm_hidden_state=layer == "last", **options,
        )  # fmt: skip

    def load(into: comfy.sd1_clip.SDClipModel, weights: dict[str, torch.Tensor]) -> None:
        named = {k if k.startswith("text_") else f"text_model.{k}": v for k, v in weights.items()}
        table = into.transformer.text_model.embeddings.token_embedding.weight  # of CLIP's vocabulary, whatever the config
        words = named.pop("text_model.embeddings.token_embedding.weight")
        named["text_model.embeddings.token_embedding.weight"] = torch.nn.functional.pad(
            words, (0, 0, 0, len(table) - len(words))
        )
        missing, unexpected = into.transformer.load_state_dict(named, strict=False)
        assert not {*missing, *unexpected} - {"text_projection.weight"}, missing + unexpected

    if (folder / "text_encoder_2").is_dir():

        class Tokens(comfy.sdxl_clip.SDXLTokenizer):
            def __init__(self, **options: object):
                self.clip_l, self.clip_g = tokenizer(**options), tokenizer(**options)

        class Encoders(comfy.sdxl_clip.SDXLClipModel):
            def __init__(self, **_: object):
                torch.nn.Module.__init__(self)
                self.clip_l, self.clip_g = encoder("hidden"), encoder("hidden", return_projected_pooled=True)
                self.dtypes = {torch.float32}

        clip = comfy.sd.CLIP(ClipTarget(Tokens, Encoders))
        load(clip.cond_stage_model.clip_l, first)
        load(clip.cond_stage_model.clip_g, read(folder / "text_encoder_2", "model")[1])
        return clip

    class Tokens(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, **options: object):
            super().__init__(tokenizer=tokenizer, **options)

    class Encoder(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, **_: object):
            super().__init__(dtype=torch.float32, clip_model=lambda **_: encoder("last", return_projected_pooled=False))

    clip = comfy.sd.CLIP(ClipTarget(Tokens, Encoder))
    load(clip.cond_stage_model.clip_l, first)
    return clip


def load(name: str) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of `model` or `model_xl`."""
    vae, scale_factor = load_vae(SHAPES / name)
    return load_unet(SHAPES / name, scale_factor), load_clip(SHAPES / name), vae


_stock_loader = comfy.sd.load_checkpoint_guess_config


def _load_checkpoint(ckpt_path: str, *args: object, **options: object) -> tuple:
    with safe_open(ckpt_path, "pt") as file:
        name = (file.metadata() or {}).get(MARK)
    return (*load(name), None) if name else _stock_loader(ckpt_path, *args, **options)


comfy.sd.load_checkpoint_guess_config = _load_checkpoint
