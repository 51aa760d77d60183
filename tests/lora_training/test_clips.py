"""Clips: that the frames taken are the frames asked for, in every format, and that what is damaged is named and left out.

Every frame's number is drawn into its brightness, so that what comes back from a file says which frames it is.
"""

from __future__ import annotations

import io
import json
import tarfile
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from lora_training.backbones.sd15 import StableDiffusion15
from lora_training.config import ClipConfig, DataConfig, ModelConfig, TrainConfig
from lora_training.data import clips, latent_cache
from lora_training.data.clips import clip_size, load_clip, window
from lora_training.data.latent_cache import LatentCache
from lora_training.data.sources import Folder, Record, open_source
from lora_training.data.stream import StreamingData
from lora_training.train import parse
from pcm_scheduler import export_clip

av = pytest.importorskip("av")
CPU = torch.device("cpu")
LOWEST, STEP = 8, 6  # brightness of frame 0, and what each one adds


def footage(count=40, size=(64, 64), first=0) -> torch.Tensor:
    levels = torch.arange(first, first + count) * STEP + LOWEST
    return levels.to(torch.uint8)[:, None, None, None].expand(count, 3, *size).contiguous()


def numbers_of(picture) -> list[int]:
    """Which frames a loaded clip is made of."""
    brightness = picture.levels[0].float().mean(dim=(1, 2, 3))
    return ((brightness - LOWEST) / STEP).round().int().tolist()


def data_config(path="", resolution=32, max_bad_share=1.0, **settings) -> DataConfig:
    names = DataConfig.__dataclass_fields__
    own = {k: v for k, v in settings.items() if k in names}
    clip = ClipConfig(**{"start": "first", **{k: v for k, v in settings.items() if k not in names}})
    return DataConfig(path=str(path), resolution=resolution, max_bad_share=max_bad_share, clips=clip, **own)


def taken(path, name="clip", **settings) -> list[int]:
    config = data_config(**settings)
    return numbers_of(load_clip(Record(name, path), (32, 32), config))


def encode_video(path, frames, codec="libx264", fps=8, stamps=None, rotation=None, **options):
    """With keyframes, frame order and times (in milliseconds) of one's own."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={k.replace("_", "-"): str(v) for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[2:], "yuv420p"
        if stamps:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            if stamps:
                picture.pts, picture.time_base = stamps[number], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def numbered(folder, frames, name="{:04d}.png", every=1):
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / name.format(number * every))
    return folder


def captioned(folder, count=6, frames=20, suffix=".mp4", size=(64, 64)):
    """Clip k begins at brightness number k."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        export_clip(footage(frames, size, first=k), folder / f"{k:03d}{suffix}", 8)
        (folder / f"{k:03d}.txt").write_text(f"clip {k}")
    return folder


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return StableDiffusion15(
        StableDiffusionPipeline(
            vae=tiny_models.vae(), text_encoder=CLIPTextModel(tiny_models.text_config()).eval(),
            tokenizer=tiny_models.tokenizer(), unet=UNet2DConditionModel(**tiny_models.BLOCKS, sample_size=8),
            scheduler=DDIMScheduler(**tiny_models.BETAS, clip_sample=False, steps_offset=1),
            safety_checker=None, feature_extractor=None,
        )
    )  # fmt: skip


def encoded(config, backbone, root, processes=1):
    cache = LatentCache(open_source(config), config, backbone, ModelConfig(path="tiny"), root)
    for process in reversed(range(processes)):
        cache.encode(process, processes)
    return cache.open()


# which frames


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
def test_what_is_written_comes_back_frame_by_frame(tmp_path, suffix):
    path = tmp_path / "sub" / f"a{suffix}"
    export_clip(footage(40), path, fps=12.5)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    picture = load_clip(Record("", path), (64, 64), data_config(frames=40))
    assert picture.levels.shape == (1, 40, 3, 64, 64)
    assert numbers_of(picture) == list(range(40))
    assert (picture.levels[0].int() - footage(40).int()).abs().max() <= 3
    assert clip_size(Record("", path.read_bytes())) == picture.original_size == (64, 64)
    with clips._footage(Record("", path)) as found:
        assert found.times == pytest.approx([n / 12.5 for n in range(40)], abs=1e-9)


