"""An adapter acts the same in every layout, and what cannot be read or named is refused with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, UNet2DConditionModel
from diffusers.models import UNetMotionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import BETAS, image_unet, motion_adapter, motion_parts, random_lora

from lora_training.backbones.full_size import UNET_CONFIGS
from lora_training.config import TARGET_SETS
from pcm_scheduler import AdapterSettings, load_pcm_lora, read_settings
from pcm_scheduler.lora_file import convert_adapter, kohya_state_dict, main, read_adapter, write_adapter, write_safetensors
from pcm_scheduler.lora_layouts import (
    _WORDS,
    METADATA_KEY,
    dotted_name,
    is_motion,
    sort_tensors,
    to_animatediff,
    to_diffusers,
    to_kohya,
)
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.published import SHA256

from model import load_pipeline

SETTINGS = AdapterSettings("sd15", PhaseGrid.even(8).edges, 50, guidance_scale=1.5, num_inference_steps=8)
RANK, ALPHA = 4, 2.6  # their quotient is no power of two, so that folding alpha into a half-precision weight would round it
TARGETS = list(TARGET_SETS["all"])


def adapted_unet(**settings):
    """The shapes UNet with every kind of module adapted by noise; DoRA magnitudes are moved too."""
    torch.manual_seed(0)
    unet = load_pipeline().unet
    unet.add_adapter(
        LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False,
            rank_pattern={"conv1": 2}, alpha_pattern={"to_q": 7.0}, **settings,
        )
    )  # fmt: skip
    for name, parameter in unet.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 0.8 + 0.4 * torch.rand_like(parameter)
    return unet.eval()


def alphas_of(unet):
    return {n: float(m.lora_alpha["default"]) for n, m in unet.named_modules() if hasattr(m, "lora_alpha")}


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def trained(request, tmp_path_factory):
    """A UNet, and the file that the trainer's writer makes of it."""
    unet = adapted_unet(use_dora=request.param)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    state = get_peft_model_state_dict(unet)
    write_adapter(path, state, alphas_of(unet), SETTINGS, "a title", dtype=torch.float32)
    return unet, path, request.param


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 16, 16, generator=generator)
    embeds = torch.randn(1, 40, unet.config.cross_attention_dim, generator=generator)
    return unet(x, torch.tensor([500]), embeds).sample


