"""docs/video.md: its Python runs as it stands with tiny models in place of the names, and its figures are computed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_models
from diffusers import AnimateDiffPipeline
from PIL import Image

from pcm_scheduler import PCMScheduler, export_clip
from pcm_scheduler.lora_file import AdapterSettings, write_video_adapter
from pcm_scheduler.lora_layouts import is_motion
from pcm_scheduler.noise_schedule import make_alphas_cumprod, make_betas
from pcm_scheduler.phases import PhaseGrid

TEXT = (Path(__file__).parents[2] / "docs" / "video.md").read_text(encoding="utf-8")
REPLACED = {
    "guoyww/animatediff-motion-adapter-v1-5-3": "motion",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "model",
    '"cuda", torch.float16': '"cpu", torch.float32',
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, motion modules, an image and a video adapter, and a clip, under the names of the text."""
    tiny_models.image_pipeline().save_pretrained(tmp_path / "model")
    tiny_models.motion_adapter().save_pretrained(tmp_path / "motion")
    lora = tiny_models.random_lora(tiny_models.motion_parts()["unet"])
    grid = PhaseGrid.even(4)
    settings = AdapterSettings("animatediff", grid.edges, 50, beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
    write_video_adapter(tmp_path / "outputs/pcm_animatediff_4phase.safetensors", lora, settings, "video")
    of_pictures = lora.only(lambda name: not is_motion(name))
    of_sd15 = AdapterSettings("sd15", grid.edges, 50)
    write_video_adapter(tmp_path / "outputs/pcm_sd15_linear_4phase.safetensors", of_pictures, of_sd15, "image")
    export_clip([Image.new("RGB", (16, 16), (20 * i, 0, 0)) for i in range(8)], tmp_path / "walk.gif")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_python_runs(folder, monkeypatch):
    pytest.importorskip("av")
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
    for written, ours in REPLACED.items():
        assert written in code
        code = code.replace(written, ours)
    asked = []
    draw = AnimateDiffPipeline.__call__

    def at_the_tiny_models_size(pipe, *arguments, **settings):
        asked.append((pipe.scheduler.config.beta_schedule, settings.get("num_frames", 16), settings["num_inference_steps"]))
        return draw(pipe, *arguments, **settings)

    monkeypatch.setattr(AnimateDiffPipeline, "__call__", at_the_tiny_models_size)
    done: dict = {}
    exec(compile(code, "docs/video.md", "exec"), done)
    assert asked == [("linear", 16, 4), ("linear", 16, 4), ("linear", 32, 4)]
    assert isinstance(done["pipe"].scheduler, PCMScheduler)
    assert {path.name for path in folder.glob("*.*")} >= {"fox.mp4", "robot.webp", "long.gif"}
    with Image.open(folder / "long.gif") as long:
        assert long.n_frames == 32


def test_its_table_of_betas_is_what_the_schedules_say():
    rows = re.findall(r"^\| (\d+) \| (0\.\d+) \| (0\.\d+) \|$", TEXT, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(PhaseGrid.even(4).sampling_timesteps(4))
    for column, schedule in ((1, "scaled_linear"), (2, "linear")):
        table = make_alphas_cumprod(make_betas(schedule, 0.00085, 0.012, 1000))
        assert [row[column] for row in rows] == [f"{table[int(row[0])].item():.4f}" for row in rows]
