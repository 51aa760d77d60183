"""`load_pcm_lora` on files that people have: other names, text encoders, other models, and headers that mean harm."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_models import image_pipeline, random_lora

from pcm_scheduler import AdapterSettings, PCMScheduler, load_pcm_lora
from pcm_scheduler.lora_layouts import METADATA_KEY, to_diffusers, to_kohya
from pcm_scheduler.phases import PhaseGrid

module = sys.modules["pcm_scheduler.pipelines.load_pcm_lora"]  # of its function's name
HEADER = AdapterSettings("sd15", PhaseGrid.even(4).edges, 50).to_header()


@pytest.fixture(scope="module")
def lora():
    return random_lora(image_pipeline().unet, rank=4, alpha=0.5)


def saved(path, tensors, header=HEADER):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, header)
    return path


@torch.no_grad()
def output(pipe):
    generator = torch.Generator().manual_seed(1)
    x, embeds = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    return pipe.unet(x, torch.tensor(500), embeds).sample


@pytest.fixture(scope="module")
def expected(lora, tmp_path_factory):
    pipe = image_pipeline()
    load_pcm_lora(pipe, saved(tmp_path_factory.mktemp("kohya") / "kohya.safetensors", to_kohya(lora)))
    return output(pipe)


@pytest.mark.parametrize("prefix", ["unet.", "base_model.model.", ""])
@pytest.mark.parametrize("ends", [("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight")])
def test_names_with_any_prefix_and_alpha_in_the_file(lora, expected, tmp_path, prefix, ends):
    """PEFT's `save_pretrained` writes `base_model.model.`, others nothing; diffusers takes neither for a LoRA."""
    tensors = {}
    for name, parts in lora.modules.items():
        path = prefix + lora.path(name)
        tensors |= {f"{path}.{ends[0]}": parts["down"], f"{path}.{ends[1]}": parts["up"], f"{path}.alpha": parts["alpha"]}
    pipe = image_pipeline()
    load_pcm_lora(pipe, saved(tmp_path / "dotted.safetensors", tensors))
    assert pipe.get_list_adapters() == {"unet": ["pcm"]}
    torch.testing.assert_close(output(pipe), expected, rtol=0, atol=1e-6)


def test_what_is_of_a_text_encoder_is_named_when_it_is_left_out(lora, expected, tmp_path, monkeypatch):
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    of_text = {f"{name}.lora_down.weight": torch.ones(4, 32), f"{name}.lora_up.weight": torch.ones(32, 4)}
    pipe, said = image_pipeline(), []
    monkeypatch.setattr(module.logger, "warning", said.append)
    load_pcm_lora(pipe, saved(tmp_path / "text.safetensors", to_kohya(lora) | of_text))
    assert torch.equal(output(pipe), expected)
    assert any(name in sentence for sentence in said)


@pytest.mark.parametrize("damage", ["another width", "half a pair", "another model", "nan"])
def test_a_file_that_cannot_act_leaves_the_pipeline_as_it_was(lora, expected, tmp_path, damage):
    pipe = image_pipeline()
    load_pcm_lora(pipe, saved(tmp_path / "good.safetensors", to_kohya(lora)))
    scheduler, tensors = pipe.scheduler, to_kohya(lora)
    first = min(key for key in tensors if key.endswith("lora_down.weight"))
    if damage == "another width":
        tensors = {key: t[:, :8] if key.endswith("lora_down.weight") else t for key, t in tensors.items()}
    elif damage == "half a pair":
        del tensors[first], tensors[first.replace("lora_down.weight", "alpha")]
    elif damage == "nan":
        tensors[first] = torch.full_like(tensors[first], torch.nan)
    else:
        name = "lora_unet_down_blocks_5_resnets_0_conv1"
        tensors = {f"{name}.lora_down.weight": torch.ones(4, 32, 3, 3), f"{name}.lora_up.weight": torch.ones(32, 4, 1, 1)}
    says = {"another width": "another model: its matrices", "half a pair": "only one of its two", "another model": "nothing"}
    says["nan"] = "not finite"
    with pytest.raises(ValueError, match=says[damage]):
        load_pcm_lora(pipe, saved(tmp_path / "bad.safetensors", tensors))
    assert pipe.scheduler is scheduler
    assert torch.equal(output(pipe), expected)


