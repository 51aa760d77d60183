"""What comes from elsewhere is data: no code in it runs, no path in it leads out, and nobody is called unasked."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from training_runs import tiny_arguments, tiny_config, tiny_folder

from lora_training.config import DataConfig, ModelConfig
from lora_training.data.sources import open_source
from lora_training.evaluation.features import FeatureConfig, load_features
from lora_training.evaluation.methods import MethodConfig
from lora_training.local_weights import read_state
from lora_training.loop import Run
from pcm_scheduler import load_pcm_lora, load_pcm_unet
from pcm_scheduler.lora_file import inspect_adapter, read_settings

ROOT = Path(__file__).parents[1]
PACKAGES = ("pcm_scheduler", "comfy_nodes", "lora_training")
CALLS = {  # that run what a file says, with the reason why one place may
    "eval": {},
    "exec": {},
    "compile": {},
    "__import__": {},
    "os.system": {},
    "os.popen": {},
    "yaml.load": {},
    "yaml.unsafe_load": {},
    "torch.load": {"lora_training/local_weights.py": "networks that were only published so; tensors only, see below"},
    "torch.jit.load": {"lora_training/evaluation/features.py": "a module that the configuration names as TorchScript"},
    "np.load": {},
}
MODULES = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "subprocess", "socket", "urllib", "requests")
ALLOWED_MODULES: dict[tuple[str, str], str] = {}


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every module that is installed, by its path."""
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_no_module_calls_what_runs_code_out_of_a_file():
    found = {
        (ast.unparse(node.func), name)
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS
    }
    assert found == {(call, name) for call, places in CALLS.items() for name in places}


def test_no_module_imports_what_unpickles_or_calls_out():
    found = set()
    for name, tree in sources():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {(name, module) for module in names if module.split(".")[0] in MODULES}
    assert found == set(ALLOWED_MODULES)


def test_nobody_is_trusted_with_code_and_models_are_read_from_safetensors_alone():
    for name, tree in sources():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            told = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert "trust_remote_code" not in told, f"{name}, line {node.lineno}"
            assert told.get("weights_only", "True") == "True", f"{name}, line {node.lineno}"
            assert told.get("shell", "False") == "False", f"{name}, line {node.lineno}"
            reads = isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
            if reads and not any(
                part in ast.unparse(node.func) for part in ("Processor", "Tokenizer")
            ):  # which have no weights
                assert told.get("use_safetensors") == "True", f"{name}, line {node.lineno}"


class Marker:
    """Unpickled, it writes a file: what code in a file of weights could do."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "code ran"))


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "code-ran"
    yield path
    assert not path.exists()


def planted(file: Path, marker: Path, form: str = "pickle") -> Path:
    """A file of weights with code in it: a bare pickle, or torch's own archive."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if form == "torch":
        torch.save({"weight": torch.zeros(1), "code": Marker(marker)}, file)
    else:
        file.write_bytes(pickle.dumps({"weight": Marker(marker)}))
    return file


