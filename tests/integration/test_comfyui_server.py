"""A real ComfyUI server with the pack in it: what it lists, every example workflow, cancelling, and what it refuses.

Set COMFYUI_PATH and COMFYUI_PYTHON as for `test_comfyui.py`; COMFYUI_ANIMATEDIFF_PATH too for AnimateDiff-Evolved's workflow.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from comfyui_server import RefusedError, serve
from comfyui_workflows import MOTION_LORA, WORKFLOWS, Builder, build, load

pytest.importorskip("websocket", reason="pip install websocket-client")

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).parent / "comfyui_nodes.json"
EVOLVED = os.environ.get("COMFYUI_ANIMATEDIFF_PATH")
PACK = "some-pack.name"  # in a folder with a space in its name ComfyUI serves no help pages

pytestmark = pytest.mark.skipif(
    "COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a ComfyUI checkout, COMFYUI_PYTHON to its Python"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    packs = {"ComfyUI-AnimateDiff-Evolved": Path(EVOLVED)} if EVOLVED else {}
    with serve(tmp_path_factory.mktemp("comfyui") / "base", PACK, {"PCM_DROPDOWN": "1"}, packs) as running:
        (running.base / "models" / "animatediff_models" / "mm_sd_v15_v2.ckpt").touch()
        (running.base / "models" / "animatediff_motion_lora" / MOTION_LORA).touch()
        yield running


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


def released(object_info):
    """What saved workflows depend on: ids, inputs with type and default, outputs."""
    seen = {}
    for name, info in object_info.items():
        if name.startswith("PCM"):
            inputs = {}
            for kind in ("required", "optional"):
                for key, (of_type, *options) in info["input"].get(kind, {}).items():
                    default = options[0].get("default") if options else None
                    inputs[key] = [kind, of_type if isinstance(of_type, str) else "COMBO", default]
            seen[name] = {"inputs": inputs, "outputs": list(zip(info["output"], info["output_name"], strict=True))}
    return json.loads(json.dumps(seen))


def test_every_id_input_output_and_default_is_as_released(object_info):
    """Renaming any of them breaks the workflows people have saved: a new node is added to the file, nothing in it changes."""
    assert released(object_info) == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_everything_has_a_tooltip(object_info):
    for name, info in object_info.items():
        if name.startswith("PCM"):
            assert info["description"], name
            assert all(info["output_tooltips"]), name
            for kind in ("required", "optional"):
                for key, (_, *options) in info["input"].get(kind, {}).items():
                    assert options, f"{name}.{key}"
                    assert options[0]["tooltip"], f"{name}.{key}"


def test_workflows_pages_and_words_are_served(server, object_info):
    assert set(server.get("/workflow_templates")[PACK]) == set(WORKFLOWS)
    words = server.get("/i18n")
    for name in filter(lambda name: name.startswith("PCM"), object_info):
        assert words["zh"]["nodeDefs"][name]["display_name"]
        for page in (f"docs/{name}.md", f"docs/{name}/zh.md"):
            assert server.text(f"/extensions/{PACK}/{page}").startswith("# ")


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name != "animatediff"])
def test_a_workflow_runs_as_it_is_posted(server, name):
    """The file's bytes; progress and previews come while it runs, and a picture at the end."""
    graph = json.loads((ROOT / "example_workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert graph == build(name)
    run = server.run(graph)
    assert run.status == "success", run.error
    assert len(run.of("progress")) >= 2
    assert run.previews >= 2 or name == "step_sheet"  # which shows the sheet alone
    shown = [shown for output in run.outputs.values() for shown in output.get("images", [])]
    assert shown
    for one in shown:
        assert np.asarray(server.picture(one)).std() > 5


@pytest.mark.skipif(not EVOLVED, reason="set COMFYUI_ANIMATEDIFF_PATH to a checkout of AnimateDiff-Evolved")
def test_the_animatediff_workflow_is_taken_up_to_its_motion_module(server):
    """There is none of that size here; `test_comfyui_animatediff.py` samples with small ones."""
    run = server.run(build("animatediff"))
    assert [data["node_type"] for data in run.of("execution_error")] == ["ADE_LoadAnimateDiffModel"]


def result_of(server, graph):
    run = server.run(graph)
    assert run.status == "success", run.error
    (shown,) = [shown for output in run.outputs.values() for shown in output.get("images", [])]
    given = Image.open(server.base / "input" / "example.png")
    return np.asarray(server.picture(shown).convert("RGB")).astype(float), np.asarray(given).astype(float)


LUMINANCE = (0.299, 0.587, 0.114)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_what_is_kept_is_kept_in_the_saved_file(server, cfg):
    """In grey levels of the PNG: pixels exactly, luminance and block means to rounding of three channels, half a level."""
    graphs = {name: build(name) for name in ("inpaint", "outpaint", "colorize", "super_resolve")}
    for graph in graphs.values():
        for node in graph.values():
            if "cfg" in node["inputs"]:
                node["inputs"] |= {"cfg": cfg, "steps": 3, "seed": 5}
    drawn, given = result_of(server, graphs["inpaint"])
    kept = np.ones(given.shape[:2], bool)
    kept[192:576, 192:576] = False
    assert (drawn == given)[kept].all()
    assert np.abs(drawn - given)[~kept].mean() > 1
    drawn, given = result_of(server, graphs["outpaint"])
    assert (drawn[:, 64:-64] == given).all()
    drawn, given = result_of(server, graphs["colorize"])
    assert np.abs((drawn - given) @ LUMINANCE).max() <= 0.5 + 1e-3
    drawn, given = result_of(server, graphs["super_resolve"])
    small, means = (x.reshape(128, k, 128, k, 3).mean(axis=(1, 3)) for x, k in ((given, 6), (drawn, 4)))
    assert np.abs(means - small).max() <= 0.5 + 1e-3


def sampler_graph(**changes):
    """The first workflow with other widgets on its PCM KSampler."""
    graph = build("text_to_image_sd15")
    sampler = next(node for node in graph.values() if node["class_type"] == "PCMKSampler")
    sampler["inputs"] |= changes
    return graph


def test_a_run_can_be_cancelled_and_the_next_one_works(server):
    run = server.run(sampler_graph(steps=50, seed=123), cancel_after=3)
    assert run.status == "interrupted"
    assert len(run.of("progress")) < 50
    assert server.run(sampler_graph(steps=1, seed=124)).status == "success"


def without_settings(**changes):
    graph = sampler_graph(**changes)
    for node in graph.values():
        node["inputs"].pop("settings", None)
    return graph


def sheet_graph(**changes):
    graph = build("step_sheet")
    next(node for node in graph.values() if node["class_type"] == "PCMStepSheet")["inputs"] |= changes
    return graph


def missing_file_graph():
    graph = sampler_graph()
    next(node for node in graph.values() if node["class_type"] == "PCMLoraLoader")["inputs"]["lora_name"] = (
        "nowhere.safetensors"
    )
    return graph


@pytest.mark.parametrize(
    ("graph", "word"),
    [
        (sampler_graph(steps=0), "steps"),
        (sampler_graph(denoise=1.5), "denoise"),
        (sampler_graph(eta=-1), "eta"),
        (without_settings(num_phases=60), "cannot be cut"),
        (without_settings(num_solver_steps=48), "or 50"),
        (sheet_graph(step_counts="two"), "whole numbers"),
        (missing_file_graph(), "There is no nowhere.safetensors"),
        (sheet_graph(compare_with="euler nothing"), "euler simple"),
    ],
)
def test_bad_inputs_are_refused_before_anything_runs(server, graph, word):
    with pytest.raises(RefusedError) as refused:
        server.run(graph)
    assert word in json.dumps(refused.value.answer)


def edit_graph(image_mask):
    g = Builder()
    loaded = load(g, "a red heart")
    image = g.add("LoadImage", image="example.png")
    mask = g.add("SolidMask", value=image_mask, width=768, height=768)
    widgets = {"seed": 1, "steps": 4, "cfg": 1.0, "strength": 0.8, "eta": 1.0}
    edit = g.add("PCMInpaint", **loaded.common, **widgets, vae=loaded.vae, image=image[0], mask=mask[0])
    g.add("PreviewImage", images=edit[0])
    return g.graph


def flow_graph():
    graph = sampler_graph()
    sampler = next(node for node in graph.values() if node["class_type"] == "PCMKSampler")
    graph["flow"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": sampler["inputs"]["model"], "shift": 3.0}}
    sampler["inputs"]["model"] = ["flow", 0]
    return graph


def other_family_graph():
    graph = sampler_graph()
    loader = next(node for node in graph.values() if node["class_type"] == "PCMLoraLoader")
    loader["inputs"]["lora_name"] = "pcm_sdxl_smallcfg_4step_converted.safetensors"
    return graph


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (sampler_graph(steps=51), "at most 50"),
        (edit_graph(0.0), "White is drawn anew"),
        (edit_graph(1.0), "nothing to keep"),
        (flow_graph(), "flow-matching"),
        (other_family_graph(), "the model is SD15"),
    ],
)
def test_what_cannot_work_is_said_on_the_node(server, graph, words):
    run = server.run(graph)
    assert run.status == "error"
    assert words in run.error


def said(run):
    """On the nodes' faces, and the same in their outputs."""
    texts = [text for output in run.outputs.values() for text in output.get("text", [])]
    assert texts == run.words
    return " ".join(texts)


def test_odd_combinations_work_and_are_pointed_out(server):
    graph = sampler_graph(seed=9)
    texts = [node for node in graph.values() if node["class_type"] == "CLIPTextEncode"]
    texts[1]["inputs"]["text"] = "blurry, ugly"
    assert "the negative prompt has no effect: 'blurry, ugly'" in said(server.run(graph))
    # the usual wiring at cfg 1: nothing is left of the text
    zeroed = json.loads(json.dumps(graph))
    zeroed["zero"] = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["4", 0]}}
    next(node for node in zeroed.values() if node["class_type"] == "PCMKSampler")["inputs"]["negative"] = ["zero", 0]
    assert "negative" not in said(server.run(zeroed))
    next(node for node in graph.values() if node["class_type"] == "PCMKSampler")["inputs"]["cfg"] = 2.0
    assert "negative" not in said(server.run(graph))
    assert "recommends 1; try 1 to 2" in said(server.run(sampler_graph(seed=9, cfg=7.0)))
    lcm = sampler_graph(seed=9)
    loader = next(node for node in lcm.values() if node["class_type"] == "PCMLoraLoader")
    loader["inputs"]["lora_name"] = "AnimateLCM_sd15_t2v_lora.safetensors"
    assert "recommends eta 1" in said(server.run(lcm))


