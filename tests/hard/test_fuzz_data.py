"""Captions, metadata, prompts, tar shards and pictures that are broken in every way: used, or left out and named."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from fuzzing import ROOM, damaged, edits, fuzz, in_memory, in_time, json_texts, json_values, refused, texts
from hypothesis import strategies as st
from PIL import Image

from lora_training.config import DataConfig
from lora_training.data.pictures import bucket_sizes, load_picture, nearest_bucket, upright_size
from lora_training.data.sources import Folder, Record, TarShards
from lora_training.evaluation.prompts import read_pairs, read_prompts

pytestmark = pytest.mark.hard

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "shift_jis"]
encoded = st.tuples(st.one_of(texts, st.text(max_size=40)), st.sampled_from(ENCODINGS)).map(
    lambda found: found[0].encode(found[1], errors="replace")
)
captions = st.one_of(
    encoded,
    st.binary(max_size=20),
    st.tuples(st.just("a red star, größer ★".encode()), edits).map(lambda found: damaged(*found)),
)


def check_records(records: list[Record]) -> None:
    """Whatever is used has words that a tokenizer takes, and whatever is not says why."""
    for record in records:
        assert record.name
        if not record.problem:
            assert record.content
            assert record.caption == record.caption.strip()
            assert "\0" not in record.caption
            record.caption.encode()


def png(size=(2, 2)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, format="PNG")
    return file.getvalue()


def test_captions(tmp_path):
    (tmp_path / "a.png").write_bytes(png())

    def check(content):
        (tmp_path / "a.txt").write_bytes(content)
        found = list(Folder(tmp_path))
        assert len(found) == 1
        assert str(tmp_path) in found[0].name
        check_records(found)

    fuzz("captions", captions, check)


def json_line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")


names = st.one_of(
    st.sampled_from(
        ["a.png", "./a.png", "../a.png", "b.png", "/etc/passwd", "", ".", "a" * 300 + ".png", "a\0.png", "\ud800.png"]
    ),
    texts,
)
rows = st.one_of(
    st.fixed_dictionaries(
        {"file_name": st.one_of(names, json_values)},
        optional={"text": st.one_of(texts, json_values), "caption": st.one_of(texts, json_values), "more": json_values},
    ).map(json.dumps),
    json_values.map(json.dumps),
    json_texts,
    st.just('{"file_name": "a.png", "text": "a b"}'),
)


def lines(of):
    """Rows a line each, in some encoding, perhaps damaged."""
    joined = st.tuples(st.lists(of, max_size=4), st.sampled_from(["\n", "\r\n", "\n\n"])).map(
        lambda found: found[1].join(found[0])
    )
    content = st.tuples(joined, st.sampled_from(["utf-8"] * 5 + ENCODINGS)).map(lambda f: f[0].encode(f[1], errors="replace"))
    return st.one_of(content, content, st.tuples(content, edits).map(lambda found: damaged(*found)))


def test_metadata(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    file = tmp_path / "metadata.jsonl"

    def check(content):
        file.write_bytes(content)
        found = []
        if not refused(lambda: found.extend(Folder(tmp_path)), names=str(file)):
            assert found
            check_records(found)

    fuzz("metadata.jsonl", lines(rows), check)


prompt_rows = st.one_of(
    st.fixed_dictionaries(
        {}, optional={key: st.one_of(texts, json_values) for key in ("prompt", "thing", "caption", "image_id")}
    ).map(json.dumps),
    texts.map(json.dumps),
    json_texts,
)
coco = st.fixed_dictionaries(
    {"annotations": st.one_of(json_values, st.lists(prompt_rows.map(lambda text: text[:100]), max_size=3))}
)
prompt_files = st.one_of(
    st.tuples(st.sampled_from([".txt", ".jsonl", ".json"]), lines(prompt_rows)),
    st.tuples(st.just(".json"), st.lists(st.one_of(json_values, texts), max_size=4).map(json_line)),
    st.tuples(st.just(".json"), coco.map(json_line)),
    st.tuples(
        st.just(".json"),
        st.lists(st.dictionaries(st.sampled_from(["image_id", "caption"]), st.one_of(json_values, texts)), max_size=3).map(
            lambda found: json_line({"annotations": found})
        ),
    ),
)


def test_prompts(tmp_path):
    def check(case):
        suffix, content = case
        file = tmp_path / f"prompts{suffix}"
        file.write_bytes(content)
        found = []
        if not refused(lambda: found.extend(read_prompts(str(file))), names=str(file)):
            assert found
        if not refused(lambda: found.extend(word for pair in read_pairs(str(file)) for word in pair), names=str(file)):
            assert len(found) % 2 == 0 or found
        for text in found:
            assert "\0" not in text
            text.encode()

    fuzz("prompts", prompt_files, check)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, format_: int = tarfile.GNU_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(format_, errors="surrogateescape")


def member(name: str, content: bytes) -> bytes:
    return header(name, len(content)) + content + bytes(-len(content) % 512)


SHARD = b"".join(member(f"{i}.{kind}", content) for i in range(2) for kind, content in (("png", png()), ("txt", b"words")))
KINDS = [bytes([kind]) for kind in b"01234567gxXLKSV"]
tar_names = st.one_of(
    st.sampled_from(
        ["0.png", "0.txt", "0.json", "../../etc/0.png", "/0.png", "0", ".png", "0.PNG", "__x__/0.png", "0.png.txt"]
    ),
    st.text("ab./\\é", min_size=1, max_size=90),
)
contents = st.one_of(captions, json_texts.map(lambda text: text[:5000].encode(errors="replace")), st.just(png()))
parts = st.one_of(
    st.tuples(tar_names, contents).map(lambda found: member(*found)),
    st.tuples(
        tar_names, st.one_of(st.integers(0, 2000), st.sampled_from([2**31, 2**33 - 1, 2**40, 2**62])), st.sampled_from(KINDS)
    ).map(lambda found: header(*found)),
    st.binary(max_size=600),
    st.just(bytes(512)),
    st.sampled_from([b"20 size=99999999999\n", b"30 GNU.sparse.realsize=9999999\n", b"9999999999 a=b\n", b"12 size=-99\n"]).map(
        lambda record: header("pax", len(record), tarfile.XHDTYPE, tarfile.PAX_FORMAT) + record + bytes(512 - len(record))
    ),
    st.sampled_from([header("long", 3, tarfile.GNUTYPE_LONGNAME) + b"0.a" + bytes(509)]),
)
shards = st.one_of(
    st.lists(parts, max_size=5).map(lambda found: b"".join(found) + bytes(1024)),
    st.lists(parts, max_size=3).map(b"".join),
    st.tuples(st.just(SHARD + bytes(1024)), edits).map(lambda found: damaged(*found)),
    st.tuples(st.just(gzip.compress(SHARD + bytes(1024), mtime=0)), edits).map(lambda found: damaged(*found)),
)


def test_tar_shards(tmp_path):
    pytest.importorskip("webdataset")
    path = tmp_path / "shard.tar"

    def check(content):
        path.write_bytes(content)
        found = list(TarShards(str(path)))
        check_records(found)
        assert all(str(path) in record.name for record in found)

    fuzz("tar shards", shards, check)


def sparse(size: int) -> bytes:
    """A header of GNU's old format, of a member that is one hole."""
    info = bytearray(header("0.png", 0, tarfile.GNUTYPE_SPARSE))
    info[386:410] = b"%011o\0%011o\0" % (size, 0)  # the hole's end, and that nothing follows it
    info[483:495] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    info[148:156] = b" " * 8
    info[148:156] = b"%06o\0 " % sum(info)
    return bytes(info)


