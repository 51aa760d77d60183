"""The report's own judgements: which is best, what is a tie, and that the kept figures are of the variants it names."""

from __future__ import annotations

import json
from pathlib import Path

import ablate
import pytest
import report

from lora_training.evaluation.__main__ import parse
from pcm_scheduler.lora_file import read_settings


def row(method, steps, frechet, deviation, **more):
    return {"method": method, "steps": steps, "frechet_distance": frechet, "frechet_distance_deviation": deviation} | more


def test_the_best_distilled_method_is_bold_with_what_ties_and_solvers_never_are():
    rows = [row("PCM, 4 phases", 4, 1.0, 0.1), row("LCM", 4, 1.1, 0.1), row("CTM", 4, 1.5, 0.1), row("DDIM", 4, 0.1, 0.1)]
    lines = report.by_steps(rows, "frechet_distance", 1, 1, min).splitlines()[2:]
    assert ["**" in line for line in lines] == [True, True, False, False]
    assert "| **1.0 ± 0.1** |" in lines[0]


@pytest.mark.parametrize(("gap", "tie"), [(0.19, True), (0.21, False)])
def test_a_tie_is_less_than_two_deviations(gap, tie):
    assert report.tied(row("a", 4, 1.0, 0.1), row("b", 4, 1.0 + gap, 0.02), "frechet_distance") is tie


def kept(name, distance, table="distance", **settings):
    steps = {str(k): {"guidance_scale": 1.0, "frechet": distance, "shape_and_colour": 0.9} for k in ablate.STEPS}
    return {"name": name, "table": table, "settings": settings, "steps": steps}


def test_a_setting_is_better_or_worse_by_more_than_training_seeds_are():
    figures = {name: kept(name, d, "objectives") for name, d in (("pcm-4", 1.0), ("pcm-4-seed1", 1.1), ("pcm-4-seed2", 0.9))}
    deviation = report.training_spread(figures, "pcm-4")
    assert deviation["4"] == pytest.approx(0.1)
    rows = [kept("near", 1.15), kept("far", 1.25), kept("good", 0.75)]
    text = report.ablation_table([figures["pcm-4"], *rows], figures["pcm-4"], deviation)
    heads, _, *lines = ([cell.strip() for cell in line.split("|")] for line in text.splitlines())
    verdicts = [cells[heads.index("at 4")] for cells in lines]
    assert verdicts == ["", "tie", "worse", "better"]
    del figures["pcm-4-seed2"]
    assert report.training_spread(figures, "pcm-4") == {}
    assert "worse" not in report.ablation_table([figures["pcm-4"], *rows], figures["pcm-4"], {})


def test_sections_are_written_anew_and_the_others_stay():
    text = "# Title\n\nfirst\n\n## One\n\nold\n\n### Part of one\n\nold too\n\n## Two\n\nkept\n"
    assert report.with_sections(text, {"One": "new"}) == "# Title\n\nfirst\n\n## One\n\nnew\n\n## Two\n\nkept\n"
    assert report.with_sections(text, {"Two": "new"}) == text.replace("kept", "new")
    assert report.split_sections(text) == ("# Title\n\nfirst", {"One": "old\n\n### Part of one\n\nold too", "Two": "kept"})
    with pytest.raises(ValueError, match=r"no section named Three; it has One, Two"):
        report.with_sections(text, {"Three": "new"})


