"""Where captioned pictures or clips come from: a folder, parquet files, tar shards, a dataset of the Hugging Face hub.

A source yields `Record`s in an order that never changes. What cannot be used is a record too, with the reason, so that it
can be counted and named.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol, cast

from pcm_scheduler.checks import shortened

from ..config import DataConfig
from ..text import decoded, json_in, json_lines, words

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
CLIP_SUFFIXES = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".webp"}
FRAME_SUFFIXES = SUFFIXES - CLIP_SUFFIXES  # of numbered pictures that make a clip; GIF and WebP are clips themselves
CAPTION_NAMES = ("text", "caption", "prompt", "txt")


@dataclass(frozen=True)
class Record:
    """A picture or clip that is not decoded yet, and its words.

    Attributes:
        name: for messages.
        content: its file, or the file's bytes; for a clip kept as numbered pictures, their folder.
        caption: its words.
        problem: why it cannot be used; empty if it can.
    """

    name: str
    content: Path | bytes = b""
    caption: str = ""
    problem: str = ""


class Source(Protocol):
    """Captioned pictures or clips in a fixed order."""

    @property
    def identity(self) -> object:
        """Changes when the data do; JSON."""

    @property
    def total(self) -> int | None:
        """How many records there are, if that is known without reading them."""

    def __iter__(self) -> Iterator[Record]: ...


def open_source(config: DataConfig) -> Source:
    """The source that `data.path` names.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: something is, but holds no pictures (or clips), or a library to read it with is missing.
    """
    path, clips = config.path, config.clips is not None
    if clips:
        needs("av", "Clips", "video")
    kind = _guess(path) if config.format == "auto" else config.format
    if kind == "folder":
        return Folder(Path(path), clips)
    if kind == "webdataset":
        return TarShards(path, clips)
    return Table(config, parquet=kind == "parquet")


def _guess(path: str) -> str:
    if path.endswith((".tar", ".tar.gz", ".tgz", ".tar}")):
        return "webdataset"
    if path.endswith(".parquet"):
        return "parquet"
    is_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).parent.is_dir()
    return "hub" if is_hub_id else "folder"


def needs(library: str, what: str, extra: str) -> None:
    """Refuse to go on without a library of one of our extras.

    Raises:
        ValueError: it is not installed; how to install it.
    """
    if find_spec(library) is None:
        raise ValueError(f"{what} need the {library} library: pip install 'phased-consistency[{extra}]'")


def _files(pattern: str) -> list[str]:
    """What a path names: a file, whatever is in its name; else the files that it matches as a glob; else itself."""
    if "://" in pattern or pattern.startswith("pipe:") or Path(pattern).is_file() or not has_magic(pattern):
        return [pattern]
    return sorted(glob(pattern))


def _stamp(path: Path, root: Path) -> tuple[str, int, int]:
    """Changes when a file does, or one in a folder of frames."""
    found = [p.stat() for p in (frames_in(path) if path.is_dir() else [path])]
    return str(path.relative_to(root)), sum(s.st_size for s in found), max(s.st_mtime_ns for s in found)


def frames_in(folder: Path) -> list[Path]:
    """The numbered pictures of a folder, by the number that their names end in; none if it holds clips too."""
    files = sorted(folder.iterdir())
    if any(p.suffix.lower() in CLIP_SUFFIXES for p in files):
        return []
    return sorted((p for p in files if p.suffix.lower() in FRAME_SUFFIXES and frame_number(p) >= 0), key=frame_number)


def frame_number(path: Path) -> int:
    """7 of `take2_0007.png`; -1 if the name does not end in a number."""
    found = re.search(r"[0-9]+$", path.stem)
    return int(found[0]) if found else -1


def clips_in(folder: Path) -> list[Path]:
    """Clip files, and folders of numbered pictures, in a folder and below, sorted by path."""
    files = (p for p in folder.rglob("*") if (frames_in(p) if p.is_dir() else p.suffix.lower() in CLIP_SUFFIXES))
    return sorted(p for p in files if p.exists())


class Folder:
    """Pictures or clips in a folder and below, sorted by path.

    `metadata.jsonl` (one object a line, with `file_name` and `text` or `caption`) speaks for the files in its folder and
    below, and for no other; a `.txt` of the file's own name speaks for the rest. A folder of numbered pictures is a clip, and
    is captioned as a file is: `walk/0001.png` and on by `walk.txt`, or by `walk` in a metadata.jsonl.

    Args:
        folder: where.
        clips: it holds clips, not pictures.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no pictures (or clips), or a metadata.jsonl that cannot be read.
    """

    def __init__(self, folder: Path, clips: bool = False):
        if not folder.is_dir():
            raise FileNotFoundError(f"data.path {folder} does not exist.")
        self._folder, self._clips = folder, clips
        self._records = list(self._find())

    def _find(self) -> Iterator[Record]:
        files = sorted(self._folder.rglob("*"))
        told = [file for file in files if file.name == "metadata.jsonl" and file.is_file()]
        captions = {path: record for file in told for path, record in _metadata(file)}
        suffixes, noun = (CLIP_SUFFIXES, "clips") if self._clips else (SUFFIXES, "pictures")
        found = clips_in(self._folder) if self._clips else [p for p in files if p.suffix.lower() in suffixes and p.is_file()]
        listed = ", ".join(sorted(suffixes))
        if not found:
            hint = " It holds tar files; name them, as in shards/*.tar." if any(p.suffix == ".tar" for p in files) else ""
            if self._clips and frames_in(self._folder):
                hint = " It holds numbered pictures: give the folder that this folder is in, or leave data.clips out."
            raise ValueError(f"{self._folder} holds no {noun}; looked for {listed}.{hint}")
        known = set(found)
        for path in captions:
            if not path.is_relative_to(self._folder) or ".." in path.relative_to(self._folder).parts:
                yield Record(str(path), problem="is named in metadata.jsonl but is outside of its folder")
            elif path not in known:
                what = f"no {noun[:-1]} by its name, which would end in {listed}" if _is_file(path) else "not there"
                yield Record(str(path), problem=f"is named in metadata.jsonl but is {what}")
        for path in found:
            caption = path.with_name(f"{path.name}.txt") if path.is_dir() else path.with_suffix(".txt")
            if path in captions:
                yield captions[path]
            elif caption.is_file():
                try:
                    yield Record(str(path), path, words(decoded(caption.read_bytes())))
                except ValueError as error:
                    yield Record(str(caption), problem=str(error))
            else:
                yield Record(str(path), problem="has no caption: no .txt beside it, no entry in a metadata.jsonl")

    @property
    def identity(self) -> object:
        return [
            (*_stamp(r.content, self._folder), r.caption)
            if isinstance(r.content, Path)
            else (os.path.relpath(r.name, self._folder), r.problem)  # which is mended by a file that comes or goes
            for r in self._records
        ]

    @property
    def total(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)


def _is_file(path: Path) -> bool:
    """`Path.is_file`, for names that no file can have too."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _metadata(file: Path) -> Iterator[tuple[Path, Record]]:
    """What the lines of a metadata.jsonl say, and of which files.

    Raises:
        ValueError: a line that is not such an object; which.
    """
    for where, entry in json_lines(file):
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str) or not {"text", "caption"} & entry.keys():
            raise ValueError(f'{where} is not an object like {{"file_name": "a.png", "text": "words"}}: {shortened(entry)}')
        path, key = file.parent / os.path.normpath(entry["file_name"]), "text" if "text" in entry else "caption"
        try:
            yield path, Record(str(path), path, words(entry[key]))
        except ValueError as error:
            yield path, Record(str(path), path, problem=f"has no caption that can be used: its {key} {error}")


