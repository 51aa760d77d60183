"""Clips of every method, measured and shown: tiny random motion modules in a tiny random image model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import tiny_models
import torch
from PIL import Image

from lora_training.backbones import load_backbone
from lora_training.config import LoraConfig, ModelConfig, chosen
from lora_training.evaluation.alignment import ScorerConfig
from lora_training.evaluation.config import (
    ClipsConfig,
    EvaluationConfig,
    GuidanceConfig,
    NegativeConfig,
    OdeConfig,
    ReferenceConfig,
)
from lora_training.evaluation.features import FeatureConfig
from lora_training.evaluation.generation import Pictures, generate
from lora_training.evaluation.methods import RIVALS, Gallery, MethodConfig
from lora_training.evaluation.report import write_report
from lora_training.evaluation.run import Evaluation, pictures_of
from lora_training.evaluation.search import SearchConfig
from lora_training.evaluation.video import FlowConfig
from lora_training.students import Adapter
from pcm_scheduler import export_clip
from pcm_scheduler.lora_file import AdapterSettings, adapter_tensors, write_video_adapter
from pcm_scheduler.noise_schedule import make_alphas_cumprod, make_betas
from pcm_scheduler.phases import PhaseGrid

from model import MODEL_DIR

FRAMES, SIZE = 4, (16, 16)
PROMPTS = ["a red star", "a blue ring", "rain", "a cat"]
JUDGES = Path(tiny_models.__file__).with_name("clip_judges.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    tiny_models.image_pipeline().save_pretrained(folder / "model")
    tiny_models.motion_adapter().save_pretrained(folder / "motion")
    adapter = Adapter(load_backbone(model_config(folder)), LoraConfig(rank=4, alpha=2.0), 0)
    weights = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters.values():
            p.copy_((torch.randn(p.shape, generator=weights) * 100).round() / 1024)
    betas = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}
    settings = AdapterSettings("animatediff", PhaseGrid.even(4, 8).edges, 8, guidance_scale=1.0, **betas)
    write_video_adapter(folder / "pcm.safetensors", adapter_tensors(adapter.state(), adapter.alphas()), settings, "PCM")
    return folder


def model_config(folder, beta_schedule="linear"):
    motion = str(folder / "motion")
    return ModelConfig(str(folder / "model"), "animatediff", motion_adapter=motion, beta_schedule=beta_schedule)


def methods_of(folder):
    whole, motion, spatial = (str(folder / f"pcm{part}.safetensors") for part in ("", "_motion", "_spatial"))
    named = [MethodConfig("whole", whole), MethodConfig("motion", motion), MethodConfig("spatial", spatial)]
    named += [MethodConfig(f"whole, {name}", whole, name) for name in RIVALS]
    return [*named, *(MethodConfig(name, scheduler=name, guidance_scale=3.0) for name in RIVALS)]


def gallery_of(folder, methods, beta_schedule="linear"):
    pipe = load_backbone(model_config(folder, beta_schedule)).pipe
    pipe.set_progress_bar_config(disable=True)
    return Gallery(pipe, methods, FRAMES)


@pytest.fixture(scope="module")
def gallery(folders):
    return gallery_of(folders, methods_of(folders))


def draw(gallery, name, steps=2, numbers=(0, 1)):
    return gallery.draw(name, steps, [PROMPTS[n] for n in numbers], numbers, SIZE)


def test_every_method_draws_clips_from_the_same_noise_and_is_switched_whole(folders, gallery):
    assert gallery.noise([0, 1], SIZE, 0).shape == (2, 4, FRAMES, 8, 8)
    drawn = {name: draw(gallery, name) for name in gallery.methods}
    for name, clips in drawn.items():
        assert clips.shape == (2, FRAMES, 3, *SIZE), name
        assert clips.isfinite().all(), name
        assert clips.std() > 0.01, name
    for name in ("whole", "motion", "spatial", "ddim"):
        (method,) = [method for method in methods_of(folders) if method.name == name]
        assert torch.equal(draw(gallery_of(folders, [method]), name), drawn[name]), name  # nothing is left of the others
    for one, other in (("whole", "motion"), ("whole", "spatial"), ("motion", "spatial"), ("ddim", "dpmpp")):
        assert (drawn[one] - drawn[other]).abs().mean() > 1e-5


@pytest.mark.parametrize("name", ["whole", "whole, lcm", "dpmpp"])
def test_a_clip_is_its_number_whatever_is_drawn_with_it(gallery, name):
    """Rounding aside; new noise on the way has a stream for each clip."""
    together, alone = draw(gallery, name), torch.cat([draw(gallery, name, numbers=[n]) for n in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)


def test_one_step_draws_by_every_scheduler(gallery):
    for name in ("whole", *RIVALS):
        assert draw(gallery, name, steps=1, numbers=[0]).isfinite().all(), name


def test_an_adapter_is_drawn_with_on_the_betas_that_its_file_states(folders):
    methods = [m for m in methods_of(folders) if m.name in ("whole", "whole, ddim", "whole, lcm", "ddim")]
    gallery = gallery_of(folders, methods, beta_schedule=None)  # scaled_linear, as the image model says
    found = {}
    for name in gallery.methods:
        gallery.put_in_place(name)
        found[name] = gallery.pipe.scheduler.alphas_cumprod
    linear, scaled = (make_alphas_cumprod(make_betas(kind, 0.00085, 0.012, 1000)) for kind in ("linear", "scaled_linear"))
    for name, alphas in found.items():
        torch.testing.assert_close(alphas.double(), (scaled if name == "ddim" else linear).double(), rtol=1e-5, atol=1e-7)


def test_clips_on_disk_are_what_was_drawn_frame_by_frame(tmp_path):
    clips = Pictures(tmp_path, 3, 2, FRAMES)
    drawn = torch.randint(0, 256, (3, FRAMES, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn[1, 2] = drawn[1, 1]  # which an animated file would merge
    drawn[2] = 7
    for number in range(3):
        clips.keep(number, drawn[number])
    assert [batch.shape for batch in clips] == [(2, FRAMES, 3, 8, 12), (1, FRAMES, 3, 8, 12)]
    assert torch.equal(((torch.cat(list(clips)) + 1) * 127.5).round().byte(), drawn)
    with Image.open(clips.path(0)) as strip:
        assert strip.size == (FRAMES * 12, 8)
        second = strip.crop((12, 0, 24, 8))
    assert second.getpixel((3, 5)) == tuple(drawn[0, 1, :, 5, 3].tolist())


def test_an_interrupted_run_goes_on_and_processes_share_the_work(gallery, tmp_path, monkeypatch):
    whole = Pictures(tmp_path / "whole", 4, 4, FRAMES)
    generate(gallery, "whole", 1, PROMPTS, SIZE, 0, whole)
    shared = Pictures(tmp_path / "shared", 4, 1, FRAMES)
    generate(gallery, "whole", 1, PROMPTS, SIZE, 0, shared, process=(1, 2))
    assert shared.missing() == [0, 2]
    with pytest.raises(FileNotFoundError, match="2 of 4 clips"):
        list(shared)
    (shared.folder / "00002.tmp").write_bytes(b"half a file")  # of a run that was killed
    calls = []
    monkeypatch.setattr(gallery, "draw", lambda *args, original=gallery.draw: calls.append(args) or original(*args))
    generate(gallery, "whole", 1, PROMPTS, SIZE, 0, shared, process=(0, 2))
    assert len(calls) == 2
    assert (torch.cat(list(shared)) - torch.cat(list(whole))).abs().max() <= 1.5 * 2 / 255  # a level: batches round otherwise


def judge(name):
    return ScorerConfig("factory", factory=f"{JUDGES}:{name}")


def space(name):
    return FeatureConfig("factory", factory=f"{JUDGES}:{name}")


@pytest.fixture
def config(folders, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a red star", "thing": "a star"}))
    return EvaluationConfig(
        model=model_config(folders),
        methods=(
            MethodConfig("PCM", str(folders / "pcm.safetensors"), steps=(1, 2)),
            MethodConfig("DDIM", scheduler="ddim", steps=(1, 2), guidance_scale=3.0),
        ),
        prompts=str(tmp_path / "prompts.txt"),
        size=SIZE,
        batch_size=2,
        reference=ReferenceConfig(method=MethodConfig("teacher", scheduler="ddim", steps=(3,), guidance_scale=3.0)),
        features=space("colours"),
        alignment=judge("brightness"),
        clips=ClipsConfig(FRAMES, motion=judge("brightens"), features=space("changes"), flow=FlowConfig()),
        guidance=GuidanceConfig(scales=(1.0, 3.0), steps=1, count=2),
        negative=NegativeConfig(str(tmp_path / "pairs.jsonl"), steps=1),
        ode=OdeConfig(count=1, steps=(1, 2), solver_steps=8),
        shown=2,
        output=str(tmp_path / "out"),
    )


def test_a_report_of_clips_is_drawn_measured_and_written_once(config, tmp_path, monkeypatch):
    config.seeds = (0, 1)
    evaluation = Evaluation(config)
    report = evaluation.run()
    text = write_report(evaluation, report).read_text()
    rows = {(row["method"], row["steps"]): row for row in report["rows"]}
    assert set(rows) == {("PCM", 1), ("PCM", 2), ("DDIM", 1), ("DDIM", 2)}
    (reference,) = report["reference"]
    own = {"alignment", "motion", "temporal_consistency", "flow"}
    apart = {"frechet_distance", "kernel_distance", "precision", "recall", "video_frechet_distance"}
    assert set(reference) == {"method", "steps", *own}
    for row in rows.values():
        assert own | apart | {"diversity"} <= set(row)
        assert row["frechet_distance"] >= 0
        assert row["video_frechet_distance"] >= 0
        assert 0 <= row["motion"] <= 1
        assert 0 <= row["precision"] <= 1
        assert -1 <= row["temporal_consistency"] <= 1
        assert row["flow"] > 0
        assert 0 < row["diversity"] < 2
    assert [(row["method"], row["steps"]) for row in report["consistency"]] == [("PCM", "1 / 2"), ("DDIM", "1 / 2")]
    assert len(report["guidance"]) == 4
    assert all(0 <= row["saturation"] <= 1 for row in report["guidance"])
    assert [row["method"] for row in report["negative"]] == ["PCM", "DDIM"]
    assert [(row["method"], row["steps"]) for row in report["ode"]] == [("PCM", 1), ("PCM", 2)]
    assert "4 clips of 4 frames a row from each of 2 noises" in text
    assert "Frechet video distance" in text
    out = tmp_path / "out"
    with Image.open(out / "pictures.png") as sheet:
        assert sheet.size == (200 + 2 * (4 * 16 + 4), 4 * 20)
    assert (out / "video_frechet_distance.png").is_file()

    again = Evaluation(config)
    monkeypatch.setattr(again.gallery, "draw", None)  # clips are there
    again.draw()
    assert again.measure() == report["rows"]
    drawn = again.pictures(config.methods[0], 1, 0)
    alone = torch.cat(list(drawn))
    assert alone.shape == (4, FRAMES, 3, *SIZE)
    first = Evaluation(dataclasses.replace(config, seeds=(0,)))
    (row, *_) = first.measure()
    assert row["alignment"] == pytest.approx((alone.mean().item() + 1) / 2, abs=1e-6)
    brighter = alone[:, -1].mean((1, 2, 3)) > alone[:, 0].mean((1, 2, 3))
    assert row["motion"] == pytest.approx(brighter.double().mean().item())


def test_whole_clips_may_be_judged_for_alignment_and_the_network_run_in_bf16(config):
    config.clips.alignment, config.alignment, config.precision = judge("brightens"), None, "bf16"
    config.methods, config.features, config.clips.features = config.methods[:1], None, None
    config.ode, config.negative, config.count = OdeConfig(), NegativeConfig(), 2
    evaluation = Evaluation(dataclasses.replace(config))
    evaluation.draw()
    for row in evaluation.measure():
        assert set(row) == {"method", "steps", "alignment", "motion", "flow"}
        assert row["alignment"] == row["motion"]
    assert evaluation.reference_row() == []
    assert len(evaluation.guidance()) == 2


def test_the_reference_may_be_a_folder_of_clips(config, tmp_path):
    folder = tmp_path / "data"
    frames = torch.randint(0, 256, (2 * FRAMES, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    export_clip(frames, folder / "a.webp", 8)
    for number, frame in enumerate(frames):
        path = folder / "b" / f"{number:04d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(path)
    config.reference.folder = str(folder)
    config.clips.stride = 2
    evaluation = Evaluation(config)
    found = list(evaluation.reference())
    assert [clip.shape for clip in found] == [(1, FRAMES, 3, *SIZE)] * 2
    assert all(clip.abs().max() <= 1 for clip in found)
    evaluation.draw()
    assert not (evaluation.root / "pictures" / "teacher").exists()
    assert evaluation.measure()[0]["video_frechet_distance"] >= 0
    (tmp_path / "nothing").mkdir()
    config.reference.folder = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has 0 clips"):
        Evaluation(config)


def test_clips_of_other_lengths_go_to_other_folders_and_pictures_stay_where_they_are(config, tmp_path):
    method = config.methods[0]
    folder = pictures_of(config, method, 1, 0).folder
    config.clips.flow, config.clips.motion = None, None
    assert pictures_of(config, method, 1, 0).folder == folder
    config.clips.frames = FRAMES + 1
    assert pictures_of(config, method, 1, 0).folder != folder

    model = ModelConfig(path="model")
    pictures = EvaluationConfig(model=model, methods=(MethodConfig("DDIM", scheduler="ddim"),), output=str(tmp_path))
    told = {"model": chosen(model), "prompts": ["a"], "size": (512, 512), "seed": 0, "precision": "no"}
    settings = [{"name": "DDIM", "scheduler": "ddim", "steps": 4, "adapter": ""}, told]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    found = pictures_of(pictures, pictures.methods[0], 4, 0, ["a"])
    assert found.folder.name == f"4-steps-{digest[:12]}"
    assert found.frames == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clips": None}, "draws clips: set clips"),
        ({"model": ModelConfig(str(MODEL_DIR))}, "sd15 draws pictures"),
        ({"model": ModelConfig(family="animatediff")}, r"needs model\.motion_adapter"),
        ({"model": ModelConfig(motion_adapter="m"), "clips": None}, "motion_adapter is for model.family animatediff"),
        ({"model": ModelConfig(family="animatediff", motion_adapter="m", image_adapter="i")}, "name those in methods"),
        ({"clips": ClipsConfig(1)}, "at least 2"),
        ({"clips": ClipsConfig(stride=2, fps=8)}, "do not go together"),
        ({"clips": ClipsConfig(motion=ScorerConfig("clip"))}, "clips.motion.kind: clip looks at pictures"),
        ({"clips": ClipsConfig(features=FeatureConfig("inception"))}, "factory or torchscript"),
        ({"clips": ClipsConfig(alignment=judge("brightens"))}, "leave one of them out"),
        ({"alignment": None}, r"guidance\.scales needs a judge"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(config, **changes)


def test_what_clips_cannot_be_is_said_before_anything_is_drawn(config):
    with pytest.raises(ValueError, match="times are searched with pictures"):
        SearchConfig(config, 4, "PCM")
    config.clips.frames = 64
    with pytest.raises(ValueError, match="too long"):
        Evaluation(config)
    config.clips.flow = FlowConfig("raft_large", "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        Evaluation(config)
