"""What goes wrong around a run: full and read-only disks, files that cannot be read, settings that were edited, NaN, clocks."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from accelerate.utils import DistributedType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import losses_of, stop_at, tiny_config, tiny_folder

from lora_training import dry_run, loop, train
from lora_training.backbones import Backbone
from lora_training.checkpoint import NotFinite, differences, save_checkpoint
from lora_training.data import stream
from lora_training.evaluation.alignment import ScorerConfig, load_scorer
from lora_training.evaluation.features import FeatureConfig, load_features
from lora_training.evaluation.methods import Gallery, MethodConfig
from lora_training.files import CannotWrite, check_writable, replaced, write_text
from lora_training.loop import Interrupted, Run, run
from lora_training.objectives import ConsistencyObjective
from pcm_scheduler import read_settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def unbroken(folder):
    return load_file(run(tiny_config(folder, folder / "unbroken.safetensors")))


def same(path, expected):
    found = load_file(path)
    return found.keys() == expected.keys() and all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def full_disk(monkeypatch, name):
    """No room for files with this in their name; what was written of them is there, as on a real disk."""

    def save(tensors, path, metadata=None):
        if name in Path(path).name:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_file(tensors, path, metadata)

    monkeypatch.setattr("pcm_scheduler.lora_file.save_file", save)


def test_a_second_run_of_the_same_output_is_refused_before_it_encodes_and_while_the_first_one_goes_on(
    folder, unbroken, tmp_path, monkeypatch
):
    monkeypatch.setattr("lora_training.files._PATIENCE", 0.1)
    output = tmp_path / "one.safetensors"
    first, late = (Run(tiny_config(folder, output)) for _ in range(2))
    step, refused = first.step, []

    def step_beside_others(number):
        if number == 3:
            for attempt in (lambda: run(tiny_config(folder, output, **{"data.cache": tmp_path / "cache"})), late.train):
                with pytest.raises(CannotWrite, match=r"Another process is writing to .*one\.run\. Wait until it ends, or"):
                    attempt()
                refused.append(number)
        return step(number)

    monkeypatch.setattr(first, "step", step_beside_others)
    assert same(first.train(), unbroken)
    assert refused == [3, 3]
    assert not (tmp_path / "cache").exists()
    assert same(late.train(), unbroken), "the folder is free again"


@pytest.mark.parametrize(
    ("name", "goes_on"),
    [
        ("step-00000004", r"goes on from .*step-00000002\.safetensors"),
        ("step-00000002", r"begins again: there is no checkpoint yet, and checkpoint_every is 2"),
        ("full", r"goes on from .*step-00000004\.safetensors"),
    ],
)
def test_a_full_disk_stops_the_run_with_nothing_half_written_and_it_goes_on(
    folder, unbroken, tmp_path, monkeypatch, name, goes_on
):
    config = tiny_config(folder, tmp_path / "full.safetensors")
    with monkeypatch.context() as patch:
        full_disk(patch, name)
        with pytest.raises(RuntimeError, match=rf"{name}.* cannot be written: No space left on device\. Free some.*{goes_on}"):
            run(config)
    assert not list(tmp_path.rglob("*.tmp"))
    assert same(run(config), unbroken)


def test_a_disk_that_is_full_of_latents_keeps_the_shards_that_are_whole(folder, tmp_path, monkeypatch):
    config = tiny_config(folder, tmp_path / "a.safetensors", **{"data.cache": tmp_path / "cache"})
    with monkeypatch.context() as patch:
        full_disk(patch, "shard-000001")
        with pytest.raises(RuntimeError, match=r"shard-000001.* cannot be written: No space left"):
            Run(config)
    (shard,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    stamp = shard.stat().st_mtime_ns
    assert len(Run(config).data) == 8
    assert shard.stat().st_mtime_ns == stamp


def test_memory_that_is_short_while_pictures_are_encoded_says_how_to_encode_fewer(folder, tmp_path, monkeypatch):
    def short(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Backbone, "encode_images", short)
    settings = {"data.cache": tmp_path / "cache"}
    for size, says in ((8, "data.encode_batch_size: 4"), (1, "a smaller data.resolution")):
        with pytest.raises(RuntimeError, match=rf"^Out of memory\. Next to try: {says}\. \(CUDA"):
            Run(tiny_config(folder, tmp_path / "a.safetensors", **settings, **{"data.encode_batch_size": size}))


def test_data_that_are_not_there_are_said_as_before(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^data\.path .* does not exist\.$"):
        Run(tiny_config(folder, tmp_path / "a.safetensors", **{"data.path": tmp_path / "nothing"}))


def in_a_fork(action):
    """What the action returns in a process of its own, as text; limits and rights that it gives up stay there."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = action()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, str(said).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