class TarShards:
    """Tar files in webdataset's layout: members of the same name but for their suffix belong together.

    Args:
        pattern: a file, a glob (`shards/*.tar`), braces (`shards/{000..099}.tar`), an http(s) address, or `pipe:` and a
            command. The caption is a `.txt`, or a `.json` with `text` or `caption`.
        clips: they hold clips, not pictures.

    Raises:
        FileNotFoundError: no file matches.
    """

    def __init__(self, pattern: str, clips: bool = False):
        needs("webdataset", "Tar shards", "data")
        from webdataset.shardlists import expand_urls

        self._suffixes, self._noun = (CLIP_SUFFIXES, "clip") if clips else (SUFFIXES, "picture")
        self._urls = [url for part in expand_urls(pattern) for url in _files(part)]
        self._local = [Path(url) for url in self._urls if "://" not in url and not url.startswith("pipe:")]
        missing = [path for path in self._local if not path.is_file()]
        if missing or not self._urls:
            raise FileNotFoundError(f"data.path: no file {missing[0] if missing else pattern}.")

    @property
    def identity(self) -> object:
        return self._urls if len(self._local) < len(self._urls) else [_stamp(path, path.parent) for path in self._local]

    @property
    def total(self) -> None:
        return None

    def __iter__(self) -> Iterator[Record]:
        from webdataset.tariterators import base_plus_ext, group_by_keys, url_opener

        problems: list[Record] = []
        url = ""

        def note(error: Exception) -> bool:
            """Name what is broken and go on after it."""
            problems.append(Record(url, problem=f"cannot be read to its end: {error}"))
            return True

        def members() -> Iterator[dict[str, Any]]:
            for opened in url_opener(iter([{"url": url}]), handler=note):
                for name, content in _tar_members(opened["stream"], self._largest, note):
                    if base_plus_ext(name)[1]:  # embeddings, class numbers and the like are usual beside a picture
                        yield {"fname": name, "data": content, "__url__": url}
                    else:
                        problems.append(Record(f"{url}: {name}", problem=self._useless))

        for url in self._urls:
            for sample in group_by_keys(members(), handler=note):
                yield self._record_of(sample, url)
                yield from problems
                problems.clear()
            if _is_cut_off(Path(url)):
                problems.append(Record(url, problem="does not end as a tar file does: it was cut off"))
            yield from problems
            problems.clear()

    @property
    def _useless(self) -> str:
        return f"is neither a {self._noun} nor a caption"

    def _largest(self, name: str) -> int:
        """Bytes that are read of a member; 0: it is of no use."""
        suffix = Path(name).suffix.lower()
        if suffix in _CAPTION_SUFFIXES:
            return _LARGEST_CAPTION
        return (_LARGEST_CLIP if self._noun == "clip" else _LARGEST_PICTURE) if suffix in self._suffixes else 0

    def _record_of(self, sample: dict[str, Any], url: str) -> Record:
        name = f"{url}: {sample['__key__']}"
        kinds = [kind for kind in sample if not kind.startswith("__")]
        if not any(f".{kind}" in (*self._suffixes, *_CAPTION_SUFFIXES) for kind in kinds):
            return Record(f"{name}.{kinds[0]}", problem=self._useless)
        content = next((v for k, v in sample.items() if f".{k}" in self._suffixes), None)
        caption: str | None
        try:
            if "txt" in sample:
                caption = words(decoded(sample["txt"]))
            else:
                entry = json_in(sample.get("json", b"{}"), "its .json")
                stated = entry if isinstance(entry, dict) else {}
                caption = next((words(stated[key]) for key in CAPTION_NAMES if isinstance(stated.get(key), str)), None)
        except ValueError as error:
            return Record(name, problem=f"has a caption that cannot be read: {error}")
        if content is None:
            return Record(name, problem=f"has no {self._noun}")
        if caption is None:
            return Record(name, problem="has no caption: no .txt, no .json with text or caption")
        return Record(name, content, caption)