@pytest.mark.parametrize("field", ["rank_pattern", "target_modules"])
def test_a_header_whose_patterns_would_take_years_loads_at_once(lora, expected, tmp_path, field):
    tensors, metadata = to_diffusers(lora)
    pattern = "([a-z_0-9.]+)+!"
    stated = json.loads(metadata) | {f"unet.{field}": {pattern: 4} if field == "rank_pattern" else pattern}
    path = saved(tmp_path / "endless.safetensors", tensors, HEADER | {METADATA_KEY: json.dumps(stated)})
    pipe = image_pipeline()
    loading = threading.Thread(target=load_pcm_lora, args=(pipe, path), daemon=True)
    loading.start()
    loading.join(timeout=60)  # a second is enough
    assert not loading.is_alive()
    torch.testing.assert_close(output(pipe), expected, rtol=0, atol=1e-6)


def test_models_of_flow_matching_are_refused(tmp_path):
    """PCM's authors have adapters of Stable Diffusion 3 too; on this noise schedule they would draw nothing."""
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    none = dict.fromkeys(("vae", *(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))))
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **none)
    key = "transformer.transformer_blocks.0.attn.to_q"
    matrices = {f"{key}.lora_A.weight": torch.ones(4, 16), f"{key}.lora_B.weight": torch.ones(16, 4)}
    path = saved(tmp_path / "sd3.safetensors", matrices)
    with pytest.raises(ValueError, match="has no UNet"):
        load_pcm_lora(pipe, path, num_phases=2)
    with pytest.raises(ValueError, match="holds no LoRA of a UNet"):
        load_pcm_lora(image_pipeline(), path, num_phases=2)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)


def peft_folder(folder, **settings):
    """What a PEFT model writes of itself, and the answer of the model."""
    lora = LoraConfig(target_modules=["to_q", "to_out.0"], init_lora_weights=False, **settings)
    unet = get_peft_model(image_pipeline().unet, lora, autocast_adapter_dtype=False)  # peft 0.19's casts ask for torch 2.7
    unet.save_pretrained(folder)
    pipe = image_pipeline()
    pipe.unet = unet.base_model.model
    return output(pipe)


@pytest.mark.parametrize(
    "settings",
    [{"r": 8, "lora_alpha": 1}, {"r": 8, "lora_alpha": 2, "use_rslora": True}, {"r": 4, "alpha_pattern": {"attn2.to_q": 32}}],
)
def test_a_folder_of_pefts_own_acts_as_strongly_as_it_was_trained(tmp_path, settings):
    """Alpha is in its configuration alone; taken for the rank, the adapter would be eight times too strong."""
    wanted = peft_folder(tmp_path / "adapter", **settings)
    pipe = image_pipeline()
    load_pcm_lora(pipe, tmp_path / "adapter", num_phases=4)
    torch.testing.assert_close(output(pipe), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "says"),
    [('{"r": 4, "lora_alpha": 8,', "Expecting"), ('{"alpha_pattern": {"attn[12].to_q": 4}}', r"'attn\[12\]\.to_q' is not")],
)
def test_a_configuration_of_pefts_that_cannot_be_read_is_named(tmp_path, text, says):
    peft_folder(tmp_path, r=4)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"has adapter_config\.json beside it that cannot be read: .*{says}"):
        load_pcm_lora(image_pipeline(), tmp_path, num_phases=4)