def test_the_systems_own_limit_on_files_is_named_and_the_old_file_stays(tmp_path):
    resource = pytest.importorskip("resource")
    path, parameter = tmp_path / "step-00000001.safetensors", torch.nn.Parameter(torch.ones(100_000))
    optimizer = torch.optim.AdamW([parameter])
    save_checkpoint(path, {"p": parameter}, optimizer, 1)
    before = path.read_bytes()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save_checkpoint(path, {"p": parameter}, optimizer, 2)

    said = in_a_fork(limited)
    assert said.startswith(f"CannotWrite: {path} cannot be written: File too large."), said
    assert "ulimit -f" in said
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "load_backbone", lambda config: pytest.fail("the model was loaded first"))
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.safetensors").mkdir()
    for output, says in (
        (tmp_path / "file" / "a.safetensors", "Not a directory.*choose a folder"),
        (tmp_path / "taken.safetensors", "Is a directory"),
    ):
        with pytest.raises(CannotWrite, match=rf"{output} cannot be written: {says}"):
            Run(tiny_config(folder, output))

    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(CannotWrite, match=r"Read-only file system\. It is read-only: choose a folder"):
        Run(tiny_config(folder, tmp_path / "b.safetensors"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.safetensors"]


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    def as_nobody():
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        check_writable(Path("/proc/output/a.safetensors"))

    assert "CannotWrite: /proc/output/a.safetensors cannot be written: " in in_a_fork(as_nobody)
    check_writable(tmp_path / "not" / "yet" / "there.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_it_in_a_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(train, "parse", lambda: tiny_config(folder, tmp_path / "a.safetensors"))
    full_disk(monkeypatch, "step-")
    with pytest.raises(SystemExit, match=r"^train\.py: .*No space left on device"):
        train.main()


def test_what_is_there_stays_when_its_replacement_fails(tmp_path):
    path = tmp_path / "report.md"
    write_text(path, "old")

    def half_write():
        with replaced(path) as temporary:
            temporary.write_text("ne")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CannotWrite, match="No space"):
        half_write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_data_that_cannot_be_read_any_more_stop_the_run_and_it_goes_on(folder, tmp_path, monkeypatch, streaming):
    """In a stream by the thread that encodes ahead."""
    settings = {"data.streaming": streaming}
    expected = load_file(run(tiny_config(folder, tmp_path / "whole.safetensors", **settings)))
    config = tiny_config(folder, tmp_path / "broken.safetensors", **settings)
    owner = stream.StreamingData if streaming == "true" else loop.TrainingData
    name = "_encode_next" if streaming == "true" else "draw"
    original, calls = getattr(owner, name), iter(range(100))

    def fails(self, *arguments):
        if next(calls) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "pictures/7.png")
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(
            RuntimeError, match=r"Input/output error: 'pictures/7\.png'\. The same command goes on from .*00002"
        ):
            run(config)
    assert same(run(config), expected)


def interrupted(config, monkeypatch, step=3):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted):
            run(config)


