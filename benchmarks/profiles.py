"""Timing profiles of FLUX.1-Kontext on H100-class GPUs, for simulated runs.

No machine here could hold those runs. Every second below is an ASSUMPTION: FLOPs counted from the
architecture, divided by an assumed sustained rate. Nothing was measured; replace a profile by your
own seconds as soon as a run has printed them::

    python benchmarks/profiles.py     # prints the profiles and their advice for 8 and 64 GPUs
"""

from __future__ import annotations

from dataclasses import dataclass

from learner.controller.placement import GroupCost, recommend

MIB = 2**20
CANDIDATES = 12
"""Group size of Neighbor GRPO."""

WIDTH, BLOCKS, TEXT_TOKENS, CHANNELS = 3072, 57, 512, 64
"""FLUX.1: 19 double and 38 single blocks; T5 tokens; channels of a packed latent token, one token
for each 16 x 16 pixels."""

TFLOP_PER_S = 400.0
"""ASSUMED rate of one GPU: about 40 % of the dense bf16 peak of an H100 (989 TFLOP/s)."""

JUDGE_S = 0.4
"""ASSUMED seconds of a 7B vision-language judge for one candidate."""

DECODE_S = {512: 0.02, 1024: 0.08}
"""ASSUMED seconds of the VAE for one candidate."""

STEP_S, PUBLISH_S = 0.5, 1.5
"""ASSUMED: optimizer step and export; about 1 s to move 200 MiB to every node, and up to 0.5 s to
load and hash it."""

FORWARDS_PER_TRAINED_STEP = 3
"""Forward, the same again for checkpointed activations, and gradients of activations. Gradients of
LoRA weights are negligible."""

LORA_MODULES = 266
"""Attention projections of FLUX.1, each WIDTH x WIDTH: q, k, v in every block; output and four text
projections in a double one."""


def tokens(pixels: int) -> int:
    """Returns the latent tokens of a square image."""
    return (pixels // 16) ** 2


def forward_tflop(pixels: int) -> float:
    """Counts one transformer call on one candidate: matrix products only.

    The sequence holds target, source and text tokens.
    """
    length = 2 * tokens(pixels) + TEXT_TOKENS
    # 12 WIDTH^2 weights a block (q, k, v, output and a fourfold MLP), 2 FLOPs for each and token.
    linear = 2 * length * BLOCKS * 12 * WIDTH**2
    # Q K^T and the product with V: 2 * 2 length^2 WIDTH FLOPs a block.
    attention = 4 * length**2 * WIDTH * BLOCKS
    return (linear + attention) / 1e12


def group_bytes(pixels: int, *, states: int) -> int:
    """Counts the bytes of a group on the wire.

    Latents are in fp32, images in 8 bits, source latents and T5 states in bf16.

    Args:
        states: latent tensors of a candidate. A complete trajectory has num_steps + 1; our record
            has three for each trained step (start, end, velocity).
    """
    latents = CANDIDATES * states * tokens(pixels) * CHANNELS * 4
    images = CANDIDATES * 3 * pixels**2
    return latents + images + tokens(pixels) * CHANNELS * 2 + TEXT_TOKENS * 4096 * 2


def adapter_bytes(rank: int) -> int:
    """Counts the bytes of LoRA on the attention projections, in fp32."""
    return LORA_MODULES * rank * 2 * WIDTH * 4


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One setting of resolution and steps: seconds and bytes of a group of 12.

    Attributes:
        trained_steps: steps of a trajectory that the update learns from.
        group_bytes: of our record.
        adapter_bytes: at rank 32.
    """

    pixels: int
    steps: int
    trained_steps: int
    cost: GroupCost
    group_bytes: int
    adapter_bytes: int


def profile(pixels: int, steps: int, trained_steps: int) -> Profile:
    """Derives a profile from FLOPs.

    A rollout takes ``steps`` forwards and a decode, learning three forwards a trained step.
    """
    forward_s = forward_tflop(pixels) / TFLOP_PER_S
    return Profile(
        pixels=pixels,
        steps=steps,
        trained_steps=trained_steps,
        cost=GroupCost(
            rollout_s=CANDIDATES * (steps * forward_s + DECODE_S[pixels]),
            reward_s=CANDIDATES * JUDGE_S,
            learn_s=CANDIDATES * trained_steps * FORWARDS_PER_TRAINED_STEP * forward_s,
            step_s=STEP_S,
            publish_s=PUBLISH_S,
        ),
        group_bytes=group_bytes(pixels, states=3 * trained_steps),
        adapter_bytes=adapter_bytes(rank=32),
    )


PROFILES = {
    "kontext-512-6": profile(512, 6, 2),
    "kontext-512-28": profile(512, 28, 4),
    "kontext-1024-6": profile(1024, 6, 2),
    "kontext-1024-28": profile(1024, 28, 4),
}


def main() -> None:
    for name, setting in PROFILES.items():
        cost = setting.cost
        print(
            f"{name}: a group rollout {cost.rollout_s:.1f} s, reward {cost.reward_s:.1f} s, "
            f"learn {cost.learn_s:.1f} s, {setting.group_bytes / MIB:.0f} MiB; the adapter "
            f"{setting.adapter_bytes / MIB:.0f} MiB"
        )
        for workers in (8, 64):
            for max_lag in (0, 1):
                advice = recommend(cost, workers, 2 * workers, max_lag, chunks=3)
                print(f"  max_lag {max_lag}: {advice.words}")


if __name__ == "__main__":
    main()
