"""Where pictures come from, how they are framed, and that what is encoded once or as it is read reaches training whole."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_training.backbones import load_backbone
from lora_training.config import DataConfig, ModelConfig, TrainConfig
from lora_training.data import latent_cache
from lora_training.data.latent_cache import Bucket, Example, LatentCache, TrainingData
from lora_training.data.pictures import bucket_sizes, load_picture, nearest_bucket, rgb, upright_size
from lora_training.data.sources import Folder, Record, open_source
from lora_training.data.stream import StreamingData

from model import MODEL_DIR

SQUARE = DataConfig(resolution=64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(ModelConfig(path=str(MODEL_DIR)))


def png(size=(96, 96), colour="red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return file.getvalue()


def grey(level: int, size=(64, 64)) -> bytes:
    return png(size, (level, level, level))


def folder_of(path, count=6, size=(96, 96)):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (path / f"{i:03d}.png").write_bytes(grey(20 * i, size))
        (path / f"{i:03d}.txt").write_text(f"picture {i}")
    return path


def tar_of(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def shard_members(numbers) -> dict[str, bytes]:
    return {
        f"{i:04d}.{kind}": content
        for i in numbers
        for kind, content in (("png", grey(10 * i)), ("txt", f"picture {i}".encode()))
    }


def cache_of(source, config, backbone, root):
    return LatentCache(source, config, backbone, ModelConfig(path=str(MODEL_DIR)), root)


def encoded(config, backbone, root):
    cache = cache_of(open_source(config), config, backbone, root)
    cache.encode()
    return cache.open()


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "PNG"])
def test_pictures_of_every_kind_and_shape_are_read(tmp_path, extension):
    Image.new("RGB", (200, 90), (255, 0, 0)).save(tmp_path / f"a.{extension}")
    (tmp_path / "a.txt").write_text("a red picture\n")
    (record,) = Folder(tmp_path)
    assert record.caption == "a red picture"
    picture = load_picture(record, (64, 64), SQUARE)
    assert picture.pixels.shape == (1, 3, 64, 64)
    assert picture.pixels[0, 0].mean() > 0.9
    assert (picture.original_size, picture.crop) == ((90, 200), (0, 39))


def test_transparency_is_white_sixteen_bits_are_not_clipped_and_exif_turns(tmp_path):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_picture(Record("", tmp_path / "clear.png"), (32, 32), SQUARE).pixels.min() == 1
    Image.fromarray(np.full((64, 64), 32768, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert load_picture(Record("", tmp_path / "grey.png"), (32, 32), SQUARE).pixels.mean().abs() < 0.01
    Image.new("L", (64, 64), 255).save(tmp_path / "l.png")
    assert load_picture(Record("", tmp_path / "l.png"), (32, 32), SQUARE).pixels.min() == 1
    turned = Image.new("RGB", (80, 40))
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    record = Record("", tmp_path / "turned.jpg")
    assert load_picture(record, (32, 32), SQUARE).original_size == upright_size(record) == (80, 40)


def test_sixteen_bits_of_grey_have_one_white_however_dark_the_picture_is():
    """A clip that fades to black must not flash white in its last frames."""
    for level, eight in ((65535, 255), (4000, 16), (250, 1), (0, 0)):
        image = rgb(Image.fromarray(np.full((8, 8), level, dtype=np.uint16)))
        assert np.unique(np.asarray(image)).tolist() == [eight]


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return Record("odd", file.getvalue())


def test_pictures_that_are_odd_are_used_as_they_are_or_named():
    with pytest.raises(ValueError, match=r"odd cannot be read as a picture: it is 100000 x 1 pixels: scaled to cover"):
        load_picture(saved(Image.new("1", (1, 100_000)), "PNG"), (64, 64), SQUARE)  # 6 million pixels high
    with pytest.raises(ValueError, match="PostScript"):
        load_picture(saved(Image.new("RGB", (8, 8)), "EPS"), (8, 8), SQUARE)
    with pytest.raises(ValueError, match="not finite"):
        load_picture(saved(Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)), "TIFF"), (8, 8), SQUARE)
    light = Image.fromarray(np.full((8, 8), 0.75, dtype=np.float32))
    assert load_picture(saved(light, "TIFF"), (8, 8), SQUARE).levels.unique().tolist() == [191]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(Image.new("RGB", (80, 40)), "TIFF", exif=exif)
    assert load_picture(turned, (32, 32), SQUARE).original_size == upright_size(turned) == (80, 40)
    entry = struct.pack("<HHHI4s", 1, 0x0112, 2, 2, b"6\0\0\0") + bytes(4)  # a text instead of a number
    said = saved(Image.new("RGB", (9, 5)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + entry)
    assert upright_size(said) == (5, 9)


def test_a_random_crop_of_a_file_whose_name_is_not_utf8(tmp_path):
    record = Record("caf\udce9.png", png((9, 5)))
    assert load_picture(record, (4, 4), DataConfig(crop="random")).levels.shape == (1, 3, 4, 4)


def test_metadata_jsonl_speaks_for_its_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    entries = {"a.png": "text", "sub/b.png": "caption", "c.png": "text"}
    lines = [json.dumps({"file_name": name, key: f"words of {name}"}) for name, key in entries.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    lost, *found = Folder(tmp_path)
    assert [r.caption for r in found] == ["words of a.png", "words of sub/b.png"]
    assert "c.png" in lost.name
    assert "not there" in lost.problem
    (tmp_path / "metadata.jsonl").write_text("not json")
    with pytest.raises(ValueError, match="line 1"):
        Folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"file_name": "a.png", "text": null}', "its text is not text: None"),
        (r'{"file_name": "a.png", "text": "\ud800"}', "surrogates"),
        (r'{"file_name": "a.png", "caption": "a\u0000b"}', "zeros"),
        ('{"file_name": "%s.png", "text": "a"}' % ("a" * 300), "not there"),
        (r'{"file_name": "\ud800.png", "text": "a"}', "not there"),
    ],
)
def test_rows_of_metadata_that_cannot_be_used_are_named(tmp_path, line, says):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    assert says in next(iter(Folder(tmp_path))).problem


@pytest.mark.parametrize("line", ['["text"]', '{"file_name": 3, "text": "a"}', "[" * 100_000, "1" * 5000, '{"text": "a"}'])
def test_rows_of_metadata_that_are_none_are_refused_with_their_line(tmp_path, line):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(f"\n{line}")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2, is not"):
        Folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"metadata\.jsonl is not UTF-8"):
        Folder(tmp_path)


def test_captions_of_other_systems(tmp_path):
    """A byte-order mark is no part of a caption; JSON may hold what Unicode calls a line's end; UTF-16 is named."""
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_bytes("a cat".encode("utf-8-sig"))
    (tmp_path / "b.txt").write_bytes("a cat".encode("utf-16"))
    (tmp_path / "c.txt").write_bytes("a cat".encode("utf-16-le"))
    row = json.dumps({"file_name": "d.png", "text": "a\u2028cat"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row, encoding="utf-8-sig")
    a, b, c, d = Folder(tmp_path)
    assert (a.caption, d.caption) == ("a cat", "a\u2028cat")
    assert "not UTF-8" in b.problem
    assert "not UTF-8" in c.problem


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_source(DataConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="no pictures"):
        open_source(DataConfig(path=str(tmp_path)))
    tar_of(tmp_path / "a.tar", {})
    with pytest.raises(ValueError, match=r"shards/\*\.tar"):
        open_source(DataConfig(path=str(tmp_path)))
    for missing in ("b.tar", "b-{00..03}.tar", "*.parquet", "no/*.tar"):
        with pytest.raises(FileNotFoundError, match="no file"):
            open_source(DataConfig(path=str(tmp_path / missing)))


def test_tar_shards_give_pictures_and_name_what_they_cannot_use(tmp_path):
    pytest.importorskip("webdataset")
    tar_of(tmp_path / "a-00.tar", shard_members(range(3)))
    odd = {"README": b"hello", "x.png": png(), "y.txt": b"words alone", "z.png": png(), "z.json": b'{"caption": "from json"}'}
    tar_of(tmp_path / "a-01.tar", {**odd, "w.bin": b"?"})
    whole = tar_of(tmp_path / "whole.tar", shard_members(range(9, 12))).read_bytes()
    (tmp_path / "a-02.tar").write_bytes(whole[: 2048 + 100])  # cut in the second picture's header
    (tmp_path / "a-03.tar").write_bytes(whole[: 2048 + 600])  # cut in the second picture

    named = (
        *("README is neither", "w.bin is neither", "x has no caption", "y has no picture"),
        *("a-02.tar does not end", "a-03.tar cannot be read"),
    )
    for pattern in ("a-{00..03}.tar", "a-*.tar"):
        records = list(open_source(DataConfig(path=str(tmp_path / pattern))))
        good = [r.caption for r in records if not r.problem]
        assert good[:4] == ["picture 0", "picture 1", "picture 2", "from json"]
        problems = "\n".join(f"{r.name} {r.problem}" for r in records if r.problem)
        for word in named:
            assert word in problems, word


def test_what_else_a_tar_has_beside_its_pictures_is_passed_over(tmp_path):
    """Embeddings, addresses and masks are usual in webdataset's shards."""
    pytest.importorskip("webdataset")
    kinds = {"npy": b"?", "png": png(), "txt": b"words", "url": b"a", "seg.png": png(), "cls": b"7"}
    members = {f"{i}.{kind}": content for i in range(3) for kind, content in kinds.items()}
    path = tar_of(tmp_path / "a.tar", members | {"alone.npy": b"?"})
    records = list(open_source(DataConfig(path=str(path))))
    assert [r.caption for r in records if not r.problem] == ["words"] * 3
    assert [(r.name.split(": ")[1], r.problem) for r in records if r.problem] == [
        ("alone.npy", "is neither a picture nor a caption")
    ]


def test_what_metadata_names_and_is_no_picture_by_its_name_is_listed(tmp_path):
    rows = [{"file_name": name, "text": "words"} for name in ("a.png", "b.jfif", "c.raw")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for row in rows:
        (tmp_path / row["file_name"]).write_bytes(png())
    records = {Path(r.name).name: r.problem for r in open_source(DataConfig(path=str(tmp_path)))}
    assert records.keys() == {"a.png", "b.jfif", "c.raw"}
    assert records["a.png"] == records["b.jfif"] == ""
    assert "no picture by its name" in records["c.raw"]


def test_a_source_of_nothing_is_refused_in_words(tmp_path, backbone):
    pytest.importorskip("webdataset")
    config = DataConfig(path=str(tar_of(tmp_path / "empty.tar", {})), resolution=16)
    with pytest.raises(ValueError, match=r"empty\.tar holds no pictures"):
        encoded(config, backbone, tmp_path / "cache")


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def tar_hole(size: int) -> bytes:
    """A header of GNU's old format, of a picture that is one hole."""
    info = bytearray(tar_header("a.png", 0, tarfile.GNUTYPE_SPARSE))
    info[386:410] = b"%011o\0%011o\0" % (size, 0)  # where the hole ends, and that nothing follows it
    info[483:495] = b"%011o\0" % size
    info[148:156] = b" " * 8
    info[148:156] = b"%06o\0 " % sum(info)
    return bytes(info)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (tar_hole(2**32), "has holes"),  # 4 GiB of zeros
        (tar_header("a.png", 2**62), "more than 1073741824"),  # skipped in steps of 10 KB
        (tar_header("a.txt", 2**62), "more than 1048576"),
        (tar_header("a.bin", 2**62), "ends before the end of a file in it"),
        (tar_header("a", 2**33 - 1, tarfile.GNUTYPE_LONGNAME), "says that it is 8589934591 bytes long"),
        (tar_header("a", 2**33 - 1, tarfile.XHDTYPE), "says that it is 8589934591 bytes long"),
        (tar_header("a", 1, tarfile.GNUTYPE_LONGNAME) * 2000, "recursion"),
    ],
)
def test_a_tar_that_says_it_is_larger_than_it_is(tmp_path, content, says):
    pytest.importorskip("webdataset")
    (tmp_path / "a.tar").write_bytes(content + bytes(1024))
    found = list(open_source(DataConfig(path=str(tmp_path / "a.tar"))))
    assert all(record.problem for record in found)
    assert says in " ".join(record.problem for record in found)


