"""What ComfyUI's frontend shows of the nodes beside the nodes themselves: help pages, and names and tooltips by language."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from comfyui_workflows import WORKFLOWS, build

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "comfy_nodes" / "web" / "docs"
SCRIPT = ROOT / "examples" / "comfyui" / "write_locales.py"


def read(language: str, name: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / name).read_text(encoding="utf-8"))


NODES = {language: read(language, "nodeDefs.json") for language in ("en", "zh")}
NODE_IDS = list(NODES["en"])


def leaves(content: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, text) of every text."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


def page(node_id: str, language: str) -> str:
    """A help page, from where the frontend fetches it."""
    path = PAGES / f"{node_id}.md" if language == "en" else PAGES / node_id / f"{language}.md"
    return path.read_text(encoding="utf-8")


def advised(text: str) -> list[str]:
    """Inputs named in the first column of the page's table of inputs."""
    found, inside = [], False
    for line in text.splitlines():
        inside = line.startswith(("| input |", "| 输入 |")) or (inside and line.startswith("|"))
        if inside:
            found += re.findall(r"`(\w+)`", line.split("|")[1])
    return found


def test_every_node_of_the_snapshot_has_texts() -> None:
    snapshot = json.loads((ROOT / "tests" / "integration" / "comfyui_nodes.json").read_text(encoding="utf-8"))
    assert snapshot.keys() <= NODES["en"].keys()
    for node_id, node in snapshot.items():
        texts = NODES["en"][node_id]
        assert node["inputs"].keys() <= texts["inputs"].keys(), node_id
        assert [name for _, name in node["outputs"]] == [output["name"] for output in texts["outputs"].values()], node_id


def test_every_node_is_found_by_reading_the_sources() -> None:
    """ComfyUI-Manager lists a pack's nodes without running it, and offers the pack to workflows that have one of them.

    To it a node is a class with ComfyNode among its own bases, by the node_id that its schema says as plain text or else by its
    own name.
    """
    found = set()
    for path in (ROOT / "comfy_nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).split(".")[-1] == "ComfyNode" for base in node.bases):
                calls = [
                    call for call in ast.walk(node) if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema"
                ]
                said = [word.value for call in calls for word in call.keywords if word.arg == "node_id"]
                found.add(next((value.value for value in said if isinstance(value, ast.Constant)), node.name))
    assert found == set(NODE_IDS)


@pytest.mark.parametrize("name", ["nodeDefs.json", "main.json"])
def test_both_languages_have_the_same_keys_in_the_same_order(name: str) -> None:
    english, chinese = (list(leaves(read(language, name))) for language in ("en", "zh"))
    assert [keys for keys, _ in english] == [keys for keys, _ in chinese]
    for keys, text in [*english, *chinese]:
        assert text.strip() == text != "", keys
        assert not set(text) & set("{}@|"), f"the frontend would read these as placeholders, links and plurals: {keys}"


def test_chinese_texts_are_chinese() -> None:
    for keys, text in leaves(NODES["zh"]):
        short = text in ("eta", "cfg", "vae", "Sigmas", "Latent")
        assert short or re.search(r"[\u4e00-\u9fff]", text), keys


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node_id", NODE_IDS)
def test_help_page(node_id: str, language: str) -> None:
    text = page(node_id, language)
    assert text.startswith(f"# {NODES[language][node_id]['display_name']}\n")
    assert NODES["en"][node_id]["display_name"] in text
    assert f"](images/{node_id}.png)" in text  # below /extensions/<pack>/docs/, whatever the language
    assert "://" not in text
    assert not re.search(r"(?<![\w.])/(home|root|tmp|var|usr|work|mnt|opt)/|[A-Za-z]:\\", text)
    assert advised(text) == advised(page(node_id, "en")) != []
    assert set(advised(text)) <= NODES["en"][node_id]["inputs"].keys()


def test_no_help_page_without_a_node() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == set(NODE_IDS)
    assert {path.parent.name for path in PAGES.glob("*/*.md")} == set(NODE_IDS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_are_wired_as_they_are_built(name: str) -> None:
    """In both forms: the links between nodes, and in the API's every input."""
    folder, built = ROOT / "example_workflows", build(name)
    assert json.loads((folder / "api" / f"{name}.json").read_text(encoding="utf-8")) == built
    saved = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    nodes = {str(node["id"]): node for node in saved["nodes"] if node["type"] != "MarkdownNote"}
    assert {key: node["type"] for key, node in nodes.items()} == {key: node["class_type"] for key, node in built.items()}
    sources = {link: [str(node), output] for link, node, output, *_ in saved["links"]}
    for key, node in nodes.items():
        linked = {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        assert linked == {given: value for given, value in built[key]["inputs"].items() if isinstance(value, list)}
        widgets = [value for value in built[key]["inputs"].values() if not isinstance(value, list)]
        assert all(value in node["widgets_values"] for value in widgets)


def test_the_clips_workflow_has_a_place_for_the_motion_file_and_says_its_betas() -> None:
    inputs = {node["class_type"]: node["inputs"] for node in build("animatediff").values()}
    assert "motion_lora" in inputs["ADE_ApplyAnimateDiffModelSimple"]
    assert inputs["ADE_UseEvolvedSampling"]["beta_schedule"] == "sqrt_linear (AnimateDiff)"


def test_the_registry_is_given_no_picture_that_it_cannot_fetch() -> None:
    """It reads pyproject.toml alone: a path within the pack means nothing to it."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["comfy"]
    for name in ("Icon", "Banner"):
        assert stated.get(name, "https://").startswith("https://")


OBJECT_INFO = {
    "KSampler": {"category": "sampling"},
    "PCMTest": {
        "display_name": "PCM Test",
        "description": "A node.",
        "category": "phased consistency/tests",
        "input": {
            "required": {"model": ["MODEL", {"tooltip": "A model, naïve or not."}], "image": ["IMAGE"]},
            "optional": {"eta": ["FLOAT", {"default": 0.0}]},
            "hidden": {"prompt": ["PROMPT"]},
        },
        "output_name": ["latent", "sheet"],
        "output_tooltips": ["The result.", None],
    },
}


def test_script_writes_what_object_info_says(tmp_path: Path) -> None:
    (tmp_path / "info.json").write_text(json.dumps(OBJECT_INFO))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "info.json"), "--output", str(tmp_path / "en")]
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(path.name for path in (tmp_path / "en").iterdir()) == ["main.json", "nodeDefs.json"]
    text = (tmp_path / "en" / "nodeDefs.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert "naïve" in text
    assert json.loads(text) == {
        "PCMTest": {
            "display_name": "PCM Test",
            "description": "A node.",
            "inputs": {
                "model": {"name": "model", "tooltip": "A model, naïve or not."},
                "image": {"name": "image"},
                "eta": {"name": "eta"},
            },
            "outputs": {"0": {"name": "latent", "tooltip": "The result."}, "1": {"name": "sheet"}},
        }
    }
    categories = {"nodeCategories": {"phased consistency": "phased consistency", "tests": "tests"}}
    assert json.loads((tmp_path / "en" / "main.json").read_text(encoding="utf-8")) == categories


def test_script_takes_nodes_without_tooltips() -> None:
    node_texts = runpy.run_path(str(SCRIPT))["node_texts"]
    node = OBJECT_INFO["PCMTest"] | {"output_tooltips": None}
    assert node_texts(node)["outputs"] == {"0": {"name": "latent"}, "1": {"name": "sheet"}}