def test_the_document_shows_all_that_is_kept(tmp_path, monkeypatch):
    shown = (report.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    (tmp_path / "results.md").write_text(shown, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["report.py", "--kept", "--out", str(tmp_path)])
    report.main()
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == shown


def test_every_variant_has_a_table_and_a_name_of_its_own():
    variants = ablate.variants()
    assert {variant.table for variant in variants} <= set(report.TABLES)
    assert len({variant.name for variant in variants}) == len(variants)
    identities = [ablate.identity(ablate.configuration(variant)) for variant in variants]
    assert len(set(identities)) == len(identities)  # no setting without effect on the run


def test_the_kept_figures_are_of_the_variants_as_they_are_now():
    by_name = {variant.name: variant for variant in ablate.variants()}
    files = sorted(ablate.FIGURES.glob("*.json"))
    assert files
    for file in files:
        figures = json.loads(file.read_text(encoding="utf-8"))
        assert ablate.figures_of(by_name[file.stem]) == figures, f"{file.name} is of another configuration"


def test_every_row_that_the_report_needs_is_evaluated(monkeypatch):
    monkeypatch.chdir(report.ROOT)
    config = parse(["--config", str(report.CONFIG)])
    drawn = {(method.name, steps) for method in config.methods for steps in method.steps}
    assert {(method, steps) for steps, method in report.MATCHED.items()} <= drawn
    assert {(report.ALONE, steps) for steps in report.STEPS} <= drawn
    assert {*report.TEACHER_RIVALS, *report.DISTILLED_RIVALS} <= {method for method, _ in drawn}


def test_searched_times_are_told_beside_the_even_ones(tmp_path):
    file = tmp_path / "found.json"
    assert report.searched_times(file) == "Not searched yet."
    rows = {times: {"frechet_distance": d, "alignment": 0.5} for times, d in (("default", 0.004), ("found", 0.003))}
    told = {"choices_tried": 7, "timesteps": [999, 379], "default_timesteps": [999, 499], "count": 64, "command": "python -m a"}
    told["precision"] = "bf16"
    file.write_text(json.dumps(told | {"scores": {"searched": rows, "held out": rows}}), encoding="utf-8")
    text = report.searched_times(file)
    assert "7 choices of 2 times" in text
    assert "The UNet in bfloat16." in text
    assert [line.split("|")[3:5] for line in text.splitlines()[-4:]] == [
        [" 999 499 ", " 4.00                      "],
        [" 999 379 ", " 3.00                      "],
    ] * 2


def test_clips_are_judged_beside_every_rival_and_the_teacher(tmp_path):
    assert report.clips(tmp_path / "none.json") == "Not measured yet."

    def clip_row(method, steps, motion):
        figures = {"motion": motion, "motion_deviation": 0.01, "alignment": motion / 2, "alignment_deviation": 0.01}
        return {"method": method, "steps": steps} | figures

    rows = [clip_row(report.ALONE, 1, 0.5), clip_row(report.ALONE, 2, 0.7), clip_row(report.ALONE, 4, 0.8)]
    rows += [clip_row(report.MATCHED[1], 1, 0.6), clip_row(report.MATCHED[2], 2, 0.4)]
    rows += [clip_row("LCM", 1, 0.49), clip_row("LCM", 2, 0.6), clip_row("LCM", 4, 0.9), clip_row("DDIM", 4, 0.1)]
    teacher = {"method": "teacher", "steps": 25, "motion": 0.875, "alignment": 0.5}
    adapter = str(report.HERE / "adapters" / "video_lcm.safetensors")
    methods = [{"name": "LCM", "adapter": adapter, "guidance_scale": None}, {"name": "DDIM", "guidance_scale": 2.0}]
    config = {"precision": "no", "methods": methods, "reference": {"method": {"name": "teacher", "guidance_scale": 3.0}}}
    told = {"config": config, "pictures": 8, "seeds": [0, 1, 2], "rows": rows, "reference": [teacher]}
    (tmp_path / "report.json").write_text(json.dumps(told), encoding="utf-8")
    text = report.clips(tmp_path / "report.json")
    assert "- Motion, one 4-phase adapter among all methods: at 1 tied with LCM; at 2 before LCM; at 4 behind LCM." in text
    assert "- Motion, an adapter for each number of steps among all methods: at 1 before LCM; at 2 behind LCM; at 4" in text
    assert "- Motion at 4 steps: 7.5 points below the teacher's 87.5 % at 25" in text
    assert "| PCM, 4 phases | 2       | 70.0 ± 1.0" in text
    assert f"LCM: {read_settings(Path(adapter)).guidance_scale:g}; DDIM: 2; teacher: 3." in text
