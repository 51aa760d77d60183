"""The whole way from a configuration to a report, on the shipped model and the shapes' own judges."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import tiny_models
import torch
import yaml
from evaluate import ADAPTERS
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import launch

from lora_training.config import ModelConfig
from lora_training.evaluation.__main__ import parse
from lora_training.evaluation.alignment import ScorerConfig
from lora_training.evaluation.config import (
    EvaluationConfig,
    GuidanceConfig,
    NegativeConfig,
    OdeConfig,
    PairConfig,
    ReferenceConfig,
)
from lora_training.evaluation.features import FeatureConfig
from lora_training.evaluation.generation import folder_of
from lora_training.evaluation.methods import Gallery, MethodConfig
from lora_training.evaluation.ode import ode_rows
from lora_training.evaluation.prompts import read_pairs, read_prompts
from lora_training.evaluation.report import is_best, table, write_report
from lora_training.evaluation.run import Evaluation, pictures_of
from pcm_scheduler.lora_file import AdapterSettings, write_kohya
from pcm_scheduler.lora_layouts import to_kohya
from pcm_scheduler.phases import PhaseGrid

from model import HERE, MODEL_DIR, load_pipeline

JUDGES = HERE / "agreement.py"
PROMPTS = ["a red star", "a blue ring on the left", "a green heart", "a yellow cross at the top", "a pink star"]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    pairs = [{"prompt": "a red star and a blue ring", "thing": "a blue ring"}, {"prompt": "a green heart", "thing": "a heart"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return EvaluationConfig(
        model=ModelConfig(path=str(MODEL_DIR)),
        methods=(MethodConfig("PCM", str(ADAPTERS["PCM"]), steps=(1, 4)), MethodConfig("DDIM", scheduler="ddim", steps=(1, 4))),
        prompts=str(tmp_path / "prompts.txt"),
        size=(128, 128),
        batch_size=2,
        reference=ReferenceConfig(method=MethodConfig("reference", scheduler="ddim", steps=(4,), guidance_scale=5.0)),
        features=FeatureConfig("factory", factory=f"{JUDGES}:form_features"),
        similarity=FeatureConfig("factory", factory=f"{JUDGES}:embedding_features"),
        alignment=ScorerConfig("factory", factory=f"{JUDGES}:caption_agreement"),
        guidance=GuidanceConfig(scales=(1.0, 6.0), steps=2, count=2),
        negative=NegativeConfig(str(tmp_path / "pairs.jsonl"), steps=2),
        ode=OdeConfig(count=2, steps=(2, 4), solver_steps=50),
        shown=2,
        output=str(tmp_path / "out"),
    )


def test_a_report_is_drawn_measured_and_written_once(config, tmp_path, monkeypatch):
    evaluation = Evaluation(config)
    report = evaluation.run()
    text = write_report(evaluation, report).read_text()
    rows = {(row["method"], row["steps"]): row for row in report["rows"]}
    assert set(rows) == {("PCM", 1), ("PCM", 4), ("DDIM", 1), ("DDIM", 4)}
    for row in rows.values():
        assert row["frechet_distance"] >= 0
        assert 0 <= row["alignment"] <= 1
        assert 0 <= row["precision"] <= 1
    assert rows["PCM", 4]["frechet_distance"] < rows["DDIM", 1]["frechet_distance"]  # a picture beside a grey blur
    assert "diversity" not in rows["PCM", 4]  # from one noise
    assert [(row["method"], row["steps"]) for row in report["consistency"]] == [("PCM", "1 / 4"), ("DDIM", "1 / 4")]
    assert all(-1 <= row["consistency"] <= 1 for row in report["consistency"])
    assert [(row["method"], row["guidance_scale"]) for row in report["guidance"]] == [
        ("PCM", 1.0), ("PCM", 6.0), ("DDIM", 1.0), ("DDIM", 6.0),
    ]  # fmt: skip
    (reference,) = report["reference"]
    assert (reference["method"], reference["steps"]) == ("reference", 4)
    assert 0 <= reference["alignment"] <= 1
    assert [row["method"] for row in report["negative"]] == ["PCM", "DDIM"]
    assert all(0 <= row["without"] <= 1 and 0 <= row["with_negative"] <= 1 for row in report["negative"])
    two, four = report["ode"]  # DDIM has no adapter
    assert set(four) == {"method", "steps", "ode_error", "at 739", "at 499", "at 239"}
    assert set(two) == {"method", "steps", "ode_error", "at 499"}
    assert 0 < four["ode_error"] < two["ode_error"] < 1
    assert "Frechet distance" in text
    assert "| PCM " in text
    out = tmp_path / "out"
    assert json.loads((out / "report.json").read_text())["rows"] == json.loads(json.dumps(report["rows"]))
    assert Image.open(out / "pictures.png").size == (200 + 2 * 132, 4 * 132)
    assert (out / "frechet_distance.png").is_file()
    assert not list(out.rglob("*.tmp"))

    again = Evaluation(config)
    monkeypatch.setattr(again.gallery, "draw", None)  # pictures are there
    again.draw()
    assert again.measure() == report["rows"]


def test_processes_share_what_is_drawn_to_be_measured(config, tmp_path):
    three = dataclasses.replace(config, seeds=(0, 1, 2))  # of which one process has two
    report = Evaluation(three).run()
    file = tmp_path / "my.yaml"
    file.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(three, output=str(tmp_path / "shared")))))
    two_processes = "examples/accelerate/two_processes_cpu.yaml"
    launch("-m", "lora_training.evaluation", str(file), config_file=two_processes, num_processes=2)
    shared = json.loads((tmp_path / "shared" / "report.json").read_text())
    assert shared.keys() == report.keys()
    for part in ("rows", "guidance", "negative", "ode"):
        assert len(shared[part]) == len(report[part]) > 0
        for row, expected in zip(shared[part], report[part], strict=True):
            assert row == pytest.approx(expected, abs=1e-3), part


def test_an_adapter_sampled_with_noise_is_beside_the_ode_in_one_step_alone(config):
    config.methods = (MethodConfig("LCM", str(ADAPTERS["LCM"]), steps=(1, 4)),)
    config.ode = OdeConfig(count=1, steps=(1, 4), solver_steps=10)
    gallery = Gallery(load_pipeline(MODEL_DIR), config.methods)
    (row,) = ode_rows(gallery, config, ["a red circle"], 0, torch.device("cpu"))
    assert (row["method"], row["steps"]) == ("LCM", 1)
    assert 0 < row["ode_error"] < 2


def test_the_ode_is_that_of_an_adapters_own_betas(config, tmp_path):
    """Beside an adapter of other betas too, which drew last."""
    grid, methods = PhaseGrid.even(2, 4), []
    for name in ("scaled_linear", "linear"):
        settings = AdapterSettings("sd15", grid.edges, 4, beta_schedule=name, beta_start=0.00085, beta_end=0.012)
        path = tmp_path / f"{name}.safetensors"
        write_kohya(path, tiny_models.random_lora(tiny_models.image_unet()), settings, name)
        methods.append(MethodConfig(name, str(path), steps=(2,)))
    config.ode, config.size = OdeConfig(count=1, steps=(2,), solver_steps=4), (16, 16)

    def measured(*methods):
        config.methods = methods
        gallery = Gallery(tiny_models.image_pipeline(), methods)
        gallery.put_in_place(methods[-1].name)
        return [row["ode_error"] for row in ode_rows(gallery, config, ["a cat"], 0, torch.device("cpu"))]

    own, other = measured(methods[0]), measured(methods[1])
    assert own != other
    assert measured(*methods) == own + other
    assert measured(*reversed(methods)) == other + own


def test_the_ode_is_measured_a_batch_at_a_time(config, tmp_path, monkeypatch):
    grid, path = PhaseGrid.even(2, 4), tmp_path / "adapter.safetensors"
    write_kohya(path, tiny_models.random_lora(tiny_models.image_unet()), AdapterSettings("sd15", grid.edges, 4), "PCM")
    config.methods = (MethodConfig("PCM", str(path), steps=(2,)),)
    config.ode, config.size = OdeConfig(count=3, steps=(2,), solver_steps=4), (16, 16)
    gallery = Gallery(tiny_models.image_pipeline(), config.methods)
    drawn, noise = [], gallery.noise
    monkeypatch.setattr(gallery, "noise", lambda numbers, *told: drawn.append(list(numbers)) or noise(numbers, *told))
    rows = []
    for config.batch_size in (2, 16):
        rows += ode_rows(gallery, config, ["a cat", "a dog", "two cats", "two dogs"], 0, torch.device("cpu"))
    assert drawn == [[0, 1], [2], [0, 1, 2]]
    apart, together = ({name: row[name] for name in ("ode_error", "at 499")} for row in rows)
    assert apart == pytest.approx(together, rel=1e-4)


def test_several_noises_give_means_and_spreads(config):
    config.guidance, config.ode, config.alignment, config.reference.folder = GuidanceConfig(), OdeConfig(), None, ""
    config.negative = NegativeConfig()
    config.pairs = (PairConfig("DDIM", "PCM", (1, 4)),)
    one, other = ([], [])
    for seeds, found in (((3,), one), ((4,), other)):
        config.seeds = seeds
        evaluation = Evaluation(config)
        evaluation.draw()
        found += [evaluation.measure(), evaluation.consistency()]
    config.seeds = (3, 4)
    both = Evaluation(config)
    both.gallery.draw = None  # the same pictures
    both.draw()
    for a, b, row in zip(one[0], other[0], both.measure(), strict=True):
        for name in ("frechet_distance", "precision"):
            assert row[name] == pytest.approx((a[name] + b[name]) / 2)
            assert row[f"{name}_deviation"] == pytest.approx(abs(a[name] - b[name]) / 2**0.5, abs=1e-12)
        assert 0 < row["diversity"] < 1
    pair = both.consistency()[-1]
    assert (pair["method"], pair["steps"]) == ("DDIM / PCM", "1 / 4")
    assert pair["consistency"] == pytest.approx((one[1][-1]["consistency"] + other[1][-1]["consistency"]) / 2)


def test_noises_and_pairs_that_cannot_be_are_refused(config):
    for change, words in (
        ({"seeds": (1, 1)}, "each once"),
        ({"seeds": ()}, "at least one"),
        ({"seeds": (0, 1000)}, "noise of its own"),
        ({"guidance": GuidanceConfig(methods=("LCM",))}, "LCM not among methods, which are PCM, DDIM"),
        ({"pairs": (PairConfig("PCM", "DDIM", (1, 8)),)}, "no method 'DDIM' at 8"),
        ({"count": -1}, "count must be 0 or more"),
        ({"count": 1}, "need more pictures"),
        ({"shown": -1}, "shown must be 0 or more"),
        ({"guidance": GuidanceConfig(scales=(2.0,), count=0)}, r"guidance\.count must be positive"),
        ({"negative": NegativeConfig("pairs.jsonl", guidance_scale=1.0)}, r"negative\.guidance_scale must be above 1"),
        ({"reference": ReferenceConfig(method=MethodConfig("reference", steps=(4, 8)))}, "one number of steps"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(config, **change)


def test_the_reference_may_be_a_folder_of_pictures(config, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(4):
        noise = torch.randint(0, 256, (128, 128, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
    turned = Image.new("RGB", (400, 256), "white")  # its right third is black, which is its lower third once it is upright
    turned.paste("black", (267, 0, 400, 256))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "photograph.jpg", exif=exif, quality=95)
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(folder / "transparent.png")
    config.reference.folder = str(folder)
    evaluation = Evaluation(config)
    found = torch.cat(list(evaluation.reference()))
    assert found.shape == (6, 3, 128, 128)
    photograph, transparent = found[4:]
    assert photograph[:, :80].min() > 0.9
    assert photograph[:, -16:].max() < -0.9
    assert transparent.min() == 1
    for name, error, says in (("nothing", FileNotFoundError, "there is no folder"), ("empty", ValueError, "has 0 pictures")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        config.reference.folder = str(tmp_path / name)
        with pytest.raises(error, match=says):
            Evaluation(config)


def test_prompts_come_in_the_forms_that_people_have_them(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')
    (tmp_path / "list.json").write_text('["one", {"caption": "two"}]')
    coco = {
        "annotations": [{"image_id": 7, "caption": "one "}, {"image_id": 7, "caption": "x"}, {"image_id": 3, "caption": "two"}]
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    for name in ("a.txt", "a.jsonl", "list.json", "coco.json"):
        assert read_prompts(str(tmp_path / name)) == ["one", "two"], name
        assert read_prompts(str(tmp_path / name), 1) == ["one"]
    with pytest.raises(ValueError, match="has 2, and count is 3"):
        read_prompts(str(tmp_path / "a.txt"), 3)
    with pytest.raises(ValueError, match="no file"):
        read_prompts(str(tmp_path / "b.txt"))
    (tmp_path / "odd.jsonl").write_text('{"words": "one"}\n')
    with pytest.raises(ValueError, match="no prompt or no thing"):
        read_pairs(str(tmp_path / "odd.jsonl"))
    with pytest.raises(ValueError, match="has none of prompt"):
        read_prompts(str(tmp_path / "odd.jsonl"))


def test_tables_mark_the_best_of_each_number_of_steps():
    rows = [
        {"method": "a", "steps": 1, "frechet_distance": 2.0, "diversity": 0.1},
        {"method": "b", "steps": 1, "frechet_distance": 1.0, "diversity": 0.2},
        {"method": "a", "steps": 2, "frechet_distance": 3.0, "kernel_distance": 1.0, "kernel_distance_deviation": 0.5},
    ]
    assert [is_best("frechet_distance", row, rows) for row in rows] == [False, True, False]  # alone is not best
    assert not is_best("diversity", rows[1], rows)  # more is not simply better
    text = table(rows)
    assert "**1**" in text
    assert "1 ± 0.5" in text
    assert "deviation" not in text


def test_what_is_missing_is_said_before_anything_is_drawn(config, tmp_path):
    config.alignment, config.negative = ScorerConfig("clip", path=str(tmp_path / "no_clip")), NegativeConfig()
    with pytest.raises(FileNotFoundError, match="no_clip"):
        Evaluation(config)
    with pytest.raises(ValueError, match="at least one"):
        EvaluationConfig()


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"negative": NegativeConfig("nowhere.jsonl")}, "negative.pairs: there is no file"),
        ({"ode": OdeConfig(count=2, solver_steps=40)}, "ode.solver_steps"),
        ({"guidance": GuidanceConfig(scales=(1.0, 3.0), steps=64)}, "Method PCM cannot be sampled in 64 steps: "),
        ({"guidance": GuidanceConfig(scales=(0.0, 1.0))}, "guidance.scales must be 1 or more.* got 0"),
        ({"methods": (MethodConfig("TCD", scheduler="tcd", steps=(4, 64)),)}, "Method TCD cannot be sampled in 64 steps: "),
        ({"alignment": ScorerConfig("clip", path="weights/clip")}, "negative.threshold: say above which score of clip"),
        ({"alignment": ScorerConfig("aesthetic", path="weights/clip")}, "aesthetic sees no text"),
        ({"ode": OdeConfig(count=2, steps=(2, 60), solver_steps=50)}, "ode.steps must be from 1 to 50 for PCM; got 60"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_drawn(config, part, says):
    with pytest.raises(ValueError, match=says):
        Evaluation(dataclasses.replace(config, **part))


def test_a_thing_that_the_judge_does_not_know_is_refused_before_anything_is_drawn(config, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a red star", "thing": "fog"}))
    with pytest.raises(ValueError, match="fog"):
        Evaluation(config)


def test_what_was_measured_is_kept_when_a_later_part_fails(config, tmp_path, monkeypatch):
    config.methods = (MethodConfig("PCM", str(ADAPTERS["PCM"]), steps=(2,)),)
    config.features = config.similarity = None
    config.guidance, config.ode = GuidanceConfig(), OdeConfig()
    evaluation = Evaluation(config)

    def break_down():
        raise ValueError("the judge broke down")

    monkeypatch.setattr(evaluation, "negative", break_down)
    with pytest.raises(ValueError, match="broke down"):
        evaluation.run()
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["method"] for row in kept["rows"]] == ["PCM"]
    assert kept["consistency"] == []  # there is nothing to see it by
    assert "negative" not in kept


def test_pictures_of_a_model_that_was_trained_again_are_drawn_again(config, tmp_path):
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    config.model.path = str(tmp_path / "model")
    method = config.methods[0]
    before = pictures_of(config, method, 4, 0).folder
    assert pictures_of(config, method, 4, 0).folder == before
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 0.5 for name, tensor in load_file(file).items()}, file)
    again = pictures_of(config, method, 4, 0).folder
    assert again != before
    scheduler = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    assert pictures_of(config, method, 4, 0).folder not in (before, again)


def test_pictures_of_an_adapter_that_is_told_by_its_name_are_of_that_name(tmp_path):
    lora = to_kohya(tiny_models.random_lora(tiny_models.image_unet()))
    folders = set()
    for name in ("pcm_sd15_smallcfg_4step_converted", "pcm_sd15_normalcfg_8step_converted"):
        save_file(lora, tmp_path / f"{name}.safetensors")
        folders.add(folder_of(tmp_path, MethodConfig("PCM", str(tmp_path / f"{name}.safetensors")), 4, {}))
    assert len(folders) == 2


def test_the_ode_of_an_adapter_that_does_not_state_its_guidance_is_not_guessed(config, tmp_path):
    path = tmp_path / "pcm_sd15_smallcfg_4step_converted.safetensors"
    save_file(to_kohya(tiny_models.random_lora(tiny_models.image_unet())), path)
    config.methods = (MethodConfig("PCM", str(path), steps=(4,)), MethodConfig("Told", str(path), steps=(4,), num_phases=4))
    gallery = Gallery(tiny_models.image_pipeline(), config.methods)
    assert ode_rows(gallery, config, PROMPTS, 0, torch.device("cpu")) == []


def test_what_is_beside_the_ode_is_what_is_drawn(config):
    """The method's own eta, and below guidance 1 the conditional prediction alone, as pipelines have it."""
    told = {"adapter": str(ADAPTERS["PCM"]), "steps": (2,)}
    config.methods = (
        MethodConfig("noisy", eta=1.0, **told),
        MethodConfig("at 0", guidance_scale=0.0, **told),
        MethodConfig("at 1", guidance_scale=1.0, **told),
    )
    config.ode, config.size = OdeConfig(count=1, steps=(2,), solver_steps=50), (32, 32)
    gallery = Gallery(load_pipeline(MODEL_DIR), config.methods)
    rows = {row["method"]: row["ode_error"] for row in ode_rows(gallery, config, PROMPTS, 0, torch.device("cpu"))}
    assert rows.keys() == {"at 0", "at 1"}
    assert rows["at 0"] == rows["at 1"]


