"""Networks of metrics from local files: real loading code on tiny random weights, and what is said when they are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torchvision.transforms.functional import to_pil_image
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from lora_training.evaluation import alignment
from lora_training.evaluation.alignment import ScorerConfig, load_scorer, mean_score
from lora_training.evaluation.clip import load_clip, to_bytes
from lora_training.evaluation.features import FeatureConfig, extract, load_features
from lora_training.local_weights import call_factory
from lora_training.randomness import generator_of

PROMPTS = ["a red star", "a blue ring"]
AGREEMENT = Path(__file__).parent.parent.parent / "examples" / "shapes" / "agreement.py"
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(2, 3, 40, 48, generator=generator_of(0)) * 2 - 1


@pytest.fixture(scope="module")
def transformers_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    config = CLIPConfig(text_config=tiny_models.text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(0)
    preprocessing = {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": OPEN_CLIP, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_model(model, folder / "open_clip_model.safetensors")
    return folder


def test_pictures_are_seen_as_they_are_saved():
    picture = torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_bytes(picture)[0, 0].flatten().tolist() == [0, 0, 128, 255]
    with pytest.raises(ValueError, match="uint8"):
        to_bytes(to_bytes(picture))


def test_clip_of_transformers(transformers_clip, pictures):
    clip = load_clip(str(transformers_clip), "features.path")
    model = CLIPModel.from_pretrained(transformers_clip).eval()
    images = [to_pil_image(picture) for picture in to_bytes(pictures)]
    with torch.no_grad():
        found = model(
            pixel_values=CLIPImageProcessor.from_pretrained(transformers_clip)(images, return_tensors="pt").pixel_values,
            **tiny_models.tokenizer()(PROMPTS, padding=True, return_tensors="pt"),
        )
    unit = nn.functional.normalize(clip.pictures(pictures)), nn.functional.normalize(clip.texts(PROMPTS))
    torch.testing.assert_close(unit[0], found.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(unit[1], found.text_embeds, atol=1e-5, rtol=1e-4)

    pick = load_scorer(ScorerConfig("pickscore", str(transformers_clip)))(pictures, PROMPTS)
    torch.testing.assert_close(pick, found.logits_per_image.diagonal(), atol=1e-4, rtol=1e-4)
    score = load_scorer(ScorerConfig("clip", str(transformers_clip)))
    cosine = (found.image_embeds * found.text_embeds).sum(1)
    torch.testing.assert_close(score(pictures, PROMPTS), 100 * cosine.clamp(min=0), atol=1e-3, rtol=1e-4)
    batches = [(picture[None], [prompt]) for picture, prompt in zip(pictures, PROMPTS, strict=True)]
    assert mean_score(score, batches) == pytest.approx(score(pictures, PROMPTS).mean().item(), abs=1e-4)
    with pytest.raises(ValueError, match="2 and 1"):
        score(pictures, PROMPTS[:1])


def test_clip_of_open_clip(open_clip_folder, pictures):
    import open_clip

    name = f"local-dir:{open_clip_folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    images = torch.stack([preprocess(to_pil_image(picture)) for picture in to_bytes(pictures)])
    with torch.no_grad():
        expected = model.encode_image(images)
        ours, theirs, _ = model(images, open_clip.get_tokenizer(name)(PROMPTS))
    features = load_features(FeatureConfig("clip", str(open_clip_folder)))
    torch.testing.assert_close(features(pictures), expected)
    score = load_scorer(ScorerConfig("clip", str(open_clip_folder)))(pictures, PROMPTS)
    torch.testing.assert_close(score, 100 * (ours * theirs).sum(1).clamp(min=0), atol=1e-4, rtol=1e-4)


def test_hps_reads_the_published_form(tmp_path, pictures, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "tiny-hps.json").write_text(json.dumps(OPEN_CLIP), encoding="utf-8")
    open_clip.add_model_config(tmp_path / "tiny-hps.json")
    monkeypatch.setattr(alignment, "HPS_ARCHITECTURE", "tiny-hps")
    torch.manual_seed(1)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-hps")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "hps.pt")
    images = torch.stack([preprocess(to_pil_image(picture)) for picture in to_bytes(pictures)])
    with torch.no_grad():
        ours, theirs, _ = model.eval()(images, open_clip.get_tokenizer("tiny-hps")(PROMPTS))
    score = load_scorer(ScorerConfig("hps", str(tmp_path / "hps.pt")))
    torch.testing.assert_close(score(pictures, PROMPTS), (ours * theirs).sum(1), atol=1e-5, rtol=1e-4)
    torch.save({"state_dict": {"other": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"alignment\.path: .*other\.pt is not the state of open_clip's tiny-hps"):
        load_scorer(ScorerConfig("hps", str(tmp_path / "other.pt")))


def test_aesthetic_score(tmp_path, transformers_clip, pictures):
    """Linear layers with dropout between them are one linear map when they judge."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(16, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
        nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    torch.save({f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}, tmp_path / "head.pth")
    score = load_scorer(ScorerConfig("aesthetic", str(transformers_clip), head=str(tmp_path / "head.pth")))
    embedding = nn.functional.normalize(load_clip(str(transformers_clip), "alignment.path").pictures(pictures))
    with torch.no_grad():
        expected = layers.eval()(embedding).squeeze(1)
    torch.testing.assert_close(score(pictures, PROMPTS), expected, atol=1e-5, rtol=1e-4)
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"alignment\.head: .*is not the state of the aesthetic predictor"):
        load_scorer(ScorerConfig("aesthetic", str(transformers_clip), head=str(tmp_path / "other.safetensors")))