_CAPTION_SUFFIXES = (".txt", ".json")
_LARGEST_CAPTION, _LARGEST_PICTURE, _LARGEST_CLIP = 2**20, 2**30, 2**31
"""Bytes of a member that is read. A compressed or sparse tar of a few kilobytes may say, and hold, any number of them."""
_EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_LARGEST_EXTENDED = 2**20
"""Bytes of a long name or the like, which tarfile reads before anybody can look at the member."""


class _Header(tarfile.TarInfo):
    """A member's header, whose size is looked at before anything of that size is read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        found = super().frombuf(buf, encoding, errors)
        most = _LARGEST_EXTENDED if found.type in _EXTENDED else found.size
        if not 0 <= found.size <= most:
            raise tarfile.ReadError(f"a header before {found.name[:100]!r} says that it is {found.size} bytes long")
        return found


class _Ending:
    """A stream that says when it is read on and on beyond its end, as tarfile does to skip a member of any size it is told."""

    _MOST = 100  # empty answers in a row; a few are usual

    def __init__(self, stream: IO[bytes]):
        self._stream, self._empty = stream, 0

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(size)
        self._empty = 0 if content else self._empty + 1
        if self._empty > self._MOST:
            raise EOFError("it ends before the end of a file in it")
        return content


def _tar_members(
    stream: IO[bytes], largest: Callable[[str], int], note: Callable[[Exception], bool]
) -> Iterator[tuple[str, bytes]]:
    """The name and the content of every file in a tar, which may be compressed.

    Args:
        stream: of its bytes.
        largest: how many bytes are read of a member of this name; 0: none, and none are given.
        note: is told what cannot be read; where the tar itself is broken, that ends it.
    """
    try:
        with tarfile.open(fileobj=cast(IO[bytes], _Ending(stream)), mode="r|*", tarinfo=_Header) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
                if not member.isreg() or re.match(r"__[^/]*__($|/)", member.name):  # webdataset's own files
                    continue
                most = largest(member.name)
                if most and (member.sparse is not None or member.size > most):  # holes would be filled in
                    note(ValueError(f"{member.name!r} has holes, or of its {member.size} bytes more than {most}"))
                    continue
                file = tar.extractfile(member) if most else None
                content = file.read() if file else b""
                if file and len(content) < member.size:
                    raise tarfile.ReadError(f"{member.name!r} is cut off")
                yield member.name, content
    except Exception as error:  # tarfile and the decompressors raise whatever int(), zlib and deep recursion do
        note(error)


def _is_cut_off(path: Path) -> bool:
    """Whether a local tar lacks the zeros at its end; `tarfile` takes one that is cut in a member's header for whole."""
    if path.suffix != ".tar" or not path.is_file():
        return False
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 512, 0))
        return any(file.read())


