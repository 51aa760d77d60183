"""Write the nodes' English texts to `locales/en`, in the form that ComfyUI's frontend looks up.

    python examples/comfyui/write_locales.py object_info.json

The argument is what a ComfyUI with these nodes answers to GET /object_info. Other languages are translated from these files.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

CATEGORY = "phased consistency"
LOCALES = Path(__file__).parents[2] / "locales"


def slot_texts(name: str, tooltip: str | None) -> dict[str, str]:
    """The entry of one input or output."""
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def node_texts(node: dict[str, Any]) -> dict[str, Any]:
    """The entry of one node in nodeDefs.json; inputs and outputs in the schema's order, hidden inputs left out.

    Args:
        node: of object_info.
    """
    inputs = {}
    for kind in ("required", "optional"):
        for name, (_, *options) in node["input"].get(kind, {}).items():
            inputs[name] = slot_texts(name, options[0].get("tooltip") if options else None)
    names = node["output_name"]
    tooltips = node.get("output_tooltips") or [None] * len(names)
    outputs = {str(i): slot_texts(*texts) for i, texts in enumerate(zip(names, tooltips, strict=True))}
    head = {"display_name": node["display_name"], "description": node["description"]}
    return head | {"inputs": inputs, "outputs": outputs}


def english(object_info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each file holds, by its name.

    Args:
        object_info: of any nodes; others than this repository's are left out.
    """
    ours = {name: node for name, node in object_info.items() if node["category"].split("/")[0] == CATEGORY}
    parts = [part for node in ours.values() for part in node["category"].split("/")]
    return {
        "nodeDefs.json": {name: node_texts(node) for name, node in ours.items()},
        "main.json": {"nodeCategories": {part: part for part in parts}},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write to a temporary name and rename; the folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write locales/en from ComfyUI's object_info.")
    parser.add_argument("object_info", type=Path, help="a file with the answer to GET /object_info")
    parser.add_argument("--output", type=Path, default=LOCALES / "en", help="a folder; default: locales/en")
    arguments = parser.parse_args()
    files = english(json.loads(arguments.object_info.read_text(encoding="utf-8")))
    if not files["nodeDefs.json"]:
        parser.error(f"{arguments.object_info} has no node of the category {CATEGORY!r}: are the nodes installed there?")
    for name, content in files.items():
        write_json(arguments.output / name, content)
    print(f"{len(files['nodeDefs.json'])} nodes in {arguments.output}")


if __name__ == "__main__":
    main()
