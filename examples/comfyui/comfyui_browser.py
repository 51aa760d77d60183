"""ComfyUI's own front-end in a headless Chromium of the system's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfyui_server import Server
from comfyui_workflows import Graph

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_ADD_NOTE = """([text, width]) => {
    const note = LiteGraph.createNode("MarkdownNote");
    note.title = "What this does";
    note.widgets[0].value = text;
    note.setSize([width, 200]);
    const left = Math.min(...app.graph.nodes.map(n => n.pos[0]));
    const top = Math.min(...app.graph.nodes.map(n => n.pos[1]));
    note.pos = [left - width - 40, top];
    app.graph.add(note);
}"""
_ALL_FIT = "() => app.extensionManager.command.execute('Comfy.Canvas.FitView')"
_FRAME = """(type) => {
    const nodes = app.graph.nodes.filter(n => !type || n.type === type);
    const { scale, offset } = app.canvas.ds;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    const x = Math.min(...nodes.map(n => n.pos[0])), y = Math.min(...nodes.map(n => n.pos[1] - 30));
    const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0])), below = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
    return {
        x: canvas.left + (x + offset[0]) * scale, y: canvas.top + (y + offset[1]) * scale,
        width: (right - x) * scale, height: (below - y) * scale,
    };
}"""
_CENTER = """(type) => {
    const node = app.graph.nodes.find(n => n.type === type);
    app.canvas.ds.scale = 1;
    app.canvas.centerOnNode(node);
    app.canvas.setDirty(true, true);
}"""
_UNKNOWN = (
    """() => app.graph.nodes.filter(n => n.has_errors || !(n.type in LiteGraph.registered_node_types)).map(n => n.type)"""
)


class FrontEnd:
    """A page with ComfyUI's front-end.

    Args:
        page: of Playwright, on which it is open.
    """

    def __init__(self, page: Any):
        self.page = page
        self.wait()

    def reload(self) -> None:
        """Forget graph and pictures: those of a run stay with the number of their node."""
        self.page.reload()
        self.wait()

    def wait(self) -> None:
        """Until the front-end is there."""
        self.page.wait_for_function("() => window.app && app.graph && app.extensionManager", timeout=120_000)
        self.page.wait_for_timeout(3000)

    def open_api_form(self, graph: Graph, name: str, note: str | None = None) -> None:
        """Lay out a graph given in API form, with a note beside it."""
        self.page.evaluate("async ([g, n]) => { await app.loadApiJson(g, n); }", [graph, name])
        self.page.wait_for_timeout(1500)  # pictures load, and their nodes grow
        self.page.evaluate("() => app.graph.arrange()")
        if note is not None:
            self.page.evaluate(_ADD_NOTE, [note, 320])

    def open_workflow(self, workflow: dict[str, Any]) -> None:
        """Open a workflow as from a file."""
        self.page.evaluate("async (w) => { await app.loadGraphData(w); }", workflow)

    def workflow(self) -> dict[str, Any]:
        """The open workflow as it would be saved."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")

    def api_form(self) -> Graph:
        """What the queue button would post."""
        graph = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in graph.items()}

    def unknown_nodes(self) -> list[str]:
        """Types of nodes that are red or missing."""
        return self.page.evaluate(_UNKNOWN)

    def queue(self, timeout: float = 120) -> None:
        """Press the queue button and wait until all is done."""
        self.page.evaluate("""() => {
            window.finished = null;
            for (const kind of ["execution_success", "execution_error"])
                app.api.addEventListener(kind, event => { window.finished = [kind, event.detail]; }, { once: true });
        }""")
        self.page.locator("[data-testid='queue-button'], .queue-button-group button").first.click()
        self.page.wait_for_function("() => window.finished", timeout=1000 * timeout)
        kind, detail = self.page.evaluate("() => window.finished")
        if kind != "execution_success":
            raise RuntimeError(detail.get("exception_message", kind))
        self.page.wait_for_timeout(800)  # the pictures on the nodes load

    def picture(self, path: str, node_type: str | None = None, margin: int = 12, quality: int | None = None) -> None:
        """A screenshot of the whole graph, or of the first node of a type."""
        if node_type is None:
            self.page.evaluate(_ALL_FIT)
        else:
            self.page.evaluate(_CENTER, node_type)
        self.page.wait_for_timeout(700)
        frame, window = self.page.evaluate(_FRAME, node_type), self.page.viewport_size
        left, top = max(0, frame["x"] - margin), max(0, frame["y"] - margin)
        clip = {
            "x": left,
            "y": top,
            "width": min(frame["width"] + 2 * margin, window["width"] - left),
            "height": min(frame["height"] + 2 * margin, window["height"] - top),
        }
        options = {"type": "jpeg", "quality": quality} if quality else {}
        self.page.screenshot(path=path, clip=clip, **options)


@contextmanager
def front_end(server: Server) -> Iterator[FrontEnd]:
    """The front-end of a running server, open and idle."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1800, "height": 1100})
        page.goto(server.url)
        yield FrontEnd(page)
        browser.close()