class Table:
    """Rows of parquet files or of a hub dataset, through the `datasets` library.

    Args:
        config: path, subset, split, columns.
        parquet: `config.path` is files; otherwise a hub id or a folder that `datasets` knows.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: a split or a column that is not there; which there are.
    """

    def __init__(self, config: DataConfig, parquet: bool):
        needs("datasets", "Parquet files and hub datasets", "data")
        import datasets

        if parquet:
            self._files = [Path(f) for f in _files(config.path) if Path(f).is_file()]
            if not self._files:
                raise FileNotFoundError(f"data.path: no file {config.path}.")
            arguments: dict[str, Any] = {"path": "parquet", "data_files": [str(f) for f in self._files]}
        else:
            self._files = []
            arguments = {"path": config.path, "name": config.subset or None}
        rows = datasets.load_dataset(**arguments, split=config.split, streaming=config.streaming)
        features = rows.features or {}
        kind = datasets.Video if config.clips else datasets.Image
        first = next((k for k, f in features.items() if isinstance(f, kind)), "video" if config.clips else "image")
        self._image, self._noun = config.image_column or first, config.noun
        self._caption = config.caption_column or next((k for k in CAPTION_NAMES if k in features), "text")
        for setting, column in (("image_column", self._image), ("caption_column", self._caption)):
            if column not in features:
                raise ValueError(f"data.{setting}: {config.path} has no column {column!r}; it has {', '.join(features)}.")
        self._name, self._rows = config.path, rows.cast_column(self._image, kind(decode=False))

    @property
    def identity(self) -> object:
        files = [_stamp(f, f.parent) for f in self._files]
        return [files, self._name, "" if files else getattr(self._rows, "_fingerprint", ""), self._image, self._caption]

    @property
    def total(self) -> int | None:
        return len(self._rows) if hasattr(self._rows, "__len__") else None

    def __iter__(self) -> Iterator[Record]:
        for number, row in enumerate(self._rows):
            name, picture, caption = f"{self._name}, row {number}", row[self._image], row[self._caption]
            try:
                content = _content(picture, () if self._files else _ARCHIVES) if picture else None
            except OSError as error:
                yield Record(name, problem=f"has a {self._noun} that cannot be read: {error}")
                continue
            if not content:
                yield Record(name, problem=f"has no {self._noun}")
            else:
                try:
                    yield Record(name, content, words(caption))
                except ValueError as error:
                    yield Record(name, problem=f"has no caption: {self._caption} {error}")


_ARCHIVES = (
    "zip",
    "tar",
    "hf",
)  # whose files `datasets` names by an address; other addresses are the data's own, and not asked


def _content(picture: Mapping[str, Any], protocols: Sequence[str]) -> bytes | Path | None:
    """Of a cell of a table: its bytes, or the file that it names, which may be inside of an archive.

    Args:
        picture: its `bytes` and its `path`.
        protocols: of addresses that are opened.

    Raises:
        OSError: another address, or one where nothing can be read.
    """
    path = picture["path"]
    if picture["bytes"] or not path:
        return picture["bytes"]
    if "://" not in path:
        return Path(path)
    strange = {part.split("://")[0] for part in path.split("::") if "://" in part} - set(protocols)
    if strange:
        raise OSError(f"{shortened(path)} is an address, and none is asked because data say so")
    import fsspec  # type: ignore[import-untyped]

    with fsspec.open(path, "rb") as file:
        return file.read()
