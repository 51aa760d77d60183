"""One optimisation step in the shape of work that other trainers of consistency LoRAs have, to measure ours against.

Written from reading two of them: PCM's own trainer of SD1.5 and SDXL (github.com/G-U-N/Phased-Consistency-Model, "PCM" below)
and diffusers' train_lcm_distill_lora_sd_wds.py ("LCM"). None of their code is here. What is as in theirs is which networks are
in memory, in which precision, and which of them run, on how much, in what order; the arithmetic between (a jump to a phase's
edge) costs nothing beside it and comes from `pcm_scheduler`, for both sides of the comparison alike.

What is left out, in favour of theirs: reading and decoding of pictures (their data loaders do it in other processes, so
pictures are here as pinned float32 tensors), and checkpoints, trackers and progress bars.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig as PeftLoraConfig
from torch import nn
from torch.nn import functional as F

from lora_training.backbones import FAMILIES
from lora_training.config import LoraConfig
from lora_training.students import adapted_modules
from pcm_scheduler.noise_schedule import predict_x0_and_epsilon
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.sampling import jump

GUIDANCE = (4.0, 5.0)  # w in the papers' count, which is g - 1
HUBER_C, ADVERSARIAL_WEIGHT = 0.001, 0.1


class _Head(nn.Module):
    """Of PCM's critic: two convolutions as wide as the map, and a third to one channel. Ours has `adversarial.width`."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(32, channels), nn.LeakyReLU())
            for _ in range(2)
        )
        self.last = nn.Conv2d(channels, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.second(x) + x)