def test_dinov2(tmp_path, pictures):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=14
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    features = load_features(FeatureConfig("dinov2", str(tmp_path)))
    images = [to_pil_image(picture) for picture in to_bytes(pictures)]
    prepared = BitImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model(prepared).last_hidden_state[:, 0]
    torch.testing.assert_close(features(pictures), expected, atol=1e-5, rtol=1e-4)


def test_inception(tmp_path, pictures, monkeypatch):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path, extractor = tmp_path / "inception.pth", module.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # random weights: its constructor would download others
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(extractor, "load_state_dict", lambda self, state: None)
        network = extractor("random", ["2048"])
    torch.save(network.state_dict(), path)
    features = load_features(FeatureConfig("inception", str(path)))
    torch.testing.assert_close(features(pictures), network.eval()(to_bytes(pictures))[0])
    torch.save({"code": Path("a pickled object")}, path)
    with pytest.raises(Exception, match="weights_only"):
        load_features(FeatureConfig("inception", str(path)))


def test_torchscript(tmp_path, pictures):
    torch.jit.trace(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), pictures).save(tmp_path / "module.pt")
    features = load_features(FeatureConfig("torchscript", str(tmp_path / "module.pt")))
    found = torch.cat(list(extract(features, pictures.split(1))))
    torch.testing.assert_close(found, nn.functional.adaptive_avg_pool2d(pictures, 2).flatten(1))


def test_factories(tmp_path, pictures):
    (tmp_path / "my_features.py").write_text(
        "import torch\ndef network(path): return torch.nn.Flatten()\ndef maps(): return lambda pictures: pictures\n"
    )
    where = str(tmp_path / "my_features.py")
    assert load_features(FeatureConfig("factory", where, f"{where}:network"))(pictures).shape == (2, 3 * 40 * 48)
    with pytest.raises(ValueError, match=r"must give \(N, D\); got \(2, 3, 40, 48\)"):
        load_features(FeatureConfig("factory", factory=f"{where}:maps"))(pictures)
    for factory in (f"{where}:absent", "no_such_module:name", "", str(where)):
        with pytest.raises(ValueError, match=r"features\.factory must be"):
            load_features(FeatureConfig("factory", factory=factory))
    with pytest.raises(FileNotFoundError, match=r"features\.path.*'nowhere'"):
        load_features(FeatureConfig("factory", "nowhere", f"{where}:network"))


@pytest.mark.parametrize(
    ("config", "says", "library"),
    [
        (FeatureConfig("inception", "nowhere.pth"), r"weights-inception-2015-12-05-6726825d\.pth", "torch_fidelity"),
        (FeatureConfig("clip", "nowhere"), "a CLIP of transformers or open_clip; there is no folder 'nowhere'", None),
        (FeatureConfig("dinov2", ""), "facebook/dinov2-large", None),
        (FeatureConfig("torchscript", "nowhere.pt"), r"torch\.jit\.save", None),
        (ScorerConfig("hps", "nowhere.pt"), r"HPS_v2\.1_compressed\.pt", "open_clip"),
        (ScorerConfig("pickscore", "nowhere"), "nowhere", None),
        (ScorerConfig("aesthetic", head="nowhere.pth"), r"sac\+logos\+ava1-l14-linearMSE\.pth", None),
    ],
)
def test_missing_weights_are_named(config, says, library):
    if library:
        pytest.importorskip(library)
    load, setting = (load_features, "features") if isinstance(config, FeatureConfig) else (load_scorer, "alignment")
    with pytest.raises(FileNotFoundError, match=says) as raised:
        load(config)
    assert str(raised.value).startswith((f"{setting}.path must be", f"{setting}.head must be"))
    assert str(raised.value).endswith("Nothing is downloaded unasked.")


def test_a_folder_that_lacks_a_file_is_told_which(transformers_clip, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"lacks \*\.safetensors and preprocessor_config\.json and tokenizer"):
        load_features(FeatureConfig("clip", str(tmp_path)))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("lora_training.local_weights.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"features\.kind: inception needs .* pip install torch-fidelity"):
        load_features(FeatureConfig("inception"))
    with pytest.raises(ValueError, match=r"alignment\.path needs .* pip install open_clip_torch"):
        load_scorer(ScorerConfig("hps"))


def test_the_shapes_classifier_plugs_in():
    pictures = torch.zeros(2, 3, 128, 128)
    for name, width in (("form_features", 64), ("embedding_features", 256)):
        assert load_features(FeatureConfig("factory", factory=f"{AGREEMENT}:{name}"))(pictures).shape == (2, width)
    scorer = load_scorer(ScorerConfig("factory", factory=f"{AGREEMENT}:caption_agreement"))
    assert scorer(pictures, ["a red star", "star"]).tolist() == [0, 0]


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path):
    """The second must not be taken for the first, nor for the standard library's."""
    for folder, name in (("a", "mine"), ("b", "mine"), ("a", "test")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.py").write_text(f"def f():\n    return 'made in {folder}/{name}'\n", encoding="utf-8")
    for folder, name in (("a", "mine"), ("b", "mine"), ("a", "test")):
        assert call_factory(f"{tmp_path / folder / name}.py:f", "", "cpu", "features") == f"made in {folder}/{name}"
    with pytest.raises(ValueError, match=r"features\.factory must be"):
        call_factory(f"{tmp_path / 'c' / 'mine'}.py:f", "", "cpu", "features")