def test_settings_that_were_edited_are_listed_and_refused_by_name(folder, unbroken, tmp_path, monkeypatch, capsys):
    config = tiny_config(folder, tmp_path / "a.safetensors")
    interrupted(config, monkeypatch)
    edited = tiny_config(
        folder, tmp_path / "a.safetensors", **{"optimizer.weight_decay": 0.5, "lora.rank": 3, "checkpoint_every": 1}
    )
    with pytest.raises(ValueError, match="other settings") as refused:
        run(edited)
    said = str(refused.value)
    assert "optimizer.weight_decay: 0.001 in the checkpoint, 0.5 now" in said
    assert "lora.rank: 2 in the checkpoint, 3 now" in said
    assert "checkpoint_every" not in said, "which may change"
    assert "resume: no" in said
    capsys.readouterr()
    allowed = tiny_config(
        folder,
        tmp_path / "a.safetensors",
        **{"checkpoint_every": 1, "validation.seed": 7, "data.encode_batch_size": 2, "sampling.guidance_scale": 1.5},
    )
    assert same(run(allowed), unbroken)
    assert read_settings(allowed.output).guidance_scale == 1.5
    said = capsys.readouterr().err
    for line in ("after step 4", "checkpoint_every: 2 in the checkpoint, 1 now", "validation.seed: 0 in the checkpoint, 7 now"):
        assert line in said
    assert "learning_rate:" not in said


def test_what_a_stopped_run_advises_to_change_may_change(folder, unbroken, tmp_path, monkeypatch, capsys):
    """A loss that is not finite says to lower the learning rate, and where the last good state is."""
    config = tiny_config(folder, tmp_path / "a.safetensors")
    interrupted(config, monkeypatch)
    lower = tiny_config(folder, tmp_path / "a.safetensors", **{"optimizer.learning_rate": 1e-4, "data.max_bad_share": 0.5})
    capsys.readouterr()
    assert not same(run(lower), unbroken)
    assert "optimizer.learning_rate: 0.001 in the checkpoint, 0.0001 now" in capsys.readouterr().err


def test_differences_are_of_what_json_keeps():
    then = {"a": {"b": [1, 2], "c": None}, "gone": 1}
    assert differences(then, {"a": {"b": (1, 2), "c": None}, "gone": 1}) == {}
    assert differences(then, {"a": {"b": (1, 3), "c": 0}, "new": "x"}) == {
        "a.b": ("[1, 2]", "[1, 3]"), "a.c": ("null", "0"), "gone": ("1", "not set"), "new": ("not set", '"x"'),
    }  # fmt: skip
    assert differences(then, then | {"new": "x"}, {"new": "x", "gone": 2}) == {}


def forget(checkpoint, group, *names):
    """As an earlier release wrote it, which had no such settings."""
    with safe_open(checkpoint, framework="pt") as file:
        told = file.metadata()
    settings = json.loads(told["run"])
    for name in names:
        del settings[group][name]
    save_file(load_file(checkpoint), checkpoint, told | {"run": json.dumps(settings)})


def test_a_checkpoint_of_an_earlier_release_is_gone_on_from_unless_a_newer_setting_is_used(
    folder, unbroken, tmp_path, monkeypatch
):
    config = tiny_config(folder, tmp_path / "a.safetensors")
    interrupted(config, monkeypatch)
    [*_, newest] = sorted((tmp_path / "a.run" / "checkpoints").iterdir())
    forget(newest, "objective", "starts", "trajectories_kept", "trajectory_every")
    forget(newest, "optimizer", "gradient_accumulation")
    used = tiny_config(
        folder, tmp_path / "a.safetensors", **{"objective.starts": "teacher", "optimizer.gradient_accumulation": 2}
    )
    with pytest.raises(ValueError, match="other settings") as refused:
        run(used)
    said = str(refused.value)
    assert 'objective.starts: "data" in the checkpoint, "teacher" now' in said
    assert "optimizer.gradient_accumulation: 1 in the checkpoint, 2 now" in said
    assert "trajectories_kept" not in said
    assert same(run(config), unbroken)


