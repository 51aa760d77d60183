"""Weights that people bring: where they must be, and what is said when they are not there. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file

UNASKED = "Nothing is downloaded unasked."


def library(name: str, setting: str, package: str) -> ModuleType:
    """An optional library.

    Args:
        name: that it is imported by.
        setting: the value that needs it, for the message.
        package: that pip installs.

    Raises:
        ValueError: it is not installed; how to install it.
    """
    if find_spec(name) is None:
        raise ValueError(f"{setting} needs the library {name}, which is not installed: pip install {package}")
    return import_module(name)


def local_file(path: str | Path, setting: str, what: str, source: str) -> Path:
    """The path of a file that is there.

    Args:
        path: that the configuration names.
        setting: which names it.
        what: the file holds.
        source: where it comes from, as a sentence.

    Raises:
        FileNotFoundError: it is not there; which file, where it is looked for, and where it comes from.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{setting} must be the path of {what}; there is no file '{path}'. {source} {UNASKED}")
    return Path(path)


def local_folder(path: str | Path, setting: str, what: str, files: tuple[str, ...], source: str) -> Path:
    """The path of a folder that has what it must have.

    Args:
        path, setting, what, source: as in `local_file`.
        files: patterns, each of which some file in the folder must match.

    Raises:
        FileNotFoundError: the folder, or a file in it, is not there; which ones.
    """
    folder = Path(path)
    if not path or not folder.is_dir():
        raise FileNotFoundError(f"{setting} must be a folder with {what}; there is no folder '{path}'. {source} {UNASKED}")
    missing = [pattern for pattern in files if not any(folder.glob(pattern))]
    if missing:
        raise FileNotFoundError(f"{setting}: {folder} lacks {' and '.join(missing)} of {what}. {source} {UNASKED}")
    return folder


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` file, or of a torch file that holds tensors and no code."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)


def fill(network: torch.nn.Module, state: dict[str, torch.Tensor], file: Path, setting: str, what: str) -> None:
    """Load a state, all of it.

    Raises:
        ValueError: it is not the network's; `file`, `setting` and `what` the network is are for the message.
    """
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{setting}: {file} is not the state of {what}: {error}") from error


def call_factory(factory: str, path: str, device: torch.device | str, setting: str) -> Any:
    """What a named function of the user's returns; a module is frozen and moved to the device.

    Args:
        factory: `package.module:name`, or `folder/file.py:name`, which is imported with its folder on the path.
        path: what it is called with, if anything.
        device: for modules.
        setting: the name of the configuration's part, for messages.

    Raises:
        FileNotFoundError: the path is given and not there.
        ValueError: no such module or function.
    """
    where, _, name = factory.rpartition(":")  # the last, for a drive of Windows has one too
    try:
        function = getattr(_module_in(Path(where)) if where.endswith(".py") else import_module(where), name)
    except (ImportError, AttributeError, ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{setting}.factory must be `package.module:name` or `folder/file.py:name`; got '{factory}': {error}"
        ) from error
    if path and not Path(path).exists():
        raise FileNotFoundError(f"{setting}.path: there is no '{path}', which {factory} is called with. {UNASKED}")
    made = function(Path(path)) if path else function()
    return made.to(device).eval().requires_grad_(False) if isinstance(made, torch.nn.Module) else made


def _module_in(file: Path) -> ModuleType:
    """The module in a file, whatever others are called the same; its folder is on the path for what it imports itself."""
    file = file.resolve()
    name = f"_factory_{hashlib.sha256(str(file).encode(errors='surrogatepass')).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
