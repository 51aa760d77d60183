"""The lowest versions are stated in two places, which agree."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def test_the_lowest_constraints_are_the_lower_bounds():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds: dict[str, Version] = {}  # the highest of them where an extra asks for more
    for requirement in map(Requirement, chain(project["dependencies"], *project["optional-dependencies"].values())):
        for lowest in (Version(part.version) for part in requirement.specifier if part.operator == ">="):
            bounds[requirement.name] = max(lowest, bounds.get(requirement.name, lowest))
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if not line.startswith("#")]
    assert {"torch", "diffusers", "transformers", "peft", "accelerate"} <= {name for name, _ in pinned}
    for name, version in pinned:
        assert Version(version) == bounds[name], name