def test_a_run_that_begins_anew_does_not_meet_an_earlier_ones_checkpoints(folder, unbroken, tmp_path, monkeypatch, capsys):
    config = tiny_config(folder, tmp_path / "a.safetensors", checkpoints_kept=1)
    interrupted(config, monkeypatch, step=4)
    anew = dataclasses.replace(config, resume="no")
    interrupted(anew, monkeypatch, step=1)
    assert "checkpoints-before-1" in capsys.readouterr().out
    checkpoints = tmp_path / "a.run" / "checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["step-00000002.safetensors"]
    aside = checkpoints.with_name("checkpoints-before-1")
    assert [p.name for p in aside.iterdir()] == ["step-00000005.safetensors"]
    assert same(run(config), unbroken)


def test_a_step_that_is_validated_twice_has_one_row(folder, tmp_path, monkeypatch):
    config = tiny_config(folder, tmp_path / "a.safetensors", **{"validation.every": 1})
    with monkeypatch.context() as patch:
        full_disk(patch, "step-00000004")
        with pytest.raises(RuntimeError):
            run(config)
    run(config)
    with (tmp_path / "a.run" / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 7)]
    assert all(float(row["validation_loss"]) >= 0 for row in rows)


@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_a_gradient_that_is_not_finite_changes_nothing(folder, tmp_path, adversarial):
    """The loss may be finite all the same, and with clipping one such number would make all of them NaN."""
    config = tiny_config(folder, tmp_path / "a.safetensors", **{"adversarial.weight": adversarial, "adversarial.width": 16})
    training = Run(config)
    training.step(0)
    judged = training.critic.parameters if training.critic else training.student.parameters
    victim = next(p for p in judged.values() if p.grad is not None)
    before = {name: p.detach().clone() for name, p in training.parameters.items()}
    hook = victim.register_hook(lambda gradient: gradient * float("nan"))
    assert torch.tensor(training.step(1)).isnan()
    assert all(torch.equal(p, before[name]) for name, p in training.parameters.items())
    hook.remove()
    assert torch.tensor(training.step(1)).isfinite()
    assert not all(torch.equal(p, before[name]) for name, p in training.parameters.items())


def test_steps_that_are_skipped_are_said_with_their_number(folder, tmp_path, monkeypatch, capsys):
    original, calls = ConsistencyObjective.losses, iter(range(100))

    def sometimes_nan(self, *batch):
        factor = float("nan") if next(calls) in (2, 3) else 1
        return {name: loss * factor for name, loss in original(self, *batch).items()}

    monkeypatch.setattr(ConsistencyObjective, "losses", sometimes_nan)
    run(tiny_config(folder, tmp_path / "a.safetensors"))
    said = capsys.readouterr().err
    assert "step 2: the loss or its gradient is not finite; skipped" in said
    assert "step 3:" not in said, "once for those in a row"


def test_weights_that_are_not_finite_are_never_written(folder, tmp_path, monkeypatch):
    """Neither into a checkpoint, nor into a file in fp16 that could not hold them; the last good state is named."""
    step, poison = Run.step, {"at": 3, "value": float("nan")}

    def poisoned(self, number):
        loss = step(self, number)
        if number == poison["at"]:
            next(iter(self.parameters.values())).data[0] = poison["value"]
        return loss

    monkeypatch.setattr(Run, "step", poisoned)
    config = tiny_config(folder, tmp_path / "a.safetensors")
    with pytest.raises(RuntimeError, match=r"state after step 4 is not written.*weight/.*step-00000002"):
        run(config)
    assert [p.name for p in (tmp_path / "a.run" / "checkpoints").iterdir()] == ["step-00000002.safetensors"]
    poison |= {"at": 5, "value": 1e5}
    with pytest.raises(RuntimeError, match=r"a\.safetensors, in fp16, is not written.*lora_A.*step-00000004"):
        run(config)
    assert not (tmp_path / "a.safetensors").exists()
    parameter = torch.nn.Parameter(torch.tensor([float("inf")]))
    with pytest.raises(NotFinite, match=r"1 of its 1 tensors.*weight/p"):
        save_checkpoint(tmp_path / "c.safetensors", {"p": parameter}, torch.optim.AdamW([parameter]), 1)


