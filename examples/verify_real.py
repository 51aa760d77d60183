"""Check this repository against real SD1.5 or SDXL weights, an adapter and ComfyUI, in one command.

    python examples/verify_real.py --model stable-diffusion-v1-5/stable-diffusion-v1-5
    python examples/verify_real.py --model sdxl.safetensors --family sdxl --comfyui ~/ComfyUI \
        --adapter pcm_sdxl_smallcfg_4step_converted.safetensors --device cuda --dtype float16
    python examples/verify_real.py --random sd15 --dtype bfloat16       the true shape with random weights: no download

Prints a line for every check and what it found; exits with 1 if one fails. What was not asked for is listed as not run.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tabulate import tabulate
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_training.backbones import load_backbone
from lora_training.backbones.full_size import ADAPTED_MODULES, UNET_CONFIGS
from lora_training.config import TARGET_SETS, ModelConfig
from pcm_scheduler import AdapterSettings, PCMScheduler, load_pcm_lora
from pcm_scheduler.lora_file import inspect_adapter, kohya_state_dict, read_tensors, write_adapter
from pcm_scheduler.phases import PhaseGrid

STEP_COUNTS = (1, 2, 4, 8, 16)
SOLVER_STEPS = {"sd15": 50, "sdxl": 40}
RANK, ALPHA = 4, 3.0  # unlike each other, so that a lost alpha shows
UNET_WIDTHS = {"sd15": (320, 640, 1280, 1280), "sdxl": (320, 640, 1280)}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class Result:
    """What a check found.

    Attributes:
        check: its name.
        outcome: `not run` if what it needs was not given.
        figure: what was measured, or why it was not run.
    """

    check: str
    outcome: Literal["pass", "FAIL", "not run"]
    figure: str

    @classmethod
    def judged(cls, check: str, passed: bool, figure: str) -> Result:
        """Pass or fail."""
        return cls(check, "pass" if passed else "FAIL", figure)


@dataclass(frozen=True)
class Setup:
    """What the checks are run on.

    Attributes:
        pipe: a Stable Diffusion pipeline, on its device, in its precision.
        family: `sd15` or `sdxl`.
        out: the folder that files are written to.
        latent_side: height and width of the latents that the UNet is asked about.
        adapter, weight_name: as `load_pcm_lora` takes them.
        num_phases: if the adapter does not say.
        comfyui: a checkout.
        prompts: of the contact sheet, one a column.
    """

    pipe: Any
    family: str
    out: Path
    latent_side: int
    adapter: str | None
    weight_name: str | None
    num_phases: int | None
    comfyui: Path | None
    prompts: tuple[str, ...]

    @property
    def tolerance(self) -> float:
        """Of two ways to compute what an adapter does, relative to what it does; a lost alpha would be a quarter."""
        return 1e-3 if self.pipe.unet.dtype == torch.float32 else 5e-2

    @torch.no_grad()
    def predict(self, timestep: int = 500) -> torch.Tensor:
        """The UNet's output (1, 4, side, side), float32, for the same drawn latents and conditioning every time."""
        unet, config = self.pipe.unet, self.pipe.unet.config
        draw = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw).to(unet.device, unet.dtype)

        latents, embeds = drawn(1, 4, self.latent_side, self.latent_side), drawn(1, 77, config.cross_attention_dim)
        added = None
        if config.addition_embed_type == "text_time":
            pooled = drawn(1, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
            pixels = float(self.latent_side * self.pipe.vae_scale_factor)
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]]).to(drawn(1))}
        t = torch.tensor([timestep], device=unet.device)
        return unet(latents, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample.float()


def check_timesteps(setup: Setup) -> Result:
    """PCMScheduler made from the pipeline's own scheduler stops on the trained edges at every step count."""
    solver_steps, wrong = SOLVER_STEPS[setup.family], []
    for phases in (2, 4, 8):
        scheduler = PCMScheduler.from_config(setup.pipe.scheduler.config, num_phases=phases, num_solver_steps=solver_steps)
        edges = set(scheduler.grid.edges) - {0}
        for steps in STEP_COUNTS:
            scheduler.set_timesteps(steps)
            stops = set(scheduler.timesteps.tolist())
            if not (stops <= edges if steps <= phases else edges <= stops) or len(stops) != steps or max(stops) != 999:
                wrong.append(f"{phases} phases, {steps} steps: {sorted(stops)}")
    four = ", ".join(map(str, PhaseGrid.even(4, solver_steps).sampling_timesteps(4)))
    return Result.judged("timesteps lie on the edges", not wrong, "; ".join(wrong) or f"2, 4, 8 phases; 4 of 4: {four}")


def check_ddim(setup: Setup) -> Result:
    """Along DDIM's own timesteps, with the same predictions, PCMScheduler computes what DDIMScheduler does."""
    kept = setup.pipe.scheduler.config
    ddim = DDIMScheduler.from_config(
        kept, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, steps_offset=0, thresholding=False
    )
    ours = PCMScheduler.from_config(kept, num_phases=4, num_solver_steps=SOLVER_STEPS[setup.family])
    draw = torch.Generator().manual_seed(0)
    worst = 0.0
    for steps in STEP_COUNTS[:-1]:  # at 16 DDIMScheduler steps off its own timesteps: 1000 is no multiple of 16
        ddim.set_timesteps(steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these are not the trained edges, on purpose
            ours.set_timesteps(timesteps=ddim.timesteps)
        ours_x = theirs_x = torch.randn(1, 4, setup.latent_side, setup.latent_side, generator=draw)
        for t in ddim.timesteps:
            prediction = torch.randn(ours_x.shape, generator=draw)
            ours_x = ours.step(prediction, t, ours_x, return_dict=False)[0]
            theirs_x = ddim.step(prediction, t, theirs_x, return_dict=False)[0]
        worst = max(worst, ((ours_x - theirs_x).abs().max() / theirs_x.abs().max()).item())
    return Result.judged(
        "steps agree with DDIM's", worst < 1e-4, f"largest relative difference {worst:.1e} at 1, 2, 4, 8 steps"
    )


def check_pipeline(setup: Setup) -> Result:
    """The pipeline runs with PCMScheduler and visits the edges."""
    visited: list[int] = []

    def note(pipe: Any, i: int, t: torch.Tensor, kwargs: dict) -> dict:
        visited.append(int(t))
        return kwargs

    with _scheduler_of(setup) as scheduler:
        latents = _sample(setup, 4, 1.0, output_type="latent", callback_on_step_end=note)
        expected = list(scheduler.grid.sampling_timesteps(4))
    passed = visited == expected and bool(latents.isfinite().all())
    return Result.judged(
        "the pipeline runs with PCMScheduler", passed, f"visited {visited}, latents' deviation {latents.float().std():.3g}"
    )


def check_round_trip(setup: Setup) -> Result:
    """An adapter in all kinds of module, written as the trainer writes it and loaded, is the adapter that was there."""
    unet, path = setup.pipe.unet, setup.out / "random_adapter.safetensors"
    plain = setup.predict()
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGET_SETS["all"]), init_lora_weights=False)
    unet.add_adapter(config, adapter_name="trained")
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            # numbers that fp16 and bf16 both hold
            parameter.data = (0.5 * parameter.data).to(torch.bfloat16).to(torch.float16).to(parameter.dtype)
    before = setup.predict()
    state = get_peft_model_state_dict(unet, adapter_name="trained")
    modules = {key.rpartition(".lora_")[0] for key in state}
    grid = PhaseGrid.even(4, SOLVER_STEPS[setup.family])
    settings = AdapterSettings(setup.family, grid.edges, grid.num_solver_steps)
    settings = AdapterSettings(**{**vars(settings), "prediction_type": setup.pipe.scheduler.config.prediction_type})
    write_adapter(path, state, dict.fromkeys(modules, ALPHA), settings, "random")
    unet.delete_adapters("trained")
    with _scheduler_of(setup):
        loaded = load_pcm_lora(setup.pipe, path)
        after = setup.predict()
    setup.pipe.unload_lora_weights()
    effect = (before - plain).abs().max().item()
    difference, left = ((a - b).abs().max().item() / effect for a, b in ((after, before), (setup.predict(), plain)))
    passed = loaded == settings and max(difference, left) < setup.tolerance
    return Result.judged(
        "an adapter survives file and loading",
        passed,
        f"{len(modules)} modules, rank {RANK}, alpha {ALPHA:g}: difference {difference:.1e} of its effect, {effect:.1e}",
    )