def test_a_file_and_overrides_make_a_configuration(tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"model:\n  path: {MODEL_DIR}\nmethods:\n- name: DDIM\n  scheduler: ddim\n  steps: [1, 2]\n"
        f"features:\n  kind: factory\n  factory: {JUDGES}:form_features\nprompts: p.txt\n"
    )
    config = parse(["--config", str(tmp_path / "a.yaml"), "--seeds", "[3,4]", "--size", "[128,64]"])
    assert config.methods[0] == MethodConfig("DDIM", scheduler="ddim", steps=(1, 2))
    assert (config.seeds, config.size, config.features.kind) == ((3, 4), (128, 64), "factory")


@pytest.mark.parametrize("path", sorted((HERE.parent / "evaluation").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_that_ship_can_be_read(path, monkeypatch, tmp_path):
    for method in yaml.safe_load(path.read_text())["methods"]:  # some adapters are to be trained first
        adapter = tmp_path / method.get("adapter", "none")
        adapter.parent.mkdir(parents=True, exist_ok=True)
        adapter.touch()
    monkeypatch.chdir(tmp_path)
    assert parse(["--config", str(path)]).methods


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xff\xfe"),
        ("a.jsonl", b"not json"),
        ("a.jsonl", b"[" * 100_000),
        ("a.jsonl", rb'{"prompt": "\ud800"}'),
        ("a.json", b"{"),
        ("a.json", b'{"annotations": 3}'),
        ("a.json", b'{"annotations": [{"caption": "no picture"}]}'),
        ("a.json", b'{"annotations": [{"image_id": 1, "caption": null}]}'),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_with_their_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"prompts: .*{name}"):
        read_prompts(str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"negative\.pairs: .*{name}"):
        read_pairs(str(tmp_path / name))
