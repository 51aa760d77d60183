"""What benchmarks share: figures kept from run to run, their tables in README.md, cases by name, a process of one
measurement, a clock.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import numpy as np
import torch
from tabulate import tabulate

HERE = Path(__file__).parent
README = HERE / "README.md"
UNMEASURED = "unmeasured"

Case = TypeVar("Case")
Figures = dict[str, Any]
"""What was measured of one case; JSON."""

# Dense matrix products in bfloat16, without sparsity, in operations a second: the makers' data sheets.
_PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165e12}


def peak_operations(device: str) -> float | None:
    """Of the device, in bfloat16; None where it is not known."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def conditions(device: str) -> str:
    """Where and with what."""
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {threads}"
    return f"{device} ({where}), torch {torch.__version__}, diffusers {diffusers.__version__}"


class Book:
    """Figures by device and case, in a JSON file that every case is added to once it is measured.

    A machine with a GPU and one without fill the same file; tables say `unmeasured` of what is in none.

    Args:
        path: of the file; it need not be there yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self.content: dict[str, dict[str, Figures]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def get(self, device: str, case: str) -> Figures | None:
        """What is known of a case."""
        return self.content.get(device, {}).get(case)

    def keep(self, device: str, case: str, figures: Figures) -> None:
        """Into the file, with the conditions."""
        self.content.setdefault(device, {})[case] = figures | {"conditions": conditions(device)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        temporary.replace(self.path)

    def conditions(self, device: str) -> str:
        """All under which the device's figures were measured."""
        found = {figures["conditions"] for figures in self.content.get(device, {}).values()}
        return "; ".join(sorted(found)) or device


def table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Markdown."""
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def write_section(name: str, text: str) -> None:
    """Replace what README.md has between `<!-- name -->` and the next `<!-- end -->`.

    Raises:
        ValueError: it has no such place.
    """
    pattern = re.compile(f"<!-- {re.escape(name)} -->.*?<!-- end -->", re.DOTALL)
    before = README.read_text(encoding="utf-8")
    if not pattern.search(before):
        raise ValueError(f"{README} has no <!-- {name} --> ... <!-- end -->.")
    temporary = README.with_suffix(".tmp")
    temporary.write_text(pattern.sub(lambda _: f"<!-- {name} -->\n{text}\n<!-- end -->", before), encoding="utf-8")
    temporary.replace(README)


def named_cases(parser: argparse.ArgumentParser, names: Sequence[str], known: Mapping[str, Case], device: str) -> list[Case]:
    """Those that --only asks for; the parser ends the run with a list of all where a name is of none."""
    for name in names:
        if name not in known:
            parser.error(f"--only {name!r} is no case of {device}; they are:\n" + "\n".join(known))
    return [known[name] for name in names]


def alone(function: Callable[..., Any], *arguments: object) -> Any:
    """What the function returns in a fresh process, which has the largest memory of this call and of nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], device: str = "cpu") -> float:
    """Of one call, the device's work included."""
    synchronize(device)
    begun = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begun


def in_turns(functions: dict[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each after a call to warm up, A B C A B C, so that what else the machine does meets all of them."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return {name: statistics.median(found) for name, found in times.items()}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of y = c x^p: the slope of the least-squares line through the logarithms; at least two points, all positive."""
    return float(np.polyfit(np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float)), 1)[0])


class Clock:
    """Seconds that are spent in chosen methods, on a GPU by its own events.

    Args:
        device: cpu or cuda.
        methods: by a name, the object and the method's name.
    """

    def __init__(self, device: str, methods: dict[str, tuple[object, str]]):
        self._device, self._methods = device, methods
        self._seconds = dict.fromkeys(methods, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the methods are timed."""
        for name, (owner, method) in self._methods.items():
            setattr(owner, method, self._timed(name, getattr(owner, method)))
        try:
            yield
        finally:
            for owner, method in self._methods.values():
                delattr(owner, method)  # the class's own is there again

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            if self._device == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                result = method(*arguments, **named)
                end.record()
                self._events.append((name, begin, end))
                return result
            begun = time.perf_counter()
            result = method(*arguments, **named)
            self._seconds[name] += time.perf_counter() - begun
            return result

        return called

    def read(self) -> dict[str, float]:
        """Seconds of each since the last reading."""
        synchronize(self._device)
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        found = self._seconds
        self._seconds, self._events = dict.fromkeys(self._methods, 0.0), []
        return found