def unet_with(path):
    """As diffusers' own loader makes it."""
    pipe = load_pipeline()
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="default")
    return pipe.unet


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_names_of_full_sized_networks_are_read_back(family):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET_CONFIGS[family])
    names = [n for n, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert len(names) > 280
    for name in names:
        assert dotted_name(name.replace(".", "_")) == name


def test_no_word_of_the_grammar_can_be_put_together_from_others():
    joined = {f"{a}_{b}" for a, b in combinations(_WORDS, 2)} | {f"{b}_{a}" for a, b in combinations(_WORDS, 2)}
    assert not joined & set(_WORDS)


@pytest.mark.parametrize(
    ("name", "says"),
    [("input_blocks_1_1_proj_in", "original UNet"), ("mid_block_magic_0", "magic_0"), ("mid_blocks", "mid_blocks")],
)
def test_names_of_other_networks_are_refused(name, says):
    with pytest.raises(ValueError, match=says):
        dotted_name(name)


def test_conversions_load_to_the_same_output_and_come_back_bit_for_bit(trained, tmp_path):
    unet, kohya, _ = trained
    dotted, back = tmp_path / "dotted.safetensors", tmp_path / "back.safetensors"
    convert_adapter(kohya, dotted, "diffusers")
    convert_adapter(dotted, back, "kohya")
    expected, plain = output(unet), output(load_pipeline().unet)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(output(unet_with(dotted)), expected, rtol=1e-4, atol=1e-4)
    before, after = load_file(kohya), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for path in (dotted, back):
        assert read_settings(path) == SETTINGS
        assert metadata_of(path)["modelspec.title"] == "a title"
    assert METADATA_KEY in metadata_of(dotted)
    assert METADATA_KEY not in metadata_of(back)


def test_half_precision_is_not_rounded_by_conversion(trained, tmp_path):
    unet, _, _ = trained
    half, dotted = tmp_path / "half.safetensors", tmp_path / "dotted.safetensors"
    write_adapter(half, get_peft_model_state_dict(unet), alphas_of(unet), SETTINGS, "half")
    convert_adapter(half, dotted, "peft")
    stored = load_file(dotted)
    for key, tensor in load_file(half).items():
        if key.endswith("lora_up.weight"):
            path = dotted_name(key.removeprefix("lora_unet_").partition(".")[0])
            assert torch.equal(stored[f"unet.{path}.lora_B.weight"], tensor)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_load_pcm_lora_takes_every_layout(trained, tmp_path, layout):
    unet, kohya, _ = trained
    path = tmp_path / "adapter.safetensors"
    convert_adapter(kohya, path, layout)
    pipe = load_pipeline()
    assert load_pcm_lora(pipe, path) == SETTINGS
    torch.testing.assert_close(output(pipe.unet), output(unet), rtol=1e-4, atol=1e-4)


def test_what_diffusers_loses_of_kohyas_layout(trained):
    """DoRA magnitudes, and the alphas of attention where alphas differ: why load_pcm_lora has a way of its own."""
    unet, kohya, _ = trained
    assert (output(unet_with(kohya)) - output(unet)).abs().max() > 1e-2


def test_one_alpha_for_all_is_the_same_to_diffusers_in_both_layouts(tmp_path):
    kohya, dotted = tmp_path / "kohya.safetensors", tmp_path / "dotted.safetensors"
    unet = adapted_unet()
    write_adapter(
        kohya, get_peft_model_state_dict(unet), dict.fromkeys(alphas_of(unet), ALPHA), SETTINGS, "x", dtype=torch.float32
    )
    convert_adapter(kohya, dotted, "diffusers")
    one, other = unet_with(kohya), unet_with(dotted)
    assert alphas_of(one) == alphas_of(other)
    states = get_peft_model_state_dict(one), get_peft_model_state_dict(other)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    torch.testing.assert_close(output(one), output(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_reading_is_the_reverse_of_writing_in_every_layout(trained, tmp_path, layout):
    unet, kohya, _ = trained
    path = tmp_path / "adapter.safetensors"
    convert_adapter(kohya, path, layout)
    state = get_peft_model_state_dict(unet)
    same = read_adapter(path, alphas_of(unet))
    assert same.keys() == state.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(same[key], tensor)


def test_files_that_diffusers_writes_are_understood(tmp_path):
    """`save_lora_weights` with its metadata, and the layout with `lora.down` in its attention, which has no place for alpha."""
    unet, pipe = adapted_unet(), load_pipeline()
    state = get_peft_model_state_dict(unet)
    config = {
        k: v
        for k, v in unet.peft_config["default"].to_dict().items()
        if k in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    }
    pipe.save_lora_weights(tmp_path / "new", state, unet_lora_adapter_metadata=config | {"target_modules": TARGETS})
    old = {f"unet.{key}": tensor for key, tensor in convert_state_dict_to_diffusers(state).items()}
    processors = {key.replace(".attn1.to_q.lora.", ".attn1.processor.to_q_lora."): tensor for key, tensor in old.items()}
    processors = {key.replace(".to_out.0.lora.", ".processor.to_out_lora."): tensor for key, tensor in processors.items()}
    assert any("processor.to_q_lora.down" in key for key in processors)
    save_file(processors, tmp_path / "old.safetensors")
    alphas = alphas_of(unet)
    new = read_adapter(tmp_path / "new" / "pytorch_lora_weights.safetensors", alphas)
    without_alpha = read_adapter(
        tmp_path / "old.safetensors", {name: state[f"{name}.lora_A.weight"].shape[0] for name in alphas}
    )
    for key, tensor in state.items():
        torch.testing.assert_close(new[key], tensor)
        torch.testing.assert_close(without_alpha[key], tensor)


def test_rank_stabilised_metadata_keeps_its_strength(tmp_path):
    module = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{module}.lora_A.weight": torch.ones(16, 3), f"{module}.lora_B.weight": torch.ones(3, 16)}
    path = tmp_path / "stabilised.safetensors"
    save_file(tensors, path, {METADATA_KEY: json.dumps({"unet.r": 16, "unet.lora_alpha": 8, "unet.use_rslora": True})})
    convert_adapter(path, tmp_path / "kohya.safetensors", "kohya")
    alpha = load_file(tmp_path / "kohya.safetensors")["lora_unet_mid_block_attentions_0_proj_in.alpha"]
    assert alpha / 16 == 8 / 16**0.5


def test_published_files_keep_their_settings_when_converted(trained, tmp_path):
    published, renamed = tmp_path / "pcm_sd15_lcmlike_lora_converted.safetensors", tmp_path / "mine.safetensors"
    save_file(load_file(trained[1]), published)
    convert_adapter(published, renamed, "diffusers")
    assert read_settings(renamed) == read_settings(published)
    assert read_settings(renamed).inferred


def test_a_renamed_published_file_is_known_by_its_hash(trained, tmp_path, monkeypatch):
    import hashlib

    path = tmp_path / "renamed.safetensors"
    save_file(load_file(trained[1]), path)
    monkeypatch.setattr("pcm_scheduler.published._MEGABYTES", (path.stat().st_size // 10**6,))
    assert read_settings(path) is None
    monkeypatch.setitem(SHA256, hashlib.sha256(path.read_bytes()).hexdigest(), "pcm_sdxl_normalcfg_8step")
    settings = read_settings(path)
    assert (settings.base_model, settings.grid.num_phases, settings.inferred) == ("sdxl", 8, True)


def test_every_published_hash_stands_for_settings():
    from pcm_scheduler.lora_file import published_settings

    assert len(set(SHA256.values())) == 16
    assert all(len(digest) == 64 and published_settings(name) for digest, name in SHA256.items())


def broken(tensors, **changes):
    return {key: value for key, value in (tensors | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: broken(t, **{min(k for k in t if "lora_up" in k): None}), "only one of its two matrices"),
        (lambda t: broken(t, **{k: v[:, :1] for k, v in t.items() if "lora_up" in k}), "do not fit"),
        (lambda t: broken(t, stranger=torch.zeros(1)), "stranger"),
        (lambda t: broken(t, **{"lora_te_text_model_encoder.alpha": torch.zeros(1)}), "lora_te_text_model"),
        (lambda t: {"unet.conv_in.weight": torch.zeros(1)}, "no LoRA of a UNet"),
        (lambda t: {}, "no LoRA of a UNet"),
        (lambda t: {k.replace("down_blocks_1", "input_blocks_4"): v for k, v in t.items()}, "original UNet"),
        (lambda t: {f"transformer.x.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}, "transformer.x"),
        (lambda t: broken(t, **{k[:-5] + "dora_scale": torch.ones(1, 3) for k in t if k.endswith(".alpha")}), "DoRA"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_with_the_reason(trained, tmp_path, capsys, damage, says):
    path, out = tmp_path / "damaged.safetensors", tmp_path / "out.safetensors"
    save_file({k: v.contiguous() for k, v in damage(load_file(trained[1])).items()}, path)
    assert main([str(path), "--convert", "diffusers", "--output", str(out)]) == 1
    said = capsys.readouterr().out
    assert says in said
    assert path.name in said
    assert not out.exists()


def test_truncated_files_metadata_that_is_no_json_and_other_suffixes_are_refused(trained, tmp_path):
    short, lying = tmp_path / "short.safetensors", tmp_path / "lying.safetensors"
    short.write_bytes(trained[1].read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        convert_adapter(short, tmp_path / "out.safetensors", "kohya")
    save_file(load_file(trained[1]), lying, {METADATA_KEY: "{"})
    with pytest.raises(ValueError, match=METADATA_KEY):
        convert_adapter(lying, tmp_path / "out.safetensors", "kohya")
    with pytest.raises(ValueError, match="safetensors"):
        convert_adapter(trained[1], tmp_path / "out.bin", "kohya")
    with pytest.raises(ValueError, match="kohya, diffusers, peft"):
        convert_adapter(trained[1], tmp_path / "out.safetensors", "a1111")
    with pytest.raises(FileNotFoundError):
        convert_adapter(tmp_path / "nothing.safetensors", tmp_path / "out.safetensors", "kohya")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lying.safetensors", "short.safetensors"]


def test_the_command_line_converts_and_names_the_formats(trained, tmp_path, capsys):
    _, kohya, is_dora = trained
    out = tmp_path / "new" / "dotted.safetensors"
    assert main([str(kohya), "--convert", "peft", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    for words in ("layout         diffusers", "convert it to kohya", "8, edges at", "It is whole."):
        assert words in said, said
    assert ("DoRA" in said) == is_dora
    for wrong in (["--convert", "a1111", "--output", "x.safetensors"], ["--convert", "kohya"], ["--output", "x.safetensors"]):
        with pytest.raises(SystemExit):
            main([str(kohya), *wrong])
    assert all(name in capsys.readouterr().err for name in ("kohya",))


def test_motion_modules_have_no_place_in_kohyas_layout(tmp_path, capsys):
    """diffusers splits such names at the wrong places, and loads the rest of the file as if it were all."""
    lora = random_lora(UNetMotionModel.from_unet2d(image_unet(), motion_adapter()))
    (tensors, metadata), path = to_diffusers(lora), tmp_path / "video.safetensors"
    save_file(tensors, path, {METADATA_KEY: metadata} | replace(SETTINGS, base_model="animatediff").to_header())
    out = tmp_path / "out.safetensors"
    assert main([str(path), "--convert", "kohya", "--output", str(out)]) == 1
    assert "70 motion modules" in capsys.readouterr().out
    assert not out.exists()
    assert main([str(path), "--convert", "diffusers", "--output", str(out)]) == 0

    save_file(to_kohya(lora), path)  # as others, and this command once, wrote it
    assert main([str(path)]) == 1
    assert "PROBLEM        70 motion modules are in kohya's layout" in capsys.readouterr().out
    assert main([str(path), "--convert", "diffusers", "--output", str(out)]) == 0
    assert load_file(out).keys() == tensors.keys()
    pipe = AnimateDiffPipeline(**motion_parts(), scheduler=DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1))
    pipe.load_lora_weights(str(out))
    assert len([name for name, _ in pipe.unet.named_modules() if name.endswith(".lora_A")]) == len(lora.modules)


def test_kohya_state_dict_refuses_what_has_no_place():
    with pytest.raises(ValueError, match="bias"):
        kohya_state_dict({"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.bias": torch.ones(2)}, {"a": 1.0})
    with pytest.raises(ValueError, match="only one"):
        kohya_state_dict({"a.lora_A.weight": torch.ones(1, 2)}, {"a": 1.0})


PAIR = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 3)}
PAIR |= {"unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(3, 2)}


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[]", "cannot be read"),
        ('{"unet.lora_alpha": NaN}', "its alpha is nan"),
        ('{"unet.lora_alpha": 3.5e38}', "its alpha is 3.5e"),  # more than float32 holds
        ('{"unet.lora_alpha": 1%s}' % ("0" * 400), "cannot be read"),
        ('{"unet.alpha_pattern": {"(a+)+b": 1}}', "is not a module's name"),  # matching takes as long as you like
        (json.dumps({"unet.alpha_pattern": {f".*{i}": 1 for i in range(100)}}), "more than 64"),
    ],
)
def test_metadata_that_cannot_be_used_is_refused(metadata, says):
    with pytest.raises(ValueError, match=f"{METADATA_KEY} in its header that cannot be read: .*{says}|{METADATA_KEY}.*{says}"):
        sort_tensors(PAIR, {METADATA_KEY: metadata})


@pytest.mark.parametrize(
    ("patterns", "alpha"),
    [
        ({"proj_in": 3}, 3),
        ({"^mid_block.attentions.0.proj_in": 3}, 3),
        ({r"attentions\.0\.proj_in$": 3}, 3),
        ({"mid_block.*": 3, "proj_in": 5}, 3),  # the first that matches
        ({"^attentions.0.proj_in": 5}, 1),
        ({"^attentions.*": 5}, 1),
        ({"roj_in": 5}, 1),
    ],
)
def test_alphas_are_stated_for_names_as_peft_matches_them(patterns, alpha):
    lora = sort_tensors(PAIR, {METADATA_KEY: json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": patterns})})
    assert lora.alpha("mid_block_attentions_0_proj_in") == alpha


def test_a_module_in_two_layouts_is_said_to_be_there_twice(tmp_path, capsys):
    """Of two tensors for one place the first counts."""
    name = "lora_unet_mid_block_attentions_0_proj_in"
    again = {f"{name}.lora_down.weight": torch.zeros(2, 3), f"{name}.lora_up.weight": torch.zeros(3, 2)}
    lora = sort_tensors(PAIR | again)
    assert {key.partition(" ")[0] for key in lora.strangers} == set(again)
    assert all(parts["up"].all() for parts in lora.modules.values())
    path, out = tmp_path / "twice.safetensors", tmp_path / "out.safetensors"
    save_file(PAIR | again, path)
    assert main([str(path)]) == 1
    assert "PROBLEM        2 tensors have no place in a LoRA, such as " in capsys.readouterr().out
    assert main([str(path), "--convert", "kohya", "--output", str(out)]) == 1
    assert not out.exists()


def test_a_name_longer_than_any_is_a_stranger():
    long = "lora_unet_" + "a" * 10**6 + ".alpha"
    assert sort_tensors(PAIR | {long: torch.ones(())}).strangers == (f"{long[:40]}... of 1000016 letters",)


def test_a_guess_of_alpha_is_said_when_it_is_written_down(trained, tmp_path, capsys):
    """A copy that states alpha = rank looks whole; whoever converts is told that nobody knew, and can say it."""
    tensors = {key: tensor for key, tensor in load_file(trained[1]).items() if not key.endswith(".alpha")}
    path, out = tmp_path / "PROBLEM.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, path)
    assert main([str(path), "--convert", "kohya", "--output", str(out)]) == 1
    assert "is a guess" in capsys.readouterr().out
    assert main([str(path), "--convert", "kohya", "--output", str(out), "--alpha", "2.5"]) == 0
    assert {tensor.item() for key, tensor in load_file(out).items() if key.endswith(".alpha")} == {2.5}
    assert main([str(out)]) == 0
    out.rename(path)
    assert main([str(path)]) == 0  # the name of a file is no problem
    with pytest.raises(ValueError, match="alpha must be a finite number from 0"):
        convert_adapter(path, out, "kohya", alpha=float("nan"))


def test_no_alpha_is_said_of_a_layout_that_has_its_scales_in_the_weights(tmp_path):
    motion = random_lora(UNetMotionModel.from_unet2d(image_unet(), motion_adapter()), rank=4, alpha=2.0).only(is_motion)
    path, out = tmp_path / "motion.safetensors", tmp_path / "out.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in to_animatediff(motion).items()}, path)
    with pytest.raises(ValueError, match="AnimateDiff's layout, in which scales are in the weights"):
        convert_adapter(path, out, "diffusers", alpha=1.0)
    convert_adapter(path, out, "diffusers")
    assert json.loads(metadata_of(out)[METADATA_KEY])["unet.lora_alpha"] == 4  # its rank: nothing is scaled again


def test_a_converted_files_header_is_true_of_its_tensors(trained, tmp_path):
    tensors = {key: tensor for key, tensor in load_file(trained[1]).items() if not key.endswith(".alpha")}
    path, out = tmp_path / "silent.safetensors", tmp_path / "out.safetensors"
    hashes = {"modelspec.hash_sha256": "0xdead", "sshs_model_hash": "dead", "sshs_legacy_hash": "dead"}
    save_file(tensors, path, hashes | {"ss_network_alpha": "4.0", "ss_network_dim": "4", "ss_steps": "10"})
    convert_adapter(path, out, "kohya", alpha=2.5)
    assert metadata_of(out) == {"ss_network_alpha": "2.5", "ss_network_dim": "Dynamic", "ss_steps": "10"}


def test_an_alpha_that_is_no_number_is_not_converted(trained, tmp_path):
    tensors = load_file(trained[1])
    first = min(key for key in tensors if key.endswith(".alpha"))
    path = tmp_path / "nan.safetensors"
    save_file(tensors | {first: torch.tensor(float("nan"))}, path)
    with pytest.raises(ValueError, match=r"alpha of .* is nan"):
        convert_adapter(path, tmp_path / "out.safetensors", "diffusers")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_safetensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"number": 3})
    assert not list(tmp_path.iterdir())