def stock_graph(**changes):
    """ComfyUI's KSampler and its own LoRA loader, with a schedule of the drop-down."""
    graph = build("text_to_image_sd15")
    loader = next(node for node in graph.values() if node["class_type"] == "PCMLoraLoader")
    loader["class_type"] = "LoraLoaderModelOnly"
    loader["inputs"].pop("num_phases")
    sampler = next(node for node in graph.values() if node["class_type"] == "PCMKSampler")
    kept = ("model", "positive", "negative", "latent_image", "seed", "steps", "cfg", "denoise")
    inputs = {name: sampler["inputs"][name] for name in kept}
    inputs |= {"sampler_name": "euler", "scheduler": "pcm_sd15_4"} | changes
    sampler |= {"class_type": "KSampler", "inputs": inputs}
    return graph


def pixels(server, graph):
    run = server.run(graph)
    assert run.status == "success", run.error
    (shown,) = [shown for output in run.outputs.values() for shown in output.get("images", [])]
    return np.asarray(server.picture(shown)).astype(int)


def test_nodes_that_take_names_alone_draw_the_same_picture(server, object_info):
    """Grey levels of the saved file; euler rounds in another order."""
    assert "pcm_sdxl_8" in object_info["KSampler"]["input"]["required"]["scheduler"][0]
    ours, stock = pixels(server, sampler_graph(seed=3)), pixels(server, stock_graph(seed=3))
    assert np.abs(ours - stock).max() <= 1
    assert "asks for a schedule of 80 steps" in server.run(stock_graph(seed=3, steps=8, denoise=0.1)).error
