"""Every script that people copy runs as the README says, with the shipped model and no network."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lora_training import train
from lora_training.evaluation import __main__ as evaluation
from lora_training.evaluation import search

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
VIDEO = (ROOT / "docs" / "video.md").read_text(encoding="utf-8")


def run(arguments: list[str], **environment: str) -> str:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment  # tests run side by side
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "timesteps"),
    [
        ("text_to_image.py", ["--steps", "3"], "[999, 739, 239]"),
        ("image_to_image.py", ["--strength", "0.5"], "the last 4 of"),
        ("inpaint.py", ["--steps", "4"], "[999, 739, 499, 239]"),
        ("controlnet.py", [], "[999, 739, 499, 239]"),
    ],
)
def test_example_scripts(script, arguments, timesteps, tmp_path):
    out = tmp_path / "picture.png"
    assert timesteps in run([f"examples/{script}", *arguments, "--out", str(out)])
    assert Image.open(out).size == (128, 128)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A file to edit, of no special size, and a mask for it."""
    folder = tmp_path_factory.mktemp("photograph")
    picture = Image.linear_gradient("L").resize((130, 118)).convert("RGB")
    picture.paste((222, 38, 38), (30, 30, 70, 70))
    picture.save(folder / "photo.png")
    mask = Image.new("L", picture.size)
    mask.paste(255, (60, 0, 130, 118))
    mask.save(folder / "mask.png")
    return folder


@pytest.mark.parametrize(
    ("task", "options", "size"),
    [
        ("inpaint", ["--mask", "{}/mask.png"], (130, 118)),
        ("outpaint", ["--margins", "0", "10", "22", "0"], (152, 128)),
        ("colorize", [], (130, 118)),
        ("super_resolve", ["--factor", "2"], (260, 236)),
        ("stroke", ["--strength", "0.5"], (130, 118)),
        ("denoise", ["--noise-level", "25"], (130, 118)),
        ("vary", ["--count", "2"], (130, 118)),
        ("interpolate", ["--second", "{}/photo.png", "--count", "2"], (130, 118)),
        ("rewrite", ["--prompt", "a red star"], (130, 118)),
    ],
)
def test_editing_script(task, options, size, photograph, tmp_path):
    given = [option.format(photograph) for option in options]
    out = tmp_path / "edited.png"
    said = run(["examples/edit.py", task, str(photograph / "photo.png"), *given, "--steps", "2", "--out", str(out)])
    written = sorted(tmp_path.glob("edited*.png"))
    assert f"{written[0]}: {size[0]} x {size[1]}" in said
    assert all(Image.open(path).size == size for path in written)
    assert len(written) == (2 if task in ("vary", "interpolate") else 1)


def test_an_adapter_of_ones_own_can_be_measured(tmp_path):
    path = shutil.copy(ROOT / "examples/shapes/adapters/pcm_4phase.safetensors", tmp_path / "my v1.0.safetensors")
    table = run(["examples/shapes/measure_adapter.py", str(path), "--images", "8"])
    assert re.search(r"my v1\.0\.safetensors +4 +1 +\d+\.\d\d", table), table


def test_the_demo_draws_and_judges(tmp_path):
    said = run(["examples/shapes/demo.py", "--pictures", "2", "--out", str(tmp_path)])
    assert len(re.findall(r"^(?:PCM|LCM) +(?:1|2|4|8|16) +[01]\.\d\d ", said, re.MULTILINE)) == 10, said
    assert re.search(r"^teacher +50 ", said, re.MULTILINE), said
    assert {path.name for path in tmp_path.iterdir()} == {"picture.png", "contact_sheet.png"}


def test_the_sheet_of_edits_has_every_task(tmp_path):
    said = run(["examples/shapes/demo_edit.py", "--steps", "2", "--out", str(tmp_path)])
    assert "the picture, what was measured, and 2 steps" in said
    with Image.open(tmp_path / "editing.png") as sheet:
        assert sheet.height > 8 * 100


def test_the_sheet_of_clips_is_drawn_and_judged(tmp_path):
    pytest.importorskip("av")
    said = run(["examples/shapes/demo_video.py", "--clips", "1", "--out", str(tmp_path)])
    assert re.search(r"^teacher +25 ", said, re.MULTILINE), said
    assert len(re.findall(r"^(?:PCM, \d phases?|LCM) +[1248] ", said, re.MULTILINE)) == 8
    with Image.open(tmp_path / "clips.webp") as sheet:
        assert sheet.n_frames == 16


def test_readme_python_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for i, block in enumerate(blocks):
        script = tmp_path / f"block{i}.py"
        script.write_text(block)
        run([str(script)], PYTHONPATH=str(ROOT))


# One process for all, which imports their libraries once.
HELPS = """
import contextlib, io, json, runpy, sys
from pathlib import Path
helps, path = {}, sys.path[1:]
for script in sys.argv[1:]:
    sys.argv, sys.path[:] = [script, "--help"], [str(Path(script).parent.resolve()), *path]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    helps[script] = said.getvalue()
print(json.dumps(helps))
"""


@pytest.mark.parametrize("text", [README, VIDEO], ids=["README", "video"])
def test_every_script_that_is_named_exists_and_takes_its_arguments(text):
    """Recipes for real Stable Diffusion weights cannot run here; their arguments are checked against the scripts' own help."""
    commands = re.findall(r"^(?:python|accelerate launch) (\S+\.py)((?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert commands
    helps = json.loads(run(["-c", HELPS, *sorted({script for script, _ in commands})]))
    for script, rest in commands:
        for option in [a for a in shlex.split(rest.replace("\\\n", " ")) if a.startswith("--")]:
            assert option in helps[script], f"{script} has no {option}"


PARSERS = {
    "lora_training/train.py": train.parse,
    "lora_training.evaluation": evaluation.parse,
    "lora_training.evaluation.search": lambda arguments: search.parse(arguments).evaluation,
}


@pytest.mark.parametrize("text", [README, VIDEO], ids=["README", "video"])
def test_settings_in_commands_are_accepted_together(text, monkeypatch):
    """Up to where models would be loaded."""
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^(?:accelerate launch|python -m) (\S+)((?:.*\\\n)*.*)$", text, re.MULTILINE)
    known = [(name, rest) for name, rest in commands if name in PARSERS]
    assert {name for name, _ in known} == (set(PARSERS) if text is README else {"lora_training/train.py"})
    for name, rest in known:
        PARSERS[name](shlex.split(rest.replace("\\\n", " ")))


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z_-]+)`?", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
