"""That the shipped motion modules and adapters of clips do what is claimed, and train and sample as their files say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import video_model
import yaml
from diffusers import AnimateDiffPipeline, MotionAdapter
from distil import overridden
from distil_video import CONFIGS, FURTHER
from motion import measure_motion
from safetensors import safe_open
from video_model import (
    ADAPTERS,
    GUIDANCE_FILE,
    PCM_OF_PHASES,
    clip_noise,
    clips_fingerprint,
    draw_clips,
    load_video_pipeline,
    shared_clips,
    teacher_guidance,
    write_image_model,
)
from write_clips import write_folder

from lora_training.loop import run
from lora_training.train import parse
from pcm_scheduler import PCMScheduler, load_pcm_lora
from pcm_scheduler.lora_file import read_settings

from model import HERE, MOTION_DIR
from moving import NUM_FRAMES

EXAMPLES = HERE.parent
SHIPPED = (*PCM_OF_PHASES.values(), ADAPTERS["LCM"])


def read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pipe() -> AnimateDiffPipeline:
    pipe = load_video_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_what_ships_is_small_and_of_half_precision():
    files = [*MOTION_DIR.glob("*.safetensors"), *SHIPPED]
    assert len(files) == 5
    for path in files:
        assert path.stat().st_size < 8e6
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys() if not key.endswith(".alpha")} == {"F16"}  # noqa: SIM118


def test_motion_modules_have_animatediffs_layout():
    adapter = MotionAdapter.from_pretrained(MOTION_DIR)
    assert adapter.config.motion_max_seq_length >= NUM_FRAMES
    names = set(adapter.state_dict())
    assert any(name.startswith("mid_block.motion_modules.0.") for name in names)  # v2
    assert all(torch.isfinite(p).all() for p in adapter.parameters())


@pytest.mark.parametrize(("file", "phases", "steps"), [(PCM_OF_PHASES[m], m, m) for m in (1, 2, 4)] + [(ADAPTERS["LCM"], 1, 4)])
def test_objects_go_where_the_words_say_in_few_steps(pipe, file, phases, steps):
    """Opposite words from the same noise: the object's way differs by more than the least way that training clips have."""
    settings = load_pcm_lora(pipe, file, adapter_name=file.stem)
    assert isinstance(pipe.scheduler, PCMScheduler)
    assert settings.grid.num_phases == phases
    pipe.set_adapters(file.stem)
    texts = [
        f"a large red square moving {way} fast in the center on a plain gray background" for way in ("leftward", "rightward")
    ]
    latents = clip_noise(1, 7).expand(2, -1, -1, -1, -1)
    clips = draw_clips(pipe, texts, latents, steps, settings.guidance_scale, settings.eta)
    left, right = measure_motion(clips.float() / 127.5 - 1, ["red", "red"])
    assert left.displacement[0] < 0 < right.displacement[0]
    assert right.displacement[0] - left.displacement[0] > 26


@pytest.mark.usefixtures("own_precision")
def test_the_configuration_trains_on_clips(tmp_path, monkeypatch):
    """What README runs, on few clips for two steps: the file it writes loads into the pipeline it was trained for."""
    monkeypatch.chdir(EXAMPLES.parent)
    folders = {part: str(tmp_path / part) for part in ("model", "clips", "cache")}
    write_image_model(Path(folders["model"]))
    write_folder(Path(folders["clips"]), 4)
    given = ["--config", str(EXAMPLES / "configs" / "shapes_video_pcm4.yaml"), "--model.path", folders["model"]]
    given += ["--data.path", folders["clips"], "--data.cache", folders["cache"], "--output", str(tmp_path / "of.safetensors")]
    given += ["--optimizer.steps", "2", "--optimizer.warmup_steps", "1", "--optimizer.batch_size", "1"]
    given += [
        "--validation.steps",
        "[4]",
        "--validation.guidance_scales",
        "[1.0]",
        "--validation.prompts",
        "[a red star going upward]",
    ]
    written = run(parse(given))
    names = {path.name for path in tmp_path.glob("of*.safetensors")}
    assert names == {f"of{part}.safetensors" for part in ("", "_motion", "_spatial")}
    model = AnimateDiffPipeline.from_pretrained(folders["model"], motion_adapter=MotionAdapter.from_pretrained(MOTION_DIR))
    assert load_pcm_lora(model, written).grid.num_phases == 4


def test_guidance_was_searched_with_the_weights_that_ship_and_is_used():
    """It trains the adapters and draws the clips of teacher and solvers; what adapters are drawn with is in their files."""
    found = json.loads(GUIDANCE_FILE.read_text(encoding="utf-8"))
    assert found["weights"] == clips_fingerprint()
    assert found["rows"][0]["motion_and_scene"] == max(row["motion_and_scene"] for row in found["rows"])
    for file in SHIPPED:
        table = json.loads(file.with_suffix(".search.json").read_text(encoding="utf-8"))
        assert table["weights"] == clips_fingerprint()
        settings = read_settings(file)
        assert settings.guidance_scale == table["rows"][0]["guidance_scale"]
        assert settings.training_guidance_scale == teacher_guidance()
    for config in CONFIGS.values():
        assert read(config)["objective"]["guidance_scale"] == teacher_guidance()
    evaluation = read(EXAMPLES / "evaluation" / "shapes_video.yaml")
    solvers = [method for method in evaluation["methods"] if "scheduler" in method]
    assert {m["guidance_scale"] for m in (*solvers, evaluation["reference"]["method"])} == {teacher_guidance()}


@pytest.mark.parametrize(
    ("file", "config", "differs"),
    [(ADAPTERS[name], config, {}) for name, config in CONFIGS.items()]
    + [(PCM_OF_PHASES[phases], CONFIGS["PCM"], differs) for phases, differs in FURTHER.items()],
)
def test_shipped_adapters_are_of_the_configurations_beside_them(file, config, differs):
    with safe_open(file, framework="pt") as opened:
        made_with = json.loads(opened.metadata()["pcm_trainer.config"])
    guidance = {"sampling.guidance_scale": read_settings(file).guidance_scale} if differs else {}
    now = json.loads(json.dumps(dataclasses.asdict(overridden(config, differs | guidance))))
    for section in ("model", "data", "lora", "objective", "optimizer", "sampling"):
        assert {key: now[section].get(key) for key in made_with[section]} == made_with[section]
    assert {key: now[key] for key in ("seed", "title", "mixed_precision")}.items() <= made_with.items()


def test_clips_that_were_drawn_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(video_model, "RUNS_DIR", tmp_path)
    asked = []

    def draw(numbers):
        asked.append(list(numbers))
        return torch.tensor([[[[[number]]]] for number in numbers], dtype=torch.uint8)

    for _ in range(2):
        assert shared_clips("some", ["a", "b", "c"], draw).flatten().tolist() == [0, 1, 2]
    shared_clips("some", ["a", "b"], draw)
    shared_clips("others", ["a", "b", "c"], draw)
    assert asked == [[0, 1, 2], [0, 1], [0, 1, 2]]


def test_the_evaluation_names_files_that_ship():
    methods = read(EXAMPLES / "evaluation" / "shapes_video.yaml")["methods"]
    named = {method["adapter"] for method in methods if "adapter" in method}
    assert named == {f"examples/shapes/adapters/{file.name}" for file in SHIPPED}
    assert all((EXAMPLES.parent / name).is_file() for name in named)