def check_adapter(setup: Setup) -> Result:
    """A given adapter is whole, every module of it gets into the UNet, and it acts."""
    check = "the given adapter loads in full"
    if setup.adapter is None:
        return Result(check, "not run", "needs --adapter")
    plain = setup.predict()
    with _adapter_in(setup) as (path, settings):
        found = inspect_adapter(path)
        placed = sum("pcm" in m.lora_A for m in setup.pipe.unet.modules() if isinstance(m, LoraLayer))
        adapted = setup.predict()
    passed = placed == found.modules and not found.problems and bool(adapted.isfinite().all())
    effect = (adapted - plain).abs().max().item()
    figure = f"{placed} of {found.modules} modules, effect {effect:.1e}, {settings.grid.num_phases} phases"
    return Result.judged(check, passed, "; ".join([figure, *found.problems]))


def check_comfyui_keys(setup: Setup) -> Result:
    """ComfyUI's loader finds a place for every key of the trainer's files, or of the given adapter."""
    check = "ComfyUI maps every key"
    if setup.comfyui is None:
        return Result(check, "not run", "needs --comfyui")
    if setup.adapter is not None:
        with _adapter_in(setup) as (path, _):
            tensors = read_tensors(path)[0]
    else:
        tensors = full_size_adapter(setup.family)
    expected = len({key.split(".")[0] for key in tensors})
    found = comfyui_placement(setup.comfyui, setup.family, tensors)
    # an adapter of a smaller model has the names of the full one, but not its shapes
    full_size = tuple(setup.pipe.unet.config.block_out_channels) == UNET_WIDTHS[setup.family]
    lost = [*found.left_over, *(found.misfits if full_size else ())]
    figure = f"{len(found.patches)} of {expected} modules, {len(found.left_over)} of {len(tensors)} keys left over"
    return Result.judged(check, len(found.patches) == expected and not lost, ", such as ".join([figure, *lost[:1]]))