class ReferenceStep:
    """Everything that such a trainer holds; `step` is one optimisation step.

    Args:
        family: sd15 or sdxl.
        pipe: VAE, text encoders, and the UNet that becomes the student, float32, on the device.
        teacher: a second UNet, float32, on the device.
        pixels: the batches' pictures, (B, 3, H, W) in [-1, 1], on the CPU.
        captions: B of them.
        precision: of autocast, VAE and text encoders (their `weight_dtype`); float32 for none.
        checkpointing: compute activations again in the backward pass.
        critic: PCM's adversarial loss, which alternates: the critic learns at even steps, the student at odd ones.
        rank: of the LoRA.
    """

    def __init__(
        self,
        family: str,
        pipe: DiffusionPipeline,
        teacher: UNet2DConditionModel,
        pixels: torch.Tensor,
        captions: list[str],
        precision: torch.dtype,
        checkpointing: bool = False,
        critic: bool = False,
        rank: int = 64,
    ):
        self.device, self.precision = pipe.unet.device, precision
        self.pixels = pixels.pin_memory() if self.device.type == "cuda" else pixels
        self.captions = captions
        # Both: the teacher is a second network, and both UNets stay in float32; half precision comes from autocast.
        self.teacher, self.student = teacher.requires_grad_(False), pipe.unet
        self.encoding = FAMILIES[family](pipe)  # encodes prompts, and says the schedule; freezes VAE, text encoders and UNet
        self.vae = pipe.vae.to(precision)  # both: at the first step
        for encoder in self.encoding.text_encoders:
            encoder.to(precision)
        adapter = PeftLoraConfig(r=rank, target_modules=adapted_modules(self.student, LoraConfig(rank=rank)))
        self.student.add_adapter(adapter)
        self.student.train()
        if checkpointing:
            self.student.enable_gradient_checkpointing()
            if critic:
                self.teacher.train()
                self.teacher.enable_gradient_checkpointing()  # PCM: the student's loss goes back through it
        # Both: AdamW as torch has it by default, over all parameters of the student; frozen ones have no gradient.
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=5e-6, weight_decay=1e-3)
        self.heads: nn.ModuleList | None = None
        if critic:
            widths = list(teacher.config.block_out_channels)
            channels = [*widths, widths[-1], *reversed(widths)]
            with torch.device(self.device):
                self.heads = nn.ModuleList(nn.ModuleList(_Head(c) for _ in range(4)) for c in channels)
            self.critic_optimizer = torch.optim.AdamW(self.heads.parameters(), lr=1e-5, betas=(0.0, 0.999), weight_decay=1e-3)
        self.grid = PhaseGrid.even(4)
        stops = torch.tensor(self.grid.timesteps)
        self.timesteps = stops.to(self.device)
        self.alphas, self.sigmas = (t[stops].float().to(self.device) for t in (self.encoding.alphas, self.encoding.sigmas))
        # Both: the empty prompt is encoded once.
        empty = self.encoding.empty_conditioning()
        self.empty = {name: t.float().expand(len(pixels), *t.shape[1:]) for name, t in empty.items()}
        self.number = 0

    @property
    def unets(self) -> tuple[UNet2DConditionModel, ...]:
        """Every network whose passes a step is measured in."""
        return self.student, self.teacher

    def step(self) -> float:
        """One step; returns the loss."""
        learns_critic = self.heads is not None and self.number % 2 == 0
        self.number += 1
        latents, told = self._encode()
        batch = len(latents)
        n = torch.randint(1, self.grid.num_solver_steps + 1, (batch,), device=self.device)
        noise = torch.randn_like(latents)
        edge = self.grid.target(n)
        alpha, sigma = self._levels(n)
        sample = alpha * latents + sigma * noise
        w = (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(batch) + GUIDANCE[0]
        w = w.view(-1, 1, 1, 1).to(self.device)  # both: drawn on the CPU, then copied
        # The student, with gradients. PCM: also at steps where the critic learns and these gradients are thrown away.
        with self._autocast():
            output = self._predict(self.student, sample, n, told)
        landed = self._jump(output.float(), sample, n, edge)
        # The teacher's guided step. Both: two passes of one batch, first with the prompt, then with the empty one.
        with torch.no_grad(), self._autocast():
            guided = self._predict(self.teacher, sample, n, told)
            unguided = self._predict(self.teacher, sample, n, told | self.empty)
            below = torch.maximum(n - 1, edge)
            sample_below = self._jump((guided + w * (guided - unguided)).float(), sample, n, below)
        # The student again, at the point below: the target.
        with torch.no_grad():
            with self._autocast():
                output = self._predict(self.student, sample_below, below, told)
            target = self._jump(output.float(), sample_below, below, edge)
        learn = self._critic_step if learns_critic else self._student_step
        loss = learn(landed, target, edge, told)
        return loss.item()  # both: for the progress bar, at every step

    def _encode(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Both: pictures through the VAE and captions through the text encoders, at every step."""
        with torch.no_grad():
            told = {name: t.float() for name, t in self.encoding.encode_prompts(self.captions).items()}
            pixels = self.pixels.to(self.device, non_blocking=True).to(self.precision)
            latents = torch.cat([self.vae.encode(part).latent_dist.sample() for part in pixels.split(32)])
        if "pooled_prompt_embeds" in told:  # SDXL
            side = float(pixels.shape[-1])
            told["time_ids"] = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=self.device).expand(len(pixels), 6)
        return latents.float() * self.vae.config.scaling_factor, told

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    def _levels(self, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.alphas[n].view(-1, 1, 1, 1), self.sigmas[n].view(-1, 1, 1, 1)

    def _predict(
        self, unet: UNet2DConditionModel, sample: torch.Tensor, n: torch.Tensor, told: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Both: float32 samples and embeddings; autocast casts them."""
        added = {"text_embeds": told["pooled_prompt_embeds"], "time_ids": told["time_ids"]} if "time_ids" in told else None
        embeds = told["prompt_embeds"]
        return unet(
            sample.float(), self.timesteps[n], encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False
        )[0]

    def _jump(self, output: torch.Tensor, sample: torch.Tensor, n: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        x0, _ = predict_x0_and_epsilon(output, sample, *self._levels(n), self.encoding.prediction_type)
        return jump(sample, x0, *self._levels(n), *self._levels(stop))

    def _student_step(
        self, landed: torch.Tensor, target: torch.Tensor, edge: torch.Tensor, told: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        loss = ((landed - target).square() + HUBER_C**2).sqrt().sub(HUBER_C).mean()
        if self.heads is not None:
            judged = self._judged(self._noised_again(landed, edge), told)
            loss = loss + ADVERSARIAL_WEIGHT * sum(F.relu(1 - logits.float()).mean() for logits in judged) / len(judged)
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.heads is not None:
            self.critic_optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _critic_step(
        self, landed: torch.Tensor, target: torch.Tensor, edge: torch.Tensor, told: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """PCM: landings and targets in two passes of the teacher."""
        assert self.heads is not None
        fake, real = (self._judged(self._noised_again(x.detach(), edge), told) for x in (landed, target))
        parts = [F.relu(1 + f.float()).mean() + F.relu(1 - r.float()).mean() for f, r in zip(fake, real, strict=True)]
        loss = sum(parts, torch.zeros((), device=self.device)) / len(parts)
        loss.backward()
        nn.utils.clip_grad_norm_(self.heads.parameters(), 1.0)
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _noised_again(self, landed: torch.Tensor, edge: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x at a random level of the phase, and it. PCM draws it sample by sample, with the edge fetched from the GPU."""
        phase = self.grid.num_solver_steps // self.grid.num_phases
        level = torch.empty_like(edge)
        for i in range(len(edge)):
            level[i] = torch.randint(int(edge[i].item()), int(edge[i].item()) + phase, (1,), device=self.device)[0]
        (alpha, sigma), (next_alpha, next_sigma) = self._levels(edge), self._levels(level)
        scale = next_alpha / alpha
        spread = (next_sigma.square() - (scale * sigma).square()).clamp(min=0).sqrt()
        return scale * landed + spread * torch.randn_like(landed), level

    def _judged(self, shown: tuple[torch.Tensor, torch.Tensor], told: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Every head's logits of the teacher's features."""
        assert self.heads is not None
        found: list[torch.Tensor] = []
        blocks = [*self.teacher.down_blocks, self.teacher.mid_block, *self.teacher.up_blocks]
        handles = [
            block.register_forward_hook(lambda module, given, out: found.append(out[0] if isinstance(out, tuple) else out))
            for block in blocks
        ]
        try:
            with self._autocast():
                self._predict(self.teacher, *shown, told)
                return [head(x) for x, heads in zip(found, self.heads, strict=True) for head in heads]
        finally:
            for handle in handles:
                handle.remove()