def test_pictures_of_nothing_are_said(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "fixed_loss", lambda *arguments: float("nan"))
    run(tiny_config(folder, tmp_path / "a.safetensors"))
    assert "after step 6: validation_loss is nan" in capsys.readouterr().err


def test_a_run_stops_between_the_batches_of_a_long_step(folder, tmp_path, monkeypatch):
    """A launcher of several processes kills what has not stopped half a minute after it was asked to."""
    batches = {"optimizer.gradient_accumulation": 4, "optimizer.steps": 3}
    whole = load_file(run(tiny_config(folder, tmp_path / "whole.safetensors", **batches)))
    config = tiny_config(folder, tmp_path / "a.safetensors", **batches)
    with monkeypatch.context() as patch:
        seen = []
        original = ConsistencyObjective.losses
        patch.setattr(ConsistencyObjective, "losses", lambda *given: seen.append(0) or original(*given))
        stop_at(patch, 5)  # the second batch of step 1
        with pytest.raises(Interrupted, match="after step 1;"):
            run(config)
    assert len(seen) == 6
    run(config)
    assert same(config.output, whole)


def test_a_run_stops_between_the_rows_of_a_sheet(folder, tmp_path, monkeypatch):
    looked = {"validation.every": 2, "validation.steps": "[1, 2, 4]"}
    whole = load_file(run(tiny_config(folder, tmp_path / "whole.safetensors", **looked)))
    config = tiny_config(folder, tmp_path / "a.safetensors", **looked)
    rows, draw = [], Backbone.sample_latents
    with monkeypatch.context() as patch:

        def asked(self, *given, **call):
            rows.append(call["num_inference_steps"])
            os.kill(os.getpid(), signal.SIGTERM)
            return draw(self, *given, **call)

        patch.setattr(Backbone, "sample_latents", asked)
        with pytest.raises(Interrupted, match="after step 2;"):
            run(config)
    assert rows == [1]
    assert not list((tmp_path / "a.run").rglob("*.png"))
    run(config)
    assert same(config.output, whole)


def test_a_run_that_is_asked_to_stop_in_its_last_step_ends_whole(folder, tmp_path, monkeypatch):
    config = tiny_config(folder, tmp_path / "a.safetensors")
    stop_at(monkeypatch, 5)
    run(config)
    assert (tmp_path / "a.run" / "samples" / "step-00000006.png").is_file()  # which the card shows


def test_another_number_of_processes_is_said(folder, tmp_path, monkeypatch, capsys):
    """The batch is another one then. A checkpoint of two processes, gone on with in one."""
    config = tiny_config(folder, tmp_path / "a.safetensors")
    stopped = Run(config)
    told = stopped.checkpoints.told
    of_two = dataclasses.replace(told, settings=told.settings | {"num_processes": 2})
    stopped.checkpoints = dataclasses.replace(stopped.checkpoints, told=of_two)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            stopped.train()
    run(config)
    assert "num_processes: 2 in the checkpoint, 1 now" in capsys.readouterr().err


def test_an_fsdp_that_takes_one_precision_only_is_said(folder, tmp_path, monkeypatch):
    """As torch 2.6 and 2.7 assert it at the first step, on GPUs alone: networks of a CPU are in float32."""

    def refused(self, step):
        raise AssertionError("FSDP expects uniform original parameter dtype but got {torch.float32, torch.bfloat16}")

    monkeypatch.setattr(Run, "step", refused)
    with pytest.raises(RuntimeError, match=r"one precision, .*in no\. Take a newer torch.*begins again"):
        run(tiny_config(folder, tmp_path / "a.safetensors"))


def test_fp16_losses_are_unscaled_once_under_fsdp(folder, tmp_path, monkeypatch):
    """Accelerate's clipping does it a second time there, which torch refuses. FSDP itself wants two processes."""
    plain = Run(tiny_config(folder, tmp_path / "a.safetensors"))
    plain.step(0)
    monkeypatch.setenv("FSDP_VERSION", "2")
    training = Run(tiny_config(folder, tmp_path / "a.safetensors"))
    before = {name: p.detach().clone() for name, p in training.parameters.items()}
    accelerator = training.accelerator
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=64.0), True
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    accelerator._optimizers.clear()
    training.optimizer = accelerator.prepare_optimizer(training.optimizer.optimizer)
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.FSDP)
    assert math.isfinite(training.step(0))
    assert training.figures["grad_norm"] == pytest.approx(plain.figures["grad_norm"], rel=1e-2)  # of fp16
    assert any(not torch.equal(p, before[name]) for name, p in training.parameters.items())