def check_comfyui_sigmas(setup: Setup) -> Result:
    """ComfyUI's table of sigmas is this pipeline's sigma / alpha."""
    check = "ComfyUI's sigmas are the scheduler's"
    if setup.comfyui is None:
        return Result(check, "not run", "needs --comfyui")
    with _comfyui(setup.comfyui):
        from comfy.model_sampling import ModelSamplingDiscrete

        theirs = ModelSamplingDiscrete().sigmas
    alphas_cumprod = PCMScheduler.from_config(setup.pipe.scheduler.config).alphas_cumprod
    ours = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    difference = ((ours - theirs) / theirs).abs().max().item()
    # 1 - alphas_cumprod has few digits left in float32 at the low end
    return Result.judged(check, difference < 1e-4, f"relative difference {difference:.1e}, largest sigma {theirs[-1]:.4f}")


def check_pictures(setup: Setup) -> Result:
    """A contact sheet of the given adapter: a row for 1, 2, 4 and 8 steps each, the same noise in every row."""
    check = "pictures"
    if setup.adapter is None:
        return Result(check, "not run", "needs --adapter")
    with _adapter_in(setup) as (_, settings):
        rows = [_sample(setup, steps, settings.guidance_scale, eta=settings.eta) for steps in STEP_COUNTS[:4]]
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(setup.prompts), height * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * height))
    path = setup.out / "contact_sheet.png"
    sheet.save(path)
    flat = [p for row in rows for p in row if p.convert("L").getextrema()[0] == p.convert("L").getextrema()[1]]
    return Result.judged(check, not flat, f"{path}; {len(flat)} of {len(rows) * len(setup.prompts)} are one colour. Look at it")


CHECKS: tuple[Callable[[Setup], Result], ...] = (
    check_timesteps, check_ddim, check_pipeline, check_round_trip, check_adapter, check_comfyui_keys, check_comfyui_sigmas,
    check_pictures,
)  # fmt: skip