def test_gif_frame_times_are_rounded_without_drift(tmp_path):
    export_clip(footage(40), tmp_path / "a.gif", fps=24)
    with clips._footage(Record("", tmp_path / "a.gif")) as found:
        assert found.times == pytest.approx([n / 24 for n in range(40)], abs=0.005 + 1e-9)


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"frames": 4}, [0, 1, 2, 3]),
        ({"frames": 4, "stride": 5}, [0, 5, 10, 15]),
        ({"frames": 4, "start": "middle"}, [18, 19, 20, 21]),
        ({"frames": 4, "stride": 13, "start": "middle"}, [0, 13, 26, 39]),
        ({"frames": 8, "fps": 4.0}, [0, 2, 4, 6, 8, 10, 12, 14]),
        ({"frames": 8, "fps": 16.0}, [0, 0, 1, 1, 2, 2, 3, 3]),
        ({"frames": 4, "fps": 3.0}, [0, 2, 5, 8]),  # 0, 2.67, 5.33 and 8 frames of 1/8 s
        ({"frames": 4, "skip_seconds": 1.0}, [8, 9, 10, 11]),
        ({"frames": 24, "skip_seconds": 1.0, "start": "middle"}, list(range(8, 32))),
        ({"frames": 4, "skip_seconds": 2.0, "fps": 4.0, "start": "middle"}, [16, 18, 20, 22]),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_stride_rate_start_and_trimming_take_the_frames_they_say(tmp_path_factory, settings, numbers, suffix):
    path = tmp_path_factory.getbasetemp() / f"forty{suffix}"
    if not path.exists():
        export_clip(footage(40), path, 8)
    assert taken(path, **settings) == numbers


def test_windows_of_every_kind_stay_inside_and_reach_both_ends():
    times = [n / 8 for n in range(40)]
    for rule in ({"stride": 3}, {"fps": 8 / 3}):
        config = ClipConfig(frames=5, start="random", **rule)
        drawn = {tuple(window(40, times, config, f"clip {i}")) for i in range(600)}
        assert all(b - a == 3 for numbers in drawn for a, b in pairwise(numbers))
        begins = {numbers[0] for numbers in drawn}
        assert begins >= set(range(27))
        assert begins <= set(range(28))
        assert window(40, times, config, "one") == window(40, times, config, "one")
    assert window(13, None, ClipConfig(frames=5, stride=3, start="random"), "x") == [0, 3, 6, 9, 12], "the only one"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"frames": 41}, "40 frames, too few: 41 frames at stride 1 take 41"),
        ({"stride": 3}, "16 frames at stride 3 take 46"),
        ({"fps": 2.0}, "16 frames at 2 a second take 7.5 s"),
        ({"skip_seconds": 1.6}, "14 of 40 frames after what is skipped"),
        ({"skip_seconds": 9.0}, "0 of 40 frames"),
        ({"skip_seconds": 9.0, "fps": 1.0, "frames": 1}, "0 of 40 frames"),
    ],
)
def test_too_few_frames_are_counted(settings, words):
    with pytest.raises(ValueError, match=words):
        window(40, [n / 8 for n in range(40)], ClipConfig(**settings), "")


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".avi"])
@pytest.mark.parametrize("keyframes", [1, 2, 7, 250])
@pytest.mark.parametrize("bidirectional", [0, 3])
def test_seeking_finds_the_frame_wherever_keyframes_are(tmp_path, suffix, keyframes, bidirectional):
    codec = {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(suffix, "libx264")
    frames = footage(40, (32, 32))
    options = {"g": keyframes} | ({} if codec == "libvpx-vp9" else {"bf": min(bidirectional, 2 if codec == "mpeg4" else 3)})
    quality = {"qmax": 3} if codec == "mpeg4" else {"crf": 10}
    path = encode_video(tmp_path / f"a{suffix}", frames, codec, **options, **quality)
    for first in range(0, 40, 3):
        config = data_config(frames=2, stride=3)
        with clips._footage(Record("", path)) as found:
            assert found.count == 40
            wanted = [first, min(first + 9, 39)]
            levels = [np.asarray(image).mean() for image in found.images(wanted)]
        assert [round((level - LOWEST) / STEP) for level in levels] == wanted
    assert numbers_of(load_clip(Record("", path), (32, 32), config)) == [0, 3]


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    path = encode_video(tmp_path / "long.mp4", footage(40), g=5, bf=0, sc_threshold=0, crf=10)
    decoded = []
    original = clips._from_keyframe

    def counted(*args):
        for frame in original(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(clips, "_from_keyframe", counted)
    assert taken(path, frames=3, stride=10, start="middle") == [10, 20, 30]
    assert len(decoded) == 3, "each is a keyframe"
    decoded.clear()
    assert taken(path, frames=4, start="middle") == [18, 19, 20, 21]
    assert len(decoded) == 7, "15 to 19, and 20 and 21"


@pytest.mark.parametrize("bidirectional", [0, 3])
def test_a_file_that_was_trimmed_between_keyframes_begins_where_it_shows(tmp_path, bidirectional):
    """An MP4 edit list: ten frames come before the beginning, and are there for the decoder alone."""
    path = encode_video(tmp_path / "a.mp4", footage(40), g=250, bf=bidirectional, sc_threshold=0, crf=10)
    with (
        av.open(str(path)) as before,
        av.open(str(tmp_path / "b.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as after,
    ):
        stream = after.add_stream_from_template(before.streams.video[0])
        for packet in before.demux(video=0):
            if packet.size:
                packet.pts -= int(10 / 8 / packet.time_base)
                packet.dts -= int(10 / 8 / packet.time_base)
                packet.stream = stream
                after.mux(packet)
    assert taken(tmp_path / "b.mp4", frames=30) == list(range(10, 40))
    # 3.625 s from the first frame's time to the last's: from 1.3125 s on, which is frame 10 of what is shown
    assert taken(tmp_path / "b.mp4", frames=2, start="middle", fps=1.0) == [20, 28]


def test_uneven_frame_times_are_kept_by_fps_and_not_by_stride(tmp_path):
    """Ten frames for 0.1 s each, then ten for 0.3 s each."""
    durations = [100] * 10 + [300] * 10
    stamps = np.cumsum([0, *durations[:-1]]).tolist()
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in footage(20)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=durations)
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=durations)
    encode_video(tmp_path / "a.mkv", footage(20), stamps=stamps, fps=10, crf=10)
    for suffix in (".gif", ".webp", ".mkv"):
        path = tmp_path / f"a{suffix}"
        assert taken(path, frames=7, fps=5.0, skip_seconds=0.8) == [8, 10, 10, 11, 12, 12, 13], suffix
        assert taken(path, frames=7, stride=2) == [0, 2, 4, 6, 8, 10, 12], suffix


def test_gif_frames_without_a_time_are_shown_as_browsers_do(tmp_path):
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in footage(20)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:])
    assert taken(tmp_path / "a.gif", frames=4, fps=5.0) == [0, 2, 4, 6]


