"""Adapter files that are damaged, cut off, or made to mislead: read as what they are, or refused by name."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import fields

import pytest
import torch
from fuzzing import damaged, edits, floats, fuzz, integers, json_texts, json_values, refused, texts
from hypothesis import strategies as st
from safetensors.torch import save

from pcm_scheduler import AdapterSettings, read_settings
from pcm_scheduler.lora_file import convert_adapter, describe, inspect_adapter, read_lora, read_whole_lora
from pcm_scheduler.lora_layouts import METADATA_KEY, sort_tensors
from pcm_scheduler.phases import PhaseGrid

pytestmark = pytest.mark.hard

MODULE = "mid_block.attentions.0.proj_in"
KOHYA = "lora_unet_" + MODULE.replace(".", "_")
SETTINGS = AdapterSettings("sd15", PhaseGrid.even(4).edges, 50, beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
TENSORS = {
    f"{KOHYA}.lora_down.weight": torch.ones(2, 3),
    f"{KOHYA}.lora_up.weight": torch.ones(3, 2),
    f"{KOHYA}.alpha": torch.tensor(2.0),
}
DOTTED = {f"unet.{MODULE}.lora_A.weight": torch.ones(2, 3), f"unet.{MODULE}.lora_B.weight": torch.ones(3, 2)}
METADATA = {"unet.r": 2, "unet.lora_alpha": 1, "unet.alpha_pattern": {f"^{MODULE}": 4}, "unet.use_rslora": False}

header_values = st.one_of(
    texts,
    integers.filter(lambda n: n.bit_length() < 10_000).map(str),
    floats.map(repr),
    st.lists(st.integers(0, 1000), max_size=5).map(lambda edges: ",".join(map(str, edges))),
    st.sampled_from(["0,239,499,739,999", "999", "True", "epsilon", "sd15", "sdxl", "1_000", "٣", "0,,999", "1" * 5000]),
)


def headers():
    """A valid header with some entries replaced, removed or added."""
    names = [f"pcm.{field.name}" for field in fields(AdapterSettings)] + ["pcm.version", "pcm.unheard_of", "pcm."]
    changes = st.dictionaries(st.sampled_from(names), st.one_of(st.none(), header_values), max_size=4)
    return changes.map(lambda told: {k: v for k, v in (SETTINGS.to_header() | told).items() if v is not None})


def check_settings(settings: AdapterSettings | None) -> None:
    """Of what is accepted nothing is lost on the way to a file and back, and it can be sampled with."""
    if settings is None:
        return
    assert AdapterSettings.from_header(settings.to_header()) == settings
    numbers = (settings.guidance_scale, settings.training_guidance_scale, settings.eta)
    assert all(math.isfinite(number) for number in numbers)
    assert len(settings.grid.sampling_timesteps(settings.num_inference_steps)) == settings.num_inference_steps


def test_adapter_headers():
    def check(header):
        found = []
        if not refused(lambda: found.append(AdapterSettings.from_header(header)), names="header"):
            check_settings(found[0])

    fuzz("adapter headers", headers(), check)


patterns = st.one_of(
    st.text("^$.*\\+([a-z|0_", max_size=12),
    st.sampled_from([MODULE, f"^{MODULE}$", "proj_in", ".*proj_in", "(a+)+$", "(.*)*x", "(((", ".*.*.*.*.*.*.*.*x", "\\d+"]),
)
metadata = st.one_of(
    json_texts,
    json_values.map(json.dumps),
    st.fixed_dictionaries(
        {key: st.just(value) for key, value in METADATA.items()},
        optional={
            "lora_alpha": st.one_of(json_values, integers.filter(lambda n: n.bit_length() < 10_000)),
            "alpha_pattern": st.one_of(json_values, st.dictionaries(patterns, json_values, max_size=4)),
            "use_rslora": json_values,
        },
    ).map(json.dumps),
    st.integers(60, 3000).map(lambda n: json.dumps({"unet.alpha_pattern": {f".*{i}": 1 for i in range(n)}})),
)


def test_adapter_metadata():
    """diffusers' own entry of the header, whose patterns are somebody else's to write."""

    def check(text):
        found = []
        if not refused(lambda: found.append(sort_tensors(DOTTED, {METADATA_KEY: text})), names=METADATA_KEY):
            assert math.isfinite(found[0].alpha(MODULE.replace(".", "_")))

    fuzz("adapter metadata", metadata, check)


def safetensors_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


sizes = st.one_of(st.integers(0, 4), st.sampled_from([2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1]))
shapes = st.one_of(st.lists(sizes, max_size=4), st.integers(0, 100).map(lambda n: [1] * n), json_values)
offsets = st.one_of(st.lists(st.one_of(st.integers(0, 64), sizes), max_size=3), json_values)
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E5M2", "F8_E4M3", "U16", "C64", "F4", "F8_E8M0", "?"]
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U16": 2, "C64": 8}
keys = st.one_of(
    st.sampled_from([*TENSORS, *DOTTED, f"{KOHYA}.dora_scale", "unet." * 200 + "alpha", "lora_unet_" + "a" * 5000 + ".alpha"]),
    texts.filter(lambda text: "\ud800" not in text),
)


@st.composite
def crafted(draw) -> bytes:
    """A header that says anything of its tensors, over data that may or may not be there."""
    entries = {}
    for key in draw(st.lists(keys, max_size=4)):
        entry = {"dtype": draw(st.sampled_from(DTYPES)), "shape": draw(shapes), "data_offsets": draw(offsets)}
        entries[key] = draw(st.one_of(st.just(entry), json_values))
    told = draw(st.one_of(headers(), json_values))
    header = json.dumps({"__metadata__": told} | entries if draw(st.booleans()) else entries).encode()
    if draw(st.integers(0, 9)) == 0:
        header = draw(json_texts).encode(errors="replace")
    length = draw(st.one_of(st.none(), st.none(), sizes.filter(lambda n: 0 <= n < 2**64)))
    return safetensors_file(header, bytes(draw(st.sampled_from([0, 24, 64, 500]))), length)


@st.composite
def laid_out(draw) -> bytes:
    """Tensors one after the other as they should be, of shapes and kinds that no LoRA has."""
    entries, end = {}, 0
    for key in draw(st.lists(keys, min_size=1, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        if 0 in shape:
            shape[shape.index(0) :] = [0, draw(sizes.filter(lambda n: n >= 0))]
        begin, end = end, end + math.prod(shape) * BYTES.get(dtype, 1)
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return safetensors_file(json.dumps(entries).encode(), bytes(range(256)) * (end // 256) + bytes(end % 256))


WHOLE = [save(TENSORS, SETTINGS.to_header()), save(DOTTED, SETTINGS.to_header() | {METADATA_KEY: json.dumps(METADATA)})]
files = st.one_of(
    st.tuples(st.sampled_from(WHOLE), edits).map(lambda found: damaged(*found)), crafted(), laid_out(), st.binary(max_size=40)
)


def test_adapter_files(tmp_path):
    path = tmp_path / "adapter.safetensors"

    def check(content):
        path.write_bytes(content)
        found = []
        if not refused(lambda: found.append(read_settings(path)), names=path.name):
            check_settings(found[0])
        for read in (read_lora, inspect_adapter, describe):
            refused(lambda read=read: read(path), names=path.name)
        whole = []
        if not refused(lambda: whole.append(read_whole_lora(path)), names=path.name):
            for name, parts in whole[0].modules.items():
                assert parts["up"].shape[1] == parts["down"].shape[0]
                assert (parts["up"].flatten(1) @ parts["down"].flatten(1)).numel() >= 0, name
            for layout in ("kohya", "diffusers"):
                new = tmp_path / "new.safetensors"
                if not refused(lambda layout=layout: convert_adapter(path, new, layout), names=path.name):  # noqa: B023
                    assert read_whole_lora(new).modules.keys() == whole[0].modules.keys()

    fuzz("adapter files", files, check)