def _sample(setup: Setup, steps: int, guidance_scale: float, **kwargs: Any) -> Any:
    """The pipeline's output for the setup's prompts, from the same noise every time."""
    side = setup.latent_side * setup.pipe.vae_scale_factor
    generator = [torch.Generator().manual_seed(i) for i in range(len(setup.prompts))]
    return setup.pipe(
        list(setup.prompts), height=side, width=side, num_inference_steps=steps, guidance_scale=guidance_scale,
        generator=generator, **kwargs,
    ).images  # fmt: skip


@contextmanager
def _scheduler_of(setup: Setup) -> Iterator[PCMScheduler]:
    """PCMScheduler with 4 phases in the pipeline; the pipeline's own comes back afterwards."""
    kept = setup.pipe.scheduler
    setup.pipe.scheduler = PCMScheduler.from_config(kept.config, num_phases=4, num_solver_steps=SOLVER_STEPS[setup.family])
    try:
        yield setup.pipe.scheduler
    finally:
        setup.pipe.scheduler = kept


@contextmanager
def _adapter_in(setup: Setup) -> Iterator[tuple[Path, AdapterSettings]]:
    """The given adapter in the pipeline: its file and settings."""
    from pcm_scheduler.pipelines.load_pcm_lora import local_file

    assert setup.adapter is not None
    path = local_file(setup.adapter, setup.weight_name)
    with _scheduler_of(setup):
        settings = load_pcm_lora(setup.pipe, path, num_phases=setup.num_phases)
        try:
            yield path, settings
        finally:
            setup.pipe.unload_lora_weights()


def full_size_adapter(family: str, dora: bool = False) -> dict[str, torch.Tensor]:
    """The trainer's tensors for a full-size UNet, without storage: kohya's names, alpha, and DoRA scales if asked for."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGET_SETS["all"]))
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET_CONFIGS[family])
        unet.add_adapter(config)
    state = get_peft_model_state_dict(unet)
    if dora:  # PEFT cannot make magnitudes without weights to measure
        for key in [key for key in state if key.endswith("lora_B.weight")]:
            out, *rest = state[key].shape
            shape = (1, out, 1, 1) if len(rest) > 1 else (out,)
            state[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.empty(shape, device="meta")
    modules = {key.rpartition(".lora_")[0] for key in state}
    assert len(modules) == ADAPTED_MODULES[family]
    return kohya_state_dict(state, dict.fromkeys(modules, ALPHA))


@contextmanager
def _comfyui(path: Path) -> Iterator[None]:
    """ComfyUI's modules importable, on the CPU.

    Raises:
        ImportError: not a checkout, or one whose requirements are not installed; which.
    """
    sys.path.insert(0, str(path))
    try:
        from comfy.cli_args import args

        args.cpu = True
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"ComfyUI at {path} cannot be imported: {error}. Install its requirements here.") from error
    finally:
        sys.path.remove(str(path))


@dataclass(frozen=True)
class Placement:
    """What ComfyUI's loader makes of a LoRA file.

    Attributes:
        patches: by the weights of ComfyUI's model that get one.
        left_over: keys that it finds no place for, which ComfyUI itself only logs.
        misfits: weights whose shape is not the patch's, each with both shapes.
    """

    patches: dict[str, Any]
    left_over: tuple[str, ...]
    misfits: tuple[str, ...]


def comfyui_placement(path: Path, family: str, tensors: dict[str, torch.Tensor]) -> Placement:
    """Where ComfyUI's own loader puts the tensors of a LoRA file.

    Args:
        path: a ComfyUI checkout.
        family: of the full-size model whose key map is used.
        tensors: of the file; only alphas need be more than shapes.

    Raises:
        ImportError: ComfyUI cannot be imported.
    """
    with torch.device("meta"):
        diffusers_weights = UNet2DConditionModel(**UNET_CONFIGS[family]).state_dict()
    with _comfyui(path):
        import comfy.lora
        from comfy import model_detection

        unet_config = model_detection.unet_config_from_diffusers_unet(diffusers_weights, torch.float16)
        model_config = model_detection.model_config_from_unet_config(unet_config)
        model_config.set_inference_dtype(torch.float16, None)
        with torch.device("meta"):
            model = model_config.get_model({}, "", device=torch.device("meta"))
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        try:
            patches = comfy.lora.load_lora(dict(tensors), comfy.lora.model_lora_keys_unet(model, {}))
        finally:
            logging.getLogger().removeHandler(handler)
    weights, said, misfits = model.state_dict(), "lora key not loaded: ", []
    for name, patch in patches.items():
        up, down = patch.weights[:2]
        shape = (up.shape[0], *down.shape[1:])
        if shape != tuple(weights[name].shape):
            misfits.append(f"{name}, {tuple(weights[name].shape)} but {shape} in the file")
    return Placement(patches, tuple(m.removeprefix(said) for m in messages if m.startswith(said)), tuple(misfits))


def random_pipeline(family: str, dtype: torch.dtype) -> Any:
    """A pipeline whose UNet has the family's true shape and random weights; its VAE and text encoders are small."""
    torch.manual_seed(0)
    letters = [f"{c}{end}" for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    texts = [
        CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=0, eos_token_id=1, projection_dim=width,
        )
        for width in (768, 1280)
    ]  # fmt: skip
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that the UNet is never held in float32
    try:
        unet = UNet2DConditionModel(**UNET_CONFIGS[family])
    finally:
        torch.set_default_dtype(kept)
    parts = {
        "unet": unet.eval(),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16), norm_num_groups=8, latent_channels=4,
        ).to(dtype),
        "text_encoder": CLIPTextModel(texts[0]).to(dtype), "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    }  # fmt: skip
    if family == "sd15":
        return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    second = CLIPTextModelWithProjection(texts[1]).to(dtype)
    return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="hub id, diffusers folder or .safetensors checkpoint")
    source.add_argument("--random", choices=list(SOLVER_STEPS), help="random weights of this family's true shape instead")
    parser.add_argument("--family", choices=list(SOLVER_STEPS), default="sd15", help="of --model")
    parser.add_argument("--adapter", help="file, folder or hub id of an adapter to check and to draw with")
    parser.add_argument("--weight-name", help="the adapter's file in a folder or hub repository")
    parser.add_argument("--phases", type=int, help="if the adapter does not say")
    parser.add_argument("--comfyui", type=Path, help="a ComfyUI checkout whose requirements are installed here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: float16 on a GPU, else float32")
    parser.add_argument("--latent-side", type=int, help="default: the model's own size, or 8 with --random")
    parser.add_argument("--prompt", action="append", help="of the contact sheet; may be given several times")
    parser.add_argument("--out", type=Path, default=Path("outputs/verify_real"))
    return parser.parse_args(arguments)


