"""The SHA-256 of the adapters published with the paper: a file that was renamed is still known.

Sources: the Git LFS pointers on the pages of https://huggingface.co/wangfuyun/PCM_Weights, commit
be60d4c3b22ff74dc88b8701d6745ef921896cc2, and nnll/mir/automata.py of https://github.com/darkshapes/nnll, which lists hashes
with their steps and guidance (series `pcm`), among them those of https://huggingface.co/Kijai/converted_pcm_loras_fp16.
Read at both: all but the two `normalcfg_8step` files and six of the seven fp16 copies (`pcm_sdxl_normalcfg_4step` was read);
for these nnll is the only source.
"""

from __future__ import annotations

import hashlib
import os

SHA256 = {
    "b80b27dd6504f1c3a7637237dda86bc7e26fa5766da30c4fc853c0a1d46bad31": "pcm_sd15_lcmlike_lora",
    "8f605ffde3616592deb37ed8c6bacb83fe98963c1fd0883c2a4f93787098aa45": "pcm_sd15_normalcfg_16step",
    "fa6acb94f11dba3bf4120af5a12e3c88cd2b9572d43ec1a6fb04eede9f32829e": "pcm_sd15_normalcfg_4step",
    "bff3d4499718b61455b0757b5f8d98fe23e73a768b538c82ecf91c693b69dbcd": "pcm_sd15_normalcfg_8step",
    "c7ac2fa3df3a5b7080ebe63f259ab13630014f104c93c3c706d77b05cc48506b": "pcm_sd15_smallcfg_16step",
    "4c5f27a727d12146de4b1d987cee3343bca89b085d12b03c45297af05ce88ef4": "pcm_sd15_smallcfg_2step",
    "29278bc86274fdfc840961e3c250758ff5e2dc4666d940f103e78630d5b879d3": "pcm_sd15_smallcfg_4step",
    "41a7f0b966d18f643d16c4401f0b5ef6b9ef7362c20e17128322f17874709107": "pcm_sd15_smallcfg_8step",
    "0365f6107250a4fed1b83e8ae6a070065e026a2ba54bff65f55a50284232bbe6": "pcm_sdxl_lcmlike_lora",
    "7eb353b2abcaabab6251ba4e17d6cbe2e763feb0674b0f950555552212b44621": "pcm_sdxl_normalcfg_16step",
    "9f7f13bb019925eacd89aeff678e4fd831f7b60245b986855dff6634aee4eba9": "pcm_sdxl_normalcfg_4step",
    "7f04ba8911b4c25ef2c7cbf74abcb6daa3b4f0e4bc6a03896bdae7601f2f180b": "pcm_sdxl_normalcfg_8step",
    "3442eff271aa3b60a094fd6f9169d03e49e4051044a974f6fcf690507959191f": "pcm_sdxl_smallcfg_16step",
    "e1f600491bb8e0cd94f41144321e44fdb2cb346447f31e71f6e53f1c24cccfbf": "pcm_sdxl_smallcfg_2step",
    "212150d7953627fb89df99aad579d6763645a1cb2ef26b19fee8b398d5e5ff4d": "pcm_sdxl_smallcfg_4step",
    "56ed9dc9f51f4bb0d6172e13b7947f215c347fc0da341c8951b2c12b9507d09e": "pcm_sdxl_smallcfg_8step",
    # the fp16 copies
    "04ea827435d5750e63d113dc509174b4f6e8a069ff8f91970c3d25299c10b1f8": "pcm_sdxl_normalcfg_16step",
    "a85cf70ac16ed42011630a5cd6b5927722cb7c40a2107eff85e2670f9a38c893": "pcm_sdxl_normalcfg_4step",
    "3b9c970a3e4c0e182931e71b3f769c1956f16c6b06db98b4d67236790d4d0b1d": "pcm_sdxl_normalcfg_8step",
    "13fb038025ce9dad93b8ee1b67fc81bac8affb59a77b67d408d286e0b0365a1d": "pcm_sdxl_smallcfg_16step",
    "242cbe4695fe3f2e248faa71cf53f2ccbf248a316973e4b2f38ab9e34f35a5ab": "pcm_sdxl_smallcfg_2step",
    "d0bf40a7f280829195563486bec7253f043a06b1f218602b20901c367641023e": "pcm_sdxl_smallcfg_4step",
    "e80fcf46d15f4d3821d3d9611bdb3022a4a8b647b2536833b168d317a91e4f74": "pcm_sdxl_smallcfg_8step",
}
# Whole megabytes that the published files have (134.6 and 393.9 MB): others need not be read to the end.
_MEGABYTES = (134, 393)


def published_name(path: str | os.PathLike) -> str | None:
    """The published name of a file, told by its contents; None for any other file."""
    if os.path.getsize(path) // 10**6 not in _MEGABYTES:
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return SHA256.get(digest.hexdigest())