def test_frames_are_upright_with_square_pixels_and_transparency_on_white(tmp_path):
    frames = torch.zeros(4, 3, 32, 64, dtype=torch.uint8)
    frames[:, :, :16, :32] = 255  # top left
    path = encode_video(tmp_path / "a.mp4", frames, crf=1, rotation=90)  # counterclockwise: to the bottom left
    picture = load_clip(Record("", path), (64, 32), data_config(frames=4))
    assert picture.original_size == clip_size(Record("", path)) == (64, 32)
    assert picture.pixels[0, :, :, 36:60, 4:12].min() > 0.9
    assert picture.pixels[0, :, :, 4:28].max() < -0.9

    clear = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)) for _ in range(4)]
    for number, image in enumerate(clear):
        image.putpixel((number, 0), (255, 0, 0, 255))
    for suffix in (".gif", ".webp"):
        clear[0].save(tmp_path / f"c{suffix}", save_all=True, append_images=clear[1:], duration=100, disposal=2)
        picture = load_clip(Record("", tmp_path / f"c{suffix}"), (32, 32), data_config(frames=4))
        assert picture.levels[0, :, :, 8:].min() == 255, suffix

    with av.open(str(tmp_path / "wide.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    assert clip_size(Record("", tmp_path / "wide.mkv")) == (32, 64)


def test_all_frames_are_cropped_and_mirrored_alike(tmp_path):
    ramp = torch.arange(96).mul(2).to(torch.uint8).expand(20, 3, 48, 96).contiguous()
    path = numbered(tmp_path / "a", ramp)
    config = data_config(resolution=48, crop="random", flip=True)
    places = set()
    for name in map(str, range(12)):
        picture = load_clip(Record(name, path), (48, 48), config)
        assert picture.levels.shape == (2, 16, 3, 48, 48)
        assert (picture.levels == picture.levels[:, :1]).all(), "one place for all frames"
        assert picture.levels[0, 0, 0, 0, 0] == 2 * picture.crop[1]
        places.add(picture.crop)
    assert len(places) > 4


# sources


def test_folders_hold_files_and_folders_of_frames(tmp_path):
    data = tmp_path / "data"
    captioned(data, 1)
    numbered(data / "run", footage(18), "frame_{:d}.png")  # 10 comes after 9
    (data / "run.txt").write_text("a run\n")
    numbered(data / "deep" / "walk.v2", footage(16), every=2)
    export_clip(footage(16), data / "deep" / "b.webm", 8)
    Image.new("RGB", (8, 8)).save(data / "preview1.png")  # beside clips: no clip
    entries = {"walk.v2": {"text": "a walk"}, "b.webm": {"caption": "b"}, "lost": {"text": ""}}
    lines = [json.dumps({"file_name": name, **words}) for name, words in entries.items()]
    (data / "deep" / "metadata.jsonl").write_text("\n".join(lines))
    lost, *found = open_source(data_config(data))
    assert "not there" in lost.problem
    assert {r.caption: r.content.name for r in found} == {
        "clip 0": "000.mp4", "a run": "run", "a walk": "walk.v2", "b": "b.webm",
    }  # fmt: skip
    for record in found:
        assert numbers_of(load_clip(record, (32, 32), data_config())) == list(range(16))


def test_a_folder_of_frames_must_be_whole_and_of_one_size(tmp_path):
    folder = numbered(tmp_path / "a", footage(20))
    with pytest.raises(ValueError, match="no times"):
        taken(folder, fps=8.0)
    (folder / "0007.png").unlink()
    with pytest.raises(ValueError, match=r"0006\.png is followed by 0008\.png"):
        taken(folder)
    Image.new("RGB", (32, 16)).save(folder / "0007.png")
    with pytest.raises(ValueError, match="64 x 64 and of 16 x 32"):
        taken(folder)
    (folder / "0007.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"0007\.png cannot be read"):
        taken(folder)


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"holds no clips; looked for \.avi, \.gif"):
        open_source(data_config(tmp_path))
    numbered(tmp_path / "frames", footage(3))
    with pytest.raises(ValueError, match="the folder that this folder is in"):
        open_source(data_config(tmp_path / "frames"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_source(data_config(tmp_path / "nowhere"))


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    from lora_training.data import sources

    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"phased-consistency\[video\]"):
        open_source(data_config(tmp_path))


def test_a_changed_frame_is_another_set_of_data(tmp_path):
    numbered(tmp_path / "a", footage(3))
    (tmp_path / "a.txt").write_text("a")
    before = Folder(tmp_path, clips=True).identity
    assert Folder(tmp_path, clips=True).identity == before
    Image.new("RGB", (70, 64)).save(tmp_path / "a" / "0001.png")
    assert Folder(tmp_path, clips=True).identity != before


def tar_of(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def clip_bytes(tmp_path, first, suffix=".mp4"):
    export_clip(footage(20, first=first), tmp_path / f"member{suffix}", 8)
    return (tmp_path / f"member{suffix}").read_bytes()


def test_tar_shards_give_clips_and_name_what_they_cannot_use(tmp_path):
    pytest.importorskip("webdataset")
    tar_of(tmp_path / "a-00.tar", {"0.mp4": clip_bytes(tmp_path, 0), "0.txt": b"nought"})
    members = {"1.gif": clip_bytes(tmp_path, 1, ".gif"), "1.json": b'{"caption": "one"}', "2.mp4": b"?", "3.txt": b"three"}
    tar_of(tmp_path / "a-01.tar", {**members, "4.png": b"?"})
    records = list(open_source(data_config(tmp_path / "a-{00..01}.tar")))
    good = [r for r in records if not r.problem]
    assert [r.caption for r in good] == ["nought", "one"]
    for first, record in enumerate(good):
        assert numbers_of(load_clip(record, (32, 32), data_config())) == list(range(first, first + 16))
    problems = "\n".join(f"{r.name} {r.problem}" for r in records if r.problem)
    for words in ("2 has no caption", "3 has no clip", "4.png is neither a clip nor a caption"):
        assert words in problems


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_gives_clips(tmp_path, streaming):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"clip": datasets.Video(decode=False), "text": datasets.Value("string")})
    clip = {"bytes": clip_bytes(tmp_path, 3), "path": None}
    datasets.Dataset.from_dict({"clip": [clip, None], "text": ["three", "none"]}, features).to_parquet(tmp_path / "a.parquet")
    first, second = open_source(data_config(tmp_path / "a.parquet", streaming=streaming))
    assert first.caption == "three"
    assert numbers_of(load_clip(first, (32, 32), data_config())) == list(range(3, 19))
    assert "has no clip" in second.problem


# what is damaged


def test_every_kind_of_damage_is_named(tmp_path):
    whole = {suffix: clip_bytes(tmp_path, 0, suffix) for suffix in (".mp4", ".webm", ".gif", ".webp")}
    for suffix, content in whole.items():
        for share in (0.3, 0.6, 0.85):
            with pytest.raises(ValueError, match="cut cannot be used as a clip"):
                load_clip(Record("cut", content[: int(len(content) * share)]), (32, 32), data_config(frames=4))
        with pytest.raises(ValueError, match=r"too few: 21 frames"):
            load_clip(Record("short", content), (32, 32), data_config(frames=21))
        assert suffix
    hurt = bytearray(whole[".mp4"])
    hurt[-60:-20] = bytes(40)  # the head comes first, then the frames
    with pytest.raises(ValueError, match="hurt cannot be used"):
        load_clip(Record("hurt", bytes(hurt)), (32, 32), data_config(frames=20))
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    for content in (b"", b"words", tmp_path / "sound.mkv", tmp_path / "not there.mp4"):
        with pytest.raises(ValueError, match="x cannot be used as a clip"):
            load_clip(Record("x", content), (32, 32), data_config())


def test_what_is_left_out_is_listed_with_its_reason(tmp_path, backbone, capsys):
    folder = captioned(tmp_path / "data", 4)
    (folder / "000.mp4").write_bytes(b"broken")
    export_clip(footage(5), folder / "001.mp4", 8)
    (folder / "002.txt").unlink()
    data = encoded(data_config(folder), backbone, tmp_path / "cache")
    assert data.describe() == "1 captioned clips of 16 frames: 1 of 32 x 32 pixels"
    told = capsys.readouterr().err
    for words in ("3 of 4 clips cannot be used", "000.mp4 cannot be used", "5 frames, too few", "002.mp4 has no caption"):
        assert words in told
    with pytest.raises(ValueError, match=r"3 of 4 clips"):
        encoded(data_config(folder, max_bad_share=0.5), backbone, tmp_path / "cache")


# latents


def test_the_cache_holds_every_frame_of_every_clip_once(tmp_path, backbone, monkeypatch):
    """Whatever the chunks, shards and processes: each frame's latent is what the VAE makes of that frame."""
    folder = captioned(tmp_path / "data", 5)
    captioned(folder / "wide", 3, size=(48, 96))
    settings = {"aspect_buckets": True, "bucket_step": 8, "flip": True, "frames": 6, "stride": 2}
    sizes = []
    original = type(backbone).encode_images
    monkeypatch.setattr(type(backbone), "encode_images", lambda self, x: sizes.append(len(x)) or original(self, x))
    data = encoded(
        data_config(folder, encode_batch_size=4, shard_size=20, **settings), backbone, tmp_path / "cache", processes=2
    )
    assert max(sizes) == 4
    assert len(list(tmp_path.glob("cache/*/shard-*"))) == 3, "8 clips, 3 to a shard of at most 20 frames"
    assert {size: len(bucket) for size, bucket in data.buckets.items()} == {(24, 40): 3, (32, 32): 5}
    assert "8 captioned clips of 6 frames: 3 of 24 x 40, 5 of 32 x 32" in data.describe()
    rows = data.buckets[32, 32].rows(range(5))
    assert rows["latent_means"].shape == (5, 2, 4, 6, 16, 16)
    assert set(rows) == {"latent_means", "conditioning/prompt_embeds"}
    records = [r for r in Folder(folder, clips=True) if r.content.parent == folder]
    for record, means in zip(records, rows["latent_means"], strict=True):
        pixels = load_clip(record, (32, 32), data_config(**settings)).pixels
        for variant in range(2):
            alone, _ = original(backbone, pixels[variant])
            torch.testing.assert_close(means[variant].transpose(0, 1), alone, atol=2e-3, rtol=2e-3)
    told = backbone.encode_prompts([record.caption for record in records])["prompt_embeds"]
    torch.testing.assert_close(rows["conditioning/prompt_embeds"], told, atol=2e-3, rtol=2e-3)

    latents, conditioning = data.draw(3, torch.Generator().manual_seed(0), CPU)
    assert latents.shape in {(3, 4, 6, 16, 16), (3, 4, 6, 12, 20)}
    assert conditioning["prompt_embeds"].shape[0] == 3

    single = encoded(data_config(folder, encode_batch_size=4, shard_size=20, **settings), backbone, tmp_path / "one")
    for size, bucket in single.buckets.items():
        n = range(len(bucket))
        for name, tensor in bucket.rows(n).items():
            assert torch.equal(tensor, data.buckets[size].rows(n)[name]), "the same for one process and for two"


def test_an_encoding_that_was_cut_off_goes_on_where_it_was(tmp_path, backbone, monkeypatch):
    config = data_config(captioned(tmp_path / "data", 6), frames=4, shard_size=8)
    calls = []
    original = latent_cache.encode

    def counted(records, *args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(records)
        return original(records, *args)

    monkeypatch.setattr(latent_cache, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        encoded(config, backbone, tmp_path / "cache")
    calls.clear()
    data = encoded(config, backbone, tmp_path / "cache")
    assert (len(data), len(calls)) == (6, 1), "two of three shards were there"


def test_every_clip_setting_is_another_cache(tmp_path, backbone):
    folder = captioned(tmp_path / "data", 1)

    def name(config):
        return LatentCache(open_source(config), config, backbone, ModelConfig(path="tiny"), tmp_path).folder

    variants = [{}, {"frames": 8}, {"stride": 2}, {"fps": 4.0}, {"start": "random"}, {"skip_seconds": 0.5}]
    assert len({name(data_config(folder, **settings)) for settings in variants}) == len(variants)
    assert name(data_config(folder)) == name(data_config(folder))


@pytest.mark.parametrize("shards", [False, True])
def test_a_stream_of_clips_goes_on_after_a_break(tmp_path, backbone, shards):
    path = tmp_path / "a.tar"
    if shards:
        pytest.importorskip("webdataset")
        tar_of(path, {f"{i}{k}": v for i in range(5) for k, v in ((".mp4", clip_bytes(tmp_path, i)), (".txt", b"words"))})
    else:
        path = captioned(tmp_path / "data", 5)
    config = data_config(path, frames=4, start="random", streaming=True, shuffle_buffer=3, encode_batch_size=3)

    def stream():
        return StreamingData(open_source(config), config, backbone, seed=3)

    straight = stream()
    assert "captioned clips, streamed" in straight.describe()
    batches = [straight.draw(2, torch.Generator().manual_seed(i), CPU)[0] for i in range(5)]
    assert batches[0].shape == (2, 4, 4, 16, 16)
    again = stream()
    again.skip(3, 2)
    assert torch.equal(again.draw(2, torch.Generator().manual_seed(3), CPU)[0], batches[3])


# settings


def test_clip_settings_are_read_and_checked(tmp_path, capsys):
    family = ["--model.family", "animatediff", "--model.motion_adapter", "m"]
    assert parse([]).data.clips is None
    assert parse([*family, "--data.clips", "{}"]).data.clips == ClipConfig()
    assert parse([*family, "--data.clips.frames", "8", "--data.clips.fps", "8"]).data.clips == ClipConfig(frames=8, fps=8.0)
    file = tmp_path / "a.yaml"
    file.write_text("data: {clips: {frames: 24, start: random}}")
    assert parse([*family, "--config", str(file)]).data.clips == ClipConfig(frames=24, start="random")
    for wrong in (["--data.clips.framez", "8"], ["--data.clips", "{framez: 8}"]):
        with pytest.raises(SystemExit):
            parse(wrong)
        assert "Did you mean data.clips.frames?" in capsys.readouterr().err
    refused = {"frames must be 1": {"frames": 0}, "fps must be 0": {"fps": -1.0}, "fps=8 and": {"fps": 8.0, "stride": 2}}
    for words, settings in refused.items():
        with pytest.raises(ValueError, match=rf"data\.clips\.{words}"):
            TrainConfig(
                model=ModelConfig(family="animatediff", motion_adapter="m"), data=DataConfig(clips=ClipConfig(**settings))
            )