def prepare(args: argparse.Namespace) -> Setup:
    """Load or make the model.

    Raises:
        ValueError: the model cannot be loaded, or is of another family.
    """
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "float16"))
    family = args.random or args.family
    model = ModelConfig(path=args.model or "", family=family)
    pipe = random_pipeline(family, dtype) if args.random else load_backbone(model).pipe
    pipe.to(args.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    args.out.mkdir(parents=True, exist_ok=True)
    return Setup(
        pipe, family, args.out, args.latent_side or (8 if args.random else pipe.unet.config.sample_size), args.adapter,
        args.weight_name, args.phases, args.comfyui,
        tuple(args.prompt or ["a lighthouse in a storm", "a portrait of an old sailor"]),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run every check; 1 if one fails."""
    args = parse(arguments)
    setup = prepare(args)
    results = []
    for check in CHECKS:
        try:
            results.append(check(setup))
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            results.append(Result(check.__name__.removeprefix("check_"), "FAIL", f"{type(error).__name__}: {error}"))
        print(f"{len(results)}/{len(CHECKS)} {results[-1].check}: {results[-1].outcome}", file=sys.stderr)
    unet = setup.pipe.unet
    size = sum(p.numel() for p in unet.parameters()) / 1e6
    print(f"{args.model or 'random ' + setup.family}: UNet of {size:.0f} M parameters, {unet.dtype}, {unet.device}")
    print(tabulate([(r.check, r.outcome, r.figure) for r in results], headers=["check", "result", "figure"]))
    return int(any(r.outcome == "FAIL" for r in results))


if __name__ == "__main__":
    sys.exit(main())
