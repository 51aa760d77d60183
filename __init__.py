"""ComfyUI loads this folder by its path and asks for `comfy_entrypoint`. Everywhere else there is nothing to see here."""

try:
    import comfy_api.latest  # noqa: F401  (there is no ComfyUI without it)
except ImportError:
    pass
else:
    from .comfy_nodes import comfy_entrypoint

    WEB_DIRECTORY = "./comfy_nodes/web"  # the nodes' help pages

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