def test_a_clock_that_jumps_changes_nothing(folder, unbroken, tmp_path, monkeypatch, capsys):
    """A year back and forth at every look; the dry run's pace is of another clock."""
    now, looks = time.time, iter(range(10**9))
    jumping = lambda: now() + (-1) ** next(looks) * 3e7  # noqa: E731
    for place in ("time.time", "tqdm.std.time"):
        monkeypatch.setattr(place, jumping)
    losses = losses_of(monkeypatch)
    assert same(run(tiny_config(folder, tmp_path / "a.safetensors")), unbroken)
    assert len(losses) == 6
    dry_run.dry_run(Run(tiny_config(folder, tmp_path / "b.safetensors")))
    assert "the run takes 0:0" in capsys.readouterr().out


def test_another_process_that_ended_is_named_as_the_cause(folder, tmp_path, monkeypatch):
    training = Run(tiny_config(folder, tmp_path / "a.safetensors"))
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"

    def broken(step):
        raise RuntimeError(gloo)

    training.step = broken
    with pytest.raises(RuntimeError, match=r"^\[/pytorch"):
        training.train()
    monkeypatch.setattr(type(training.accelerator), "num_processes", 2)
    monkeypatch.setattr(training.accelerator, "reduce", lambda tensor, reduction: tensor)
    with pytest.raises(RuntimeError, match=r"Another process of this run has ended.*its memory.*begins again.*closed by peer"):
        training.train()


def test_a_file_that_is_no_checkpoint_is_named(folder, tmp_path):
    path = tmp_path / "a.run" / "checkpoints" / "step-00000002.safetensors"
    path.parent.mkdir(parents=True)
    for content, says in (({"x": torch.ones(1)}, "not a checkpoint of this trainer"), (None, "cannot be read")):
        if content:
            save_file(content, path)
        else:
            path.write_bytes(b"")
        with pytest.raises(ValueError, match=rf"step-00000002\.safetensors.* {says}"):
            run(tiny_config(folder, tmp_path / "a.safetensors"))


def test_pictures_that_are_not_finite_are_not_kept():
    pipe = tiny_models.image_pipeline()
    pipe.set_progress_bar_config(disable=True)
    gallery = Gallery(pipe, [MethodConfig("plain", scheduler="pcm", steps=(1,))])
    assert gallery.draw("plain", 1, ["a cat", "a dog"], [0, 7], (16, 16)).isfinite().all()
    pipe.unet.conv_out.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"plain in 1 steps drew 2 of 2 .*seed 0 such as number 0, 'a cat'.*bf16"):
        gallery.draw("plain", 1, ["a cat", "a dog"], [0, 7], (16, 16))


@pytest.mark.parametrize(("load", "config"), [(load_features, FeatureConfig), (load_scorer, ScorerConfig)])
def test_judges_whose_figures_are_not_finite_are_named(tmp_path, load, config):
    shape = "(len(pictures), 4)" if config is FeatureConfig else "len(pictures)"
    code = f"import torch\ndef broken():\n    return lambda pictures, *texts: torch.zeros({shape}) / 0\n"
    (tmp_path / f"judge_{config.__name__}.py").write_text(code)
    judge = load(config(kind="factory", factory=f"{tmp_path}/judge_{config.__name__}.py:broken"), "cpu", "judges.mine")
    texts = [] if config is FeatureConfig else [["a cat", "a dog"]]
    with pytest.raises(ValueError, match=r"judges\.mine \(factory\) gave .* not finite"):
        judge(torch.zeros(2, 3, 8, 8), *texts)