def test_an_adapter_that_says_no_alpha_is_loaded_with_a_warning(lora, tmp_path, monkeypatch):
    tensors = {key: tensor for key, tensor in to_kohya(lora).items() if not key.endswith(".alpha")}
    said = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    load_pcm_lora(image_pipeline(), saved(tmp_path / "without.safetensors", tensors))
    assert [sentence for sentence in said if f"no alpha of {len(lora.modules)} modules" in sentence]
    said.clear()
    load_pcm_lora(image_pipeline(), saved(tmp_path / "with.safetensors", to_kohya(lora)))
    assert not said


@pytest.mark.parametrize("name", ["pcm", "second"])
def test_a_fused_adapter_is_not_taken_out_by_loading_another(lora, expected, tmp_path, name):
    """PEFT takes all that is fused out of the weights when an adapter is added."""
    path = saved(tmp_path / "kohya.safetensors", to_kohya(lora))
    pipe = image_pipeline()
    load_pcm_lora(pipe, path)
    pipe.fuse_lora()
    fused = output(pipe)
    with pytest.raises(ValueError, match=r"fused into the weights of unet.*: pcm\. .*unfuse_lora"):
        load_pcm_lora(pipe, path, adapter_name=name)
    assert torch.equal(output(pipe), fused)
    pipe.unfuse_lora()
    load_pcm_lora(pipe, path, adapter_name=name)
    torch.testing.assert_close(output(pipe), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def files(lora, tmp_path_factory):
    """A style and two PCM adapters, with modules that others have too and modules that they have not."""
    folder, modules = tmp_path_factory.mktemp("several"), sorted(lora.modules)
    third = len(modules) // 3
    parts = {"style": modules[::2], "first": modules[: 2 * third], "second": modules[third:]}
    return {name: saved(folder / f"{name}.safetensors", to_kohya(lora.only(part.__contains__))) for name, part in parts.items()}


def test_other_adapters_stay_at_their_weights_and_of_pcm_adapters_the_newest_acts(files):
    wanted = {}
    for newest in ("first", "second"):
        pipe = image_pipeline()
        for name in ("style", newest):
            pipe.load_lora_weights(str(files[name]), adapter_name=name)
        pipe.set_adapters(["style", newest], [0.5, 1.0])
        wanted[newest] = output(pipe)

    pipe = image_pipeline()
    pipe.load_lora_weights(str(files["style"]), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    load_pcm_lora(pipe, files["first"])
    assert pipe.get_active_adapters() == ["style", "pcm"]
    torch.testing.assert_close(output(pipe), wanted["first"], rtol=0, atol=1e-6)
    load_pcm_lora(pipe, files["second"], adapter_name="other")  # under a name of its own
    assert pipe.get_active_adapters() == ["style", "other"]
    torch.testing.assert_close(output(pipe), wanted["second"], rtol=0, atol=1e-6)
    load_pcm_lora(pipe, files["first"], adapter_name="other")  # in its place
    torch.testing.assert_close(output(pipe), wanted["first"], rtol=0, atol=1e-6)


def test_an_adapter_acts_that_is_loaded_while_others_are_switched_off(files):
    pipe, alone = image_pipeline(), image_pipeline()
    load_pcm_lora(alone, files["first"])
    pipe.load_lora_weights(str(files["style"]), adapter_name="style")
    pipe.disable_lora()
    load_pcm_lora(pipe, files["first"])
    assert pipe.get_active_adapters() == ["pcm"]
    torch.testing.assert_close(output(pipe), output(alone), rtol=0, atol=1e-6)


def test_a_compiled_unet_is_loaded_into_and_stays_compiled(lora, expected, tmp_path):
    path = saved(tmp_path / "kohya.safetensors", to_kohya(lora))
    pipe = image_pipeline()
    pipe.unet = compiled = torch.compile(pipe.unet, backend="eager")
    for _ in range(2):  # the second replaces the first
        load_pcm_lora(pipe, path)
        assert pipe.unet is compiled
        torch.testing.assert_close(output(pipe), expected, rtol=0, atol=1e-6)
    assert list(compiled._orig_mod.peft_config) == ["pcm"]


ORIGINAL = {  # the tiny UNet's modules by the original UNet's names
    "down_blocks_1_attentions_0_": "input_blocks_3_1_",
    "mid_block_attentions_0_": "middle_block_1_",
}


def original_names(lora, alpha_of):
    """Those modules that have such names, each with an alpha of its own; and the same under diffusers' names."""
    theirs, ours = {}, {}
    for number, (name, parts) in enumerate(sorted(lora.modules.items())):
        for start, other in ORIGINAL.items():
            if name.startswith(start):
                parts = parts | {"alpha": torch.tensor(alpha_of(number))}
                ours[name], theirs[name.replace(start, other)] = parts, parts
    return to_kohya(replace(lora, modules=theirs)), to_kohya(replace(lora, modules=ours))


def test_names_of_the_original_unet_with_alphas_of_their_own(lora, tmp_path):
    theirs, ours = original_names(lora, lambda number: 0.5 + number % 3)
    outputs = []
    for name, tensors in (("theirs", theirs), ("ours", ours)):
        pipe = image_pipeline()
        load_pcm_lora(pipe, saved(tmp_path / f"{name}.safetensors", tensors))
        outputs.append(output(pipe))
    assert not torch.equal(outputs[0], output(image_pipeline()))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["label_emb_0_0", "input_blocks_4_9_transformer_blocks_0_attn1_to_q", "input_blocks_x"])
def test_a_module_that_no_unet_has_leaves_the_adapter_that_was_there(lora, expected, tmp_path, name):
    pipe = image_pipeline()
    load_pcm_lora(pipe, saved(tmp_path / "good.safetensors", to_kohya(lora)))
    strange = {f"lora_unet_{name}.lora_down.weight": torch.ones(4, 32), f"lora_unet_{name}.lora_up.weight": torch.ones(32, 4)}
    with pytest.raises(ValueError, match="bad"):
        load_pcm_lora(pipe, saved(tmp_path / "bad.safetensors", strange | to_kohya(lora)))
    assert pipe.get_list_adapters() == {"unet": ["pcm"]}
    assert torch.equal(output(pipe), expected)


@torch.no_grad()
def encoded(pipe):
    return pipe.text_encoder(torch.arange(2, 9)[None]).last_hidden_state


TEXT_MODULE = "text_encoder.text_model.encoder.layers.0.self_attn"


def with_text(lora, key, width=32):
    """The tensors of a file in diffusers' layout, whose text encoder's part is under `key`, and its header."""
    tensors, metadata = to_diffusers(lora)
    drawn = torch.Generator().manual_seed(3)
    for name, shape in zip(key.split(" "), ((4, width), (width, 4)), strict=True):
        tensors[f"{TEXT_MODULE}.{name}"] = torch.randn(shape, generator=drawn)
    return tensors, HEADER | {METADATA_KEY: metadata}


NEW_TEXT = "q_proj.lora_A.weight q_proj.lora_B.weight"
OLD_TEXTS = [
    "q_proj.lora_linear_layer.down.weight q_proj.lora_linear_layer.up.weight",
    "to_q_lora.down.weight to_q_lora.up.weight",
]


@pytest.mark.parametrize("key", OLD_TEXTS)
def test_text_encoders_in_old_layouts_act_as_in_the_new(lora, tmp_path, key):
    results = []
    for number, named in enumerate((NEW_TEXT, key)):
        pipe = image_pipeline()
        load_pcm_lora(pipe, saved(tmp_path / f"{number}.safetensors", *with_text(lora, named)))
        results.append(encoded(pipe))
    assert (results[0] - encoded(image_pipeline())).abs().max() > 0.01
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("damage", ["another width", "nan"])
@pytest.mark.parametrize("key", [NEW_TEXT, *OLD_TEXTS])
def test_a_text_encoders_part_that_cannot_act_leaves_the_pipeline_as_it_was(lora, expected, tmp_path, key, damage):
    pipe = image_pipeline()
    load_pcm_lora(pipe, saved(tmp_path / "good.safetensors", to_kohya(lora)))
    tensors, header = with_text(lora, key, width=48 if damage == "another width" else 32)
    if damage == "nan":
        tensors[f"{TEXT_MODULE}.{key.split()[0]}"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"bad\.safetensors.*(another model|not finite)"):
        load_pcm_lora(pipe, saved(tmp_path / "bad.safetensors", tensors, header))
    assert pipe.get_list_adapters() == {"unet": ["pcm"]}
    assert torch.equal(output(pipe), expected)


def test_a_text_encoders_part_of_no_known_layout_is_left_out_with_a_warning(lora, expected, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    pipe = image_pipeline()
    tensors, header = with_text(lora, "q_proj.lokr_w1 q_proj.lokr_w2")
    load_pcm_lora(pipe, saved(tmp_path / "unknown.safetensors", tensors, header))
    assert pipe.get_list_adapters() == {"unet": ["pcm"]}
    torch.testing.assert_close(output(pipe), expected, rtol=0, atol=1e-6)
    assert any("2 tensors" in sentence and "q_proj.lokr_w1" in sentence for sentence in said)


def test_what_fails_half_way_is_taken_out_again(lora, files, tmp_path, monkeypatch):
    pipe = image_pipeline()
    pipe.load_lora_weights(str(files["style"]), adapter_name="style")
    styled = output(pipe)
    path = saved(tmp_path / "half.safetensors", *with_text(lora, NEW_TEXT))

    def full(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipe, "load_lora_weights", full)  # of the text encoder; the UNet's part is in by then
    with pytest.raises(RuntimeError, match=r"half\.safetensors could not be loaded: out of memory"):
        load_pcm_lora(pipe, path)
    assert pipe.get_list_adapters() == {"unet": ["style"]}
    assert torch.equal(output(pipe), styled)
    assert not isinstance(pipe.scheduler, PCMScheduler)


def test_in_text_encoders_too_others_stay_and_the_newest_pcm_adapter_acts_alone(lora, tmp_path):
    tensors, header = with_text(lora, NEW_TEXT)
    style = {key: tensor / 2 for key, tensor in tensors.items() if key.startswith("text_encoder.")}
    path = saved(tmp_path / "text.safetensors", tensors, header)
    pipe, both = image_pipeline(), image_pipeline()
    pipe.load_lora_weights(dict(style), adapter_name="style")
    for name in ("first", "second"):
        load_pcm_lora(pipe, path, adapter_name=name)
    load_pcm_lora(both, path)
    alone = encoded(both)
    both.load_lora_weights(dict(style), adapter_name="style")
    both.text_encoder.set_adapter(["pcm", "style"])
    assert (encoded(both) - alone).abs().max() > 0.01
    torch.testing.assert_close(encoded(pipe), encoded(both), rtol=0, atol=1e-5)


def test_alphas_of_text_encoders_are_kept(lora, tmp_path):
    tensors, metadata = to_diffusers(lora)
    start = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors |= {f"{start}.lora_A.weight": torch.ones(4, 32), f"{start}.lora_B.weight": torch.ones(32, 4)}
    stated = {"text_encoder.r": 4, "text_encoder.lora_alpha": 1, "text_encoder.target_modules": ["q_proj"]}
    header = HEADER | {METADATA_KEY: json.dumps(json.loads(metadata) | stated)}
    path = saved(tmp_path / "text.safetensors", tensors, header)

    ours, theirs = image_pipeline(), image_pipeline()
    load_pcm_lora(ours, path)
    theirs.load_lora_weights(str(path))
    assert not torch.equal(encoded(theirs), encoded(image_pipeline()))
    torch.testing.assert_close(encoded(ours), encoded(theirs), rtol=0, atol=1e-6)