@pytest.mark.parametrize(
    ("caption", "says"),
    [({"json": b"[" * 100_000}, "nested"), ({"json": rb'{"text": "\ud800"}'}, "not text"), ({"txt": b"\xff"}, "not UTF-8")],
)
def test_captions_in_a_tar_that_cannot_be_read(tmp_path, caption, says):
    pytest.importorskip("webdataset")
    tar_of(tmp_path / "a.tar", {"a.png": png()} | {f"a.{kind}": content for kind, content in caption.items()})
    (record,) = open_source(DataConfig(path=str(tmp_path / "a.tar")))
    assert says in record.problem


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_gives_pictures_and_names_empty_rows(tmp_path, streaming):
    datasets = pytest.importorskip("datasets")
    rows = {"picture": [grey(0), grey(40), None], "caption": ["nought", "forty", "nothing"]}
    features = datasets.Features({"picture": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    records = list(open_source(DataConfig(path=str(tmp_path / "*.parquet"), streaming=streaming)))
    assert [r.caption for r in records[:2]] == ["nought", "forty"]
    assert load_picture(records[0], (8, 8), SQUARE).pixels.max() == -1
    assert "row 2" in records[2].name
    assert "no picture" in records[2].problem
    with pytest.raises(ValueError, match=r"no column 'words'; it has picture, caption"):
        open_source(DataConfig(path=str(tmp_path / "a.parquet"), caption_column="words", streaming=streaming))


def test_a_folder_that_datasets_knows_is_read_as_a_hub_dataset_is(tmp_path):
    pytest.importorskip("datasets")
    folder = folder_of(tmp_path / "data", 2)
    lines = [json.dumps({"file_name": f"{i:03d}.png", "text": f"words {i}"}) for i in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for path in folder.glob("*.txt"):
        path.unlink()
    source = open_source(DataConfig(path=str(folder), format="hub"))
    assert [r.caption for r in source] == ["words 0", "words 1"]
    assert source.total == 2


def test_pictures_in_the_archive_of_a_dataset_are_read(tmp_path):
    pytest.importorskip("datasets")
    folder = folder_of(tmp_path / "plain", 2)
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for path in folder.glob("*.png"):
            archive.write(path, path.name)
        rows = [json.dumps({"file_name": path.name, "text": path.stem}) for path in sorted(folder.glob("*.png"))]
        archive.writestr("metadata.jsonl", "\n".join(rows))
    (data := tmp_path / "data").mkdir()
    (tmp_path / "train.zip").rename(data / "train.zip")
    records = list(open_source(DataConfig(path=str(data), format="hub", streaming=True)))
    assert [record.problem for record in records] == ["", ""]
    assert load_picture(records[1], (32, 32), SQUARE).original_size == (96, 96)


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/a.png", "zip://a.png::http://127.0.0.1:9/a.zip", "file:///etc/passwd"])
def test_addresses_that_data_name_are_not_asked(tmp_path, path):
    """A table from elsewhere must not make a run speak to others."""
    pytest.importorskip("datasets")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cell = pa.array([{"bytes": None, "path": path}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    parquet.write_table(pa.table({"image": cell, "text": ["words"]}), tmp_path / "a.parquet")
    (record,) = open_source(DataConfig(path=str(tmp_path / "a.parquet")))
    assert "none is asked" in record.problem


def test_names_with_brackets_are_names_and_patterns_are_patterns(tmp_path):
    odd = tmp_path / "data [v1]"
    odd.mkdir()
    for name in ("a", "b"):
        tar_of(odd / f"{name}.tar", {"1.png": png(), "1.txt": b"words"})
    tar_of(tmp_path / "00.tar", {"1.png": png(), "1.txt": b"words"})
    assert len(list(open_source(DataConfig(path=str(odd / "a.tar"))))) == 1
    assert len(list(open_source(DataConfig(path=str(tmp_path / "0?.tar"))))) == 1
    with pytest.raises(FileNotFoundError, match="no file"):
        open_source(DataConfig(path=str(tmp_path / "1?.tar")))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a/b.tar", "TarShards"),
        ("x/{0..3}.tar", "TarShards"),
        ("d/*.parquet", "Table"),
        ("someone/something", "Table"),
        ("./a", "Folder"),
    ],
)
def test_the_path_tells_the_format(path, kind, monkeypatch):
    from lora_training.data import sources

    for name in ("TarShards", "Folder"):
        monkeypatch.setattr(sources, name, lambda *_, name=name: name)
    monkeypatch.setattr(sources, "Table", lambda *_, **__: "Table")
    assert open_source(DataConfig(path=path)) == kind


def test_buckets_have_the_area_and_the_ratio_asked_for():
    sizes = bucket_sizes(DataConfig(resolution=512, aspect_buckets=True))
    assert (512, 512) in sizes
    assert (640, 384) in sizes
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert height * width <= 512 * 512
        assert max(height, width) / min(height, width) <= 2
    assert nearest_bucket((3000, 2000), sizes) == (640, 384)
    assert bucket_sizes(SQUARE) == [(64, 64)]


def test_crops_stay_inside_and_a_random_one_is_the_same_every_time():
    config = DataConfig(resolution=32, crop="random")
    record = Record("one", png((200, 50)))
    first = load_picture(record, (32, 32), config)
    assert first.crop == load_picture(record, (32, 32), config).crop
    lefts = {load_picture(Record(f"{i}", record.content), (32, 32), config).crop[1] for i in range(40)}
    assert len(lefts) > 10
    assert min(lefts) >= 0
    assert max(lefts) <= 128 - 32


def test_flipping_keeps_the_picture_and_its_mirror_image():
    half = Image.new("RGB", (64, 64), "black")
    half.paste("white", (32, 0, 64, 64))
    file = io.BytesIO()
    half.save(file, format="PNG")
    pixels = load_picture(Record("", file.getvalue()), (64, 64), DataConfig(flip=True)).pixels
    assert pixels.shape == (2, 3, 64, 64)
    torch.testing.assert_close(pixels[1], pixels[0].flip(-1))


def test_every_picture_of_every_size_is_in_the_cache_once(tmp_path, backbone):
    """Sizes, shards and processes do not lose or double anything: grey levels come back through the VAE."""
    folder = folder_of(tmp_path / "data", 5)
    folder_of(tmp_path / "data" / "wide", 6, size=(192, 96))
    config = DataConfig(path=str(folder), resolution=64, aspect_buckets=True, bucket_step=16, shard_size=4, encode_batch_size=3)
    cache = cache_of(open_source(config), config, backbone, tmp_path / "cache")
    for process in (1, 0):
        cache.encode(process, 2)
    data = cache.open()
    assert {size: len(bucket) for size, bucket in data.buckets.items()} == {(64, 64): 5, (48, 80): 6}
    rows = data.buckets[48, 80].rows(range(6))
    assert rows["latent_means"].shape == (6, 1, 4, 6, 10)
    decoded = backbone.vae.decode(rows["latent_means"][:, 0] / backbone.vae.config.scaling_factor).sample
    assert decoded.mean(dim=(1, 2, 3)).diff().min() > 0, "six different greys, in order"
    latents, told = data.draw(3, torch.Generator().manual_seed(0), CPU)
    assert latents.shape[0] == told["prompt_embeds"].shape[0] == 3
    whole = encoded(DataConfig(**{**vars(config), "shard_size": 100}), backbone, tmp_path / "cache")
    for size, bucket in whole.buckets.items():
        n = range(len(bucket))
        torch.testing.assert_close(
            bucket.rows(n)["latent_means"], data.buckets[size].rows(n)["latent_means"], atol=5e-3, rtol=0
        )


def test_an_encoding_that_was_cut_off_goes_on_where_it_was(tmp_path, backbone, monkeypatch):
    config = DataConfig(path=str(folder_of(tmp_path / "data", 6)), resolution=64, shard_size=2)
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
    assert len(encoded(config, backbone, tmp_path / "cache")) == 6
    assert len(calls) == 1, "two of three shards were there"
    calls.clear()
    assert len(encoded(config, backbone, tmp_path / "cache")) == 6
    assert not calls


def test_what_had_no_caption_and_was_removed_is_forgotten(tmp_path, backbone):
    """The message says to mend or remove; a cache that remembered would refuse again."""
    folder = folder_of(tmp_path / "data", 4)
    (folder / "001.txt").unlink()
    config = DataConfig(path=str(folder), resolution=64)
    with pytest.raises(ValueError, match=r"001.png has no caption"):
        encoded(config, backbone, tmp_path / "cache")
    (folder / "001.png").unlink()
    assert len(encoded(config, backbone, tmp_path / "cache")) == 3


def test_a_shard_that_was_lost_is_encoded_again(tmp_path, backbone):
    config = DataConfig(path=str(folder_of(tmp_path / "data", 4)), resolution=64, shard_size=2)
    assert len(encoded(config, backbone, tmp_path / "cache")) == 4
    next((tmp_path / "cache").rglob("shard-000001.safetensors")).unlink()
    assert len(encoded(config, backbone, tmp_path / "cache")) == 4


def test_what_a_cache_is_named_after_is_looked_at_once(tmp_path, backbone):
    """A source may look at every file for it, and there is a shard for every thousand of them."""
    config = DataConfig(path=str(folder_of(tmp_path / "data", 6)), resolution=64, shard_size=1)
    source = open_source(config)
    looked = []

    class Watched:
        total = source.total

        @property
        def identity(self):
            looked.append(source.identity)
            return looked[-1]

        def __iter__(self):
            return iter(source)

    cache = cache_of(Watched(), config, backbone, tmp_path / "cache")
    cache.encode()
    assert len(cache.open()) == 6
    assert len(looked) == 1


def test_rows_are_found_in_whichever_shard_they_are():
    parts = tuple(Example({"latent_means": torch.arange(first, last)}) for first, last in ((0, 3), (3, 4), (4, 9)))
    bucket = Bucket(parts)
    assert len(bucket) == 9
    assert bucket.rows([8, 0, 3, 2, 4])["latent_means"].tolist() == [8.0, 0.0, 3.0, 2.0, 4.0]


def test_other_words_or_settings_are_another_cache(tmp_path, backbone):
    folder = folder_of(tmp_path / "data", 2)

    def name(**settings):
        config = DataConfig(path=str(folder), **settings)
        return cache_of(open_source(config), config, backbone, tmp_path).folder

    first = name(resolution=64)
    assert name(resolution=64) == first
    assert len({first, name(resolution=32), name(resolution=64, flip=True), name(resolution=64, crop="random")}) == 4
    (folder / "000.txt").write_text("other words")
    assert name(resolution=64) != first


def test_what_the_model_is_made_of_is_another_cache(tmp_path, backbone):
    """A LoRA may change the text encoders, and a file of the same name may be another one; a single file is read as told."""
    config = DataConfig(path=str(folder_of(tmp_path / "data", 1)), resolution=64)
    lora = tmp_path / "style.safetensors"

    def name(*loras, **settings):
        model = ModelConfig(path=str(MODEL_DIR), teacher_loras=loras, **settings)
        return LatentCache(open_source(config), config, backbone, model, tmp_path).folder

    lora.write_bytes(b"one")
    first = name(str(lora))
    assert name(str(lora)) == first
    others = [name(), name("someone/style"), name(str(lora), str(lora)), name(single_file_config="someone/model")]
    assert len({first, *others}) == 5
    lora.write_bytes(b"another")
    assert name(str(lora)) != first


def test_dropped_captions_become_the_empty_one(tmp_path, backbone):
    data = encoded(DataConfig(path=str(folder_of(tmp_path / "data", 2)), resolution=64), backbone, tmp_path)
    _, told = data.draw(64, torch.Generator().manual_seed(0), CPU, caption_dropout=0.5)
    empty = (told["prompt_embeds"] == data.empty["prompt_embeds"].float()).all(dim=2).all(dim=1)
    assert 16 < empty.sum() < 48


def stream(config, backbone, **kwargs):
    return StreamingData(open_source(config), config, backbone, seed=3, **kwargs)


def batches_of(data, count, batch_size=2):
    return [data.draw(batch_size, torch.Generator().manual_seed(i), CPU)[0] for i in range(count)]


def test_a_stream_goes_on_after_a_break_with_the_same_pictures(tmp_path, backbone):
    config = DataConfig(path=str(folder_of(tmp_path / "data", 7)), resolution=64, streaming=True, shuffle_buffer=3)
    straight = batches_of(stream(config, backbone), 8)
    again = stream(config, backbone)
    again.skip(5, 2)
    latents, _ = again.draw(2, torch.Generator().manual_seed(5), CPU)
    assert torch.equal(latents, straight[5])
    assert not torch.equal(straight[0], straight[1])


def test_processes_share_a_stream_and_read_all_of_it(tmp_path, backbone):
    config = DataConfig(path=str(folder_of(tmp_path / "data", 8)), resolution=64, streaming=True)
    seen = []
    for process in range(2):
        data = stream(config, backbone, process=process, processes=2)
        names = [r.name for r in data._records(epoch=0, shuffled=True)]
        assert len(set(names)) == len(names) == 4
        seen += names
    assert len(set(seen)) == 8


def test_a_stream_of_tars_in_buckets_draws_batches_of_one_size(tmp_path, backbone):
    pytest.importorskip("webdataset")
    members = shard_members(range(4))
    members |= {"w0.png": grey(0, (192, 96)), "w0.txt": b"wide", "w1.png": grey(9, (192, 96)), "w1.txt": b"wide"}
    tar_of(tmp_path / "a.tar", members)
    config = DataConfig(
        path=str(tmp_path / "a.tar"), resolution=64, aspect_buckets=True, bucket_step=16, streaming=True, shuffle_buffer=2
    )
    shapes = {tuple(batch.shape) for batch in batches_of(stream(config, backbone), 9)}
    assert shapes == {(2, 4, 8, 8), (2, 4, 6, 10)}


def test_a_stream_says_when_nothing_or_too_little_can_be_used(tmp_path, backbone):
    folder = folder_of(tmp_path / "none", 3)
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"(?s)no picture can be used.*no caption"):
        stream(DataConfig(path=str(folder), streaming=True), backbone)

    folder = folder_of(tmp_path / "some", 150)
    for number in range(0, 150, 3):
        (folder / f"{number:03d}.png").write_bytes(b"broken")
    data = stream(DataConfig(path=str(folder), resolution=16, streaming=True, shuffle_buffer=2), backbone)
    with pytest.raises(ValueError, match=r"cannot be used"):
        batches_of(data, 70)


@pytest.mark.parametrize("count", [30, 150])
def test_a_stream_names_the_first_that_cannot_be_used_however_few_there_are(tmp_path, backbone, count):
    folder = folder_of(tmp_path / "data", count, size=(16, 16))
    for number in range(20):
        (folder / f"{number:03d}.txt").unlink()
    config = DataConfig(path=str(folder), resolution=16, streaming=True, shuffle_buffer=2)
    with pytest.raises(ValueError, match=r"20 of (30|100) pictures cannot be used"):
        batches_of(stream(config, backbone), 60)


def test_what_is_broken_is_counted_once_however_often_a_stream_comes_round(backbone, capsys):
    """One of 120 is less than the hundredth that may be; counted at every time round it would be more at the second."""

    class Listed:
        identity, total = None, 120

        def __iter__(self):
            for i in range(120):
                yield Record(f"picture {i}", b"broken" if i == 119 else grey(i, (16, 16)), "words")

    config = DataConfig(resolution=16, streaming=True, shuffle_buffer=1)
    batches_of(StreamingData(Listed(), config, backbone, seed=3), 20, batch_size=20)  # more than three times round
    assert capsys.readouterr().err.count("1 of 120 pictures cannot be used") == 1


class Broken:
    """Grey pictures, one in so many of which is broken."""

    identity = None

    def __init__(self, total, one_in, draw=None):
        self.total, self._draw = total, draw or np.random.default_rng(0)
        self._broken = set(np.flatnonzero(self._draw.random(total) < 1 / one_in).tolist())

    def __iter__(self):
        for i in range(self.total):
            yield Record(f"picture {i}", caption="words", problem="is broken" if i in self._broken else "")


@pytest.mark.parametrize(("one_in", "stops"), [(200, 0), (110, 2), (30, 20)])
def test_a_stream_stops_for_more_broken_pictures_than_chance_makes_of_the_share_that_may_be(
    backbone, one_in, stops, monkeypatch
):
    """The share is 1 in 100. Of 20 streams with half of that none may stop, of those with a little less at most two: the limit
    is three standard deviations away, and looked at often. With three times the share all stop.
    """
    monkeypatch.setattr(StreamingData, "_first", lambda self: TrainingData({}, {}, ()))
    stopped = 0
    for seed in range(20):
        source = Broken(3000, one_in, np.random.default_rng(seed))
        data = StreamingData(source, DataConfig(max_bad_share=0.01), backbone, 0, process=0, processes=2)
        try:
            list(data._records(0, shuffled=False))
        except ValueError:
            stopped += 1
    assert stopped == stops if stops in (0, 20) else stopped <= stops


def test_a_stream_says_what_is_new_and_later_only_how_many(backbone, capsys, monkeypatch):
    monkeypatch.setattr(StreamingData, "_first", lambda self: TrainingData({}, {}, ()))
    data = StreamingData(Broken(4000, 8), DataConfig(max_bad_share=0.5), backbone, 0)
    list(data._records(0, shuffled=False))
    said = capsys.readouterr().err.splitlines()
    named = [line for line in said if "is broken" in line]
    assert len(named) == len(set(named)) == 20
    assert len([line for line in said if "so far" in line]) == 4  # at 40, 80, 160, 320; some 500 are broken
    assert len(said) < 40


def test_a_stream_whose_sizes_cannot_be_told_is_refused(tmp_path, backbone):
    """It would be looked through for one that can be used again and again."""
    folder = folder_of(tmp_path / "broken", 3)
    for path in folder.glob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"(?s)no picture can be used.*000\.png cannot be read"):
        stream(DataConfig(path=str(folder), aspect_buckets=True, streaming=True), backbone)


def test_data_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"multiple of data\.bucket_step=64"):
        TrainConfig(data=DataConfig(resolution=500, aspect_buckets=True))
    with pytest.raises(ValueError, match=r"data\.max_aspect"):
        TrainConfig(data=DataConfig(max_aspect=0.5))