def test_the_marker_would_appear(tmp_path):
    pickle.loads(pickle.dumps(Marker(tmp_path / "code-ran")))
    assert (tmp_path / "code-ran").exists()


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("read", [read_settings, inspect_adapter], ids=lambda f: f.__name__)
def test_adapters_with_code_are_refused_by_their_reader(read, form, tmp_path, marker):
    with pytest.raises(ValueError, match="safetensors"):
        read(planted(tmp_path / "a.safetensors", marker, form))


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.ckpt", "a.pt"])
@pytest.mark.parametrize("load", [load_pcm_lora, load_pcm_unet], ids=lambda f: f.__name__)
def test_adapters_with_code_are_refused_by_pipelines(load, name, tmp_path, marker):
    with pytest.raises((ValueError, OSError)):
        load(tiny_models.image_pipeline(), planted(tmp_path / name, marker, "torch"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    "setting", ["model.path", "model.teacher_loras", "lora.init_adapter"],
)  # fmt: skip
def test_the_trainer_refuses_weights_with_code(setting, folder, tmp_path, marker):
    file = planted(tmp_path / "a.safetensors", marker, "torch")
    value = f"[{file}]" if setting.endswith("loras") else str(file)
    with pytest.raises((ValueError, OSError)):
        Run(tiny_config(folder, tmp_path / "out.safetensors", **{setting: value}))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_model_folder_with_pickled_weights_is_not_read(part, tmp_path, marker):
    pipe = tiny_models.image_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    (weights,) = (tmp_path / "model" / part).glob("*.safetensors")
    weights.unlink()
    planted(
        weights.parent / ("pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"), marker, "torch"
    )
    from lora_training.backbones import load_backbone

    with pytest.raises((OSError, ValueError), match="safetensors"):
        load_backbone(ModelConfig(path=str(tmp_path / "model")))


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_networks_that_were_published_as_torch_files_may_hold_tensors_only(form, tmp_path, marker):
    with pytest.raises(pickle.UnpicklingError):
        read_state(planted(tmp_path / "a.pth", marker, form))
    torch.save({"weight": torch.ones(2)}, tmp_path / "b.pth")
    assert read_state(tmp_path / "b.pth")["weight"].tolist() == [1, 1]


def test_a_judge_with_code_in_its_weights_is_refused_before_its_library_reads_it(tmp_path, marker):
    with pytest.raises(pickle.UnpicklingError):
        load_features(FeatureConfig("inception", path=str(planted(tmp_path / "a.pth", marker, "torch"))), "cpu")


# ---------------------------------------------------------------------------------------------- pictures and captions


def a_picture(seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(16, 16, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


def test_pickles_in_a_tar_are_not_read(tmp_path, marker):
    code = planted(tmp_path / "code", marker).read_bytes()
    members = {"0.png": a_picture(), "0.txt": b"words"} | {f"0.{suffix}": code for suffix in ("pkl", "pyd", "pth", "npy", "pt")}
    records = list(open_source(DataConfig(path=str(write_tar(tmp_path / "a.tar", members)))))
    assert [(record.caption, record.content, record.problem) for record in records] == [("words", a_picture(), "")]


def test_nothing_of_a_tar_is_written_and_its_links_lead_nowhere(tmp_path):
    (tmp_path / "secret.png").write_bytes(a_picture(2))
    (tmp_path / "data").mkdir()
    members = {"../../escaped.png": a_picture(), "../../escaped.txt": b"words", "/absolute.png": a_picture(1)}
    links = {"1.png": str(tmp_path / "secret.png"), "1.txt": str(tmp_path / "secret.png")}
    before = set(tmp_path.rglob("*"))
    shard = write_tar(tmp_path / "data" / "a.tar", members, links)
    records = list(open_source(DataConfig(path=str(shard))))
    assert set(tmp_path.rglob("*")) == before | {shard}
    assert not (tmp_path.parent / "escaped.png").exists()
    assert all(record.content != (tmp_path / "secret.png").read_bytes() for record in records if not record.problem)
    assert all(isinstance(record.content, bytes) for record in records)


@pytest.mark.parametrize("name", ["../secret.png", "{root}/secret.png", "sub/../../secret.png"])
def test_metadata_speaks_for_files_in_its_folder_alone(name, tmp_path):
    (tmp_path / "secret.png").write_bytes(a_picture())
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "a.png").write_bytes(a_picture(1))
    rows = [{"file_name": name.format(root=tmp_path), "text": "a secret"}, {"file_name": "sub/../a.png", "text": "a picture"}]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    records = list(open_source(DataConfig(path=str(data))))
    assert [(record.content, record.caption) for record in records if not record.problem] == [(data / "a.png", "a picture")]
    assert [record.problem for record in records if record.problem] == [
        "is named in metadata.jsonl but is outside of its folder"
    ]


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "a\\b", "", "-rf", "a\x1b[2J"])
def test_a_methods_name_is_no_path(name):
    with pytest.raises(ValueError, match="name is also that of a folder"):
        MethodConfig(name)


# ---------------------------------------------------------------------------------------------- the network

GUARD = """
import sys
tried = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        tried.append((event, repr(arguments[1:])))
        raise OSError(f"the network was asked for: {event} {arguments[1:]}")
sys.addaudithook(watch)
"""


def alone(code: str, folder: Path) -> None:
    """Run code in a process of its own in which every way to the network raises and is noted."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples" / "shapes")]
    code = f"{GUARD}\nsys.path[:0] = {paths!r}\n{code}\nassert not tried, tried\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_guard_notes_what_is_tried(tmp_path):
    with pytest.raises(AssertionError, match="the network was asked for"):
        alone("import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)", tmp_path)


def test_imports_training_and_sampling_from_local_files_ask_nobody(folder, tmp_path):
    parts = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name, _ in sources()]
    modules = [name for name in parts if not name.startswith("comfy_nodes") and "__main__" not in name]
    arguments = tiny_arguments(folder, tmp_path / "a.safetensors", **{"optimizer.steps": 2})
    alone(
        f"""
import importlib
for name in {modules!r}:
    importlib.import_module(name)
from lora_training.train import parse
from lora_training.loop import run
from diffusers import StableDiffusionPipeline
from pcm_scheduler import load_pcm_lora
path = run(parse({arguments!r}))
pipe = StableDiffusionPipeline.from_pretrained({str(folder / "model")!r}, safety_checker=None, use_safetensors=True)
settings = load_pcm_lora(pipe, path)
pipe("a cat", num_inference_steps=2, guidance_scale=1.0, output_type="latent")
""",
        tmp_path,
    )