HUGE = {
    "a hole of 2^37 bytes": sparse(2**37),
    "a picture of 2^62 bytes": header("0.png", 2**62),
    "a name of 2^33 bytes": header("0", 2**33 - 1, tarfile.GNUTYPE_LONGNAME),
    "a pax header of 2^33 bytes": header("0", 2**33 - 1, tarfile.XHDTYPE),
    "a negative size": header("0.png", 0)[:124] + b"\xff" * 12 + header("0.png", 0)[136:],
    "ten thousand long names": header("0", 1, tarfile.GNUTYPE_LONGNAME) * 10_000,
}


@pytest.mark.parametrize("what", HUGE)
@pytest.mark.parametrize("packed", [False, True])
def test_a_shard_of_little_that_says_it_is_much(tmp_path, what, packed):
    """Packed, zeros that it speaks of are there: more than there is room for, in a few MiB."""
    pytest.importorskip("webdataset")
    path = tmp_path / "shard.tar.gz" if packed else tmp_path / "shard.tar"
    if packed:
        press = zlib.compressobj(1, zlib.DEFLATED, 31)
        with path.open("wb") as file:
            file.write(press.compress(HUGE[what]))
            for _ in range(80):
                file.write(press.compress(bytes(2**24)))
            file.write(press.flush())
    else:
        path.write_bytes(HUGE[what] + bytes(1024))
    with in_memory(ROOM), in_time(60):
        found = list(TarShards(str(path)))
    assert found
    assert all(record.problem for record in found)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def whole_pictures() -> list[bytes]:
    """A few pixels in every form that people bring."""
    colours = Image.fromarray(np.random.default_rng(0).integers(256, size=(9, 13, 3), dtype=np.uint8))
    grey = colours.convert("L")
    deep = Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11) * 600)
    real = Image.fromarray(np.linspace(0, 1, 99, dtype=np.float32).reshape(9, 11))
    palette = colours.quantize(5)
    exif = colours.getexif()
    exif[0x0112] = 6
    found = [saved(colours, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "TGA", "ICO", "PCX", "SGI")]
    found += [saved(colours.convert("CMYK"), kind) for kind in ("JPEG", "TIFF")]
    found += [
        saved(colours.convert("YCbCr"), "TIFF"),
        saved(colours.convert("YCbCr"), "JPEG"),
    ]
    found += [
        saved(grey, "PNG"),
        saved(grey.convert("1"), "PNG"),
        saved(grey.convert("LA"), "PNG"),
        saved(colours.convert("RGBA"), "PNG"),
    ]
    found += [
        saved(deep, "PNG"),
        saved(deep, "TIFF"),
        saved(real, "TIFF"),
        saved(Image.fromarray(np.full((9, 9), np.nan, "f4")), "TIFF"),
    ]
    found += [
        saved(palette, "PNG", transparency=1),
        saved(palette, "GIF", transparency=2),
        saved(palette, "PNG", transparency=b"\0\x80"),
    ]
    found += [saved(colours, kind, save_all=True, append_images=[colours, colours]) for kind in ("GIF", "WEBP", "PNG", "TIFF")]
    found += [saved(colours, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    found += [saved(colours, "JPEG", progressive=True), saved(colours, "TIFF", compression="tiff_lzw"), saved(colours, "EPS")]
    return found


def head_of_png(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG whose head says these; nothing of its pixels follows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width % 2**32, height % 2**32, depth % 256, colour % 256, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


sides = st.one_of(st.integers(0, 40), st.sampled_from([9000, 20_000, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 1]))
EXIF_TYPES = [1, 2, 3, 4, 5, 7, 9, 10, 12, 13, 99]


def jpeg_turned(kind: int, count: int, value: bytes) -> bytes:
    """A JPEG whose EXIF says of its orientation anything at all."""
    entry = struct.pack("<HHHI4s", 1, 0x0112, kind, count, value[:4].ljust(4, b"\0")) + bytes(4)
    return saved(Image.new("RGB", (9, 5)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + entry)


DATA = DataConfig(resolution=16, aspect_buckets=True, bucket_step=8)
SIZES = bucket_sizes(DATA)


def check_picture(content: bytes) -> None:
    record = Record("a/picture.png", content)
    size = []
    if refused(lambda: size.append(nearest_bucket(upright_size(record), SIZES)), names=record.name):
        return
    picture = []
    if not refused(lambda: picture.append(load_picture(record, size[0], DATA)), names=record.name):
        assert picture[0].levels.shape == (1, 3, *size[0])


@pytest.mark.filterwarnings("ignore")  # PIL warns of what it mends
def test_pictures():
    pictures = st.one_of(
        st.tuples(st.sampled_from(whole_pictures()), edits).map(lambda found: damaged(*found)),
        st.tuples(st.sampled_from(whole_pictures()), edits).map(lambda found: damaged(*found)),
        st.tuples(sides, sides, st.sampled_from([1, 2, 8, 16, 3]), st.sampled_from([0, 2, 3, 4, 6, 5])).map(
            lambda found: head_of_png(*found)
        ),
        st.tuples(st.sampled_from(EXIF_TYPES), st.integers(0, 5), st.binary(max_size=4)).map(lambda found: jpeg_turned(*found)),
        st.binary(max_size=60),
    )
    fuzz("pictures", pictures, check_picture)


@pytest.mark.filterwarnings("ignore")
def test_every_whole_picture_is_used():
    """Upright, or the damaged ones would prove little. NaN is no colour, and PostScript is a program."""
    left_out = []
    for content in whole_pictures():
        record, found = Record("a", content), []
        if refused(lambda: found.append(load_picture(record, (16, 16), DATA))):  # noqa: B023
            left_out.append(content)
        else:
            assert found[0].original_size == upright_size(record)
            assert found[0].levels.float().std() > 10
    assert len(left_out) == 2, [content[:8] for content in left_out]


@pytest.mark.parametrize(
    "content",
    [head_of_png(2**31 - 1, 2**31 - 1), head_of_png(20_000, 20_000), saved(Image.new("1", (1, 100_000)), "PNG")],
    ids=["2^62 pixels", "400 million pixels", "a line of 100000"],
)
def test_a_picture_of_little_that_says_it_is_much(content):
    with in_memory(2**28), in_time():
        assert refused(lambda: load_picture(Record("a.png", content), (512, 512), DataConfig()), names="a.png")
