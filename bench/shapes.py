"""Name the shapes that benches of ops share: what the models really run.

STDiT3-XL/2 has C = 1152 and patches of 1x2x2 over latents of 1/8 size; 51 frames (2 s) are 15
latent frames. Guidance doubles the batch.
Axes: B batch, T frames, S patches per frame, C channels. Shapes that begin with `CPU` are pieces of
a clip, for processors without a GPU.
"""

from __future__ import annotations

CPU = "cpu"

TOKENS = {
    f"{CPU} 480p": (1, 15, 1590, 1152),
    "tiny": (2, 5, 16, 128),  # the embedded model, 17 frames of 64x64
    "144p-2s": (2, 15, 144, 1152),  # 144x256
    "480p-2s": (2, 15, 1590, 1152),  # 480x848, 47,700 tokens
}

LATENTS = {  # of one request: C, T, H, W
    f"{CPU} 480p": (4, 15, 60, 106),
    "tiny": (4, 5, 8, 8),
    "480p-2s": (4, 15, 60, 106),
    "720p-16s": (4, 120, 90, 160),  # 720x1280, 408 frames; 864,000 tokens with guidance
}

ACTIVATIONS = {  # of the VAEs: B, C, T, H, W
    f"{CPU} 256 wide": (1, 256, 17, 60, 106),
    "tiny": (1, 32, 5, 16, 16),
    "128 wide": (1, 128, 17, 240, 424),  # 480x848 at half size
    "512 wide": (1, 512, 5, 60, 106),  # the temporal VAE at 480x848, 17 frames
}

CONVOLUTIONS = {  # of the VAEs: [B, I, T, H, W], [O, kt, kh, kw], stride
    f"{CPU} 128 wide": ((1, 128, 5, 30, 53), (128, 3, 3, 3), (1, 1, 1)),
    "tiny": ((1, 32, 5, 16, 16), (32, 3, 3, 3), (1, 1, 1)),
    "256 wide": ((1, 256, 5, 120, 212), (256, 3, 3, 3), (1, 1, 1)),
    "512 wide": ((1, 512, 5, 60, 106), (512, 3, 3, 3), (1, 1, 1)),
    "2D, 256 wide": ((4, 256, 1, 240, 424), (256, 1, 3, 3), (1, 1, 1)),
    "halve time": ((1, 256, 17, 60, 106), (256, 3, 3, 3), (2, 1, 1)),
}

HEADS = {  # of the transformers' attention: B, T, S, H, D
    f"{CPU} 480p": (2, 1, 1590, 16, 72),
    "tiny": (2, 5, 16, 4, 32),
    "480p-2s": (2, 15, 1590, 16, 72),
    "720p-2s": (2, 15, 3600, 16, 72),  # 720x1280
}

TEXT = {  # tokens of a prompt and, for guidance, of the learned empty one, which is always full
    f"{CPU} 480p": (120, 300),
    "tiny": (24, 120),
    "480p-2s": (120, 300),
    "720p-2s": (120, 300),
}

FRAMES = {  # of attention over time: B, T, S, H, D
    f"{CPU} 15 frames": (1, 15, 400, 16, 72),
    f"{CPU} 64 frames": (1, 64, 100, 16, 72),
    "tiny": (2, 5, 16, 4, 32),
    "480p-2s": (2, 15, 1590, 16, 72),
    "144p-4s": (2, 30, 144, 16, 72),
    "144p-8s": (2, 60, 144, 16, 72),
    "144p-16s": (2, 120, 144, 16, 72),
}

CELLS = {  # what one STDiT3-XL/2 serves, guided: resolution and duration -> B, T, S, C
    f"{resolution}-{seconds}s": (2, frames, patches, 1152)
    for resolution, patches in (("240p", 405), ("480p", 1590), ("720p", 3600))  # 9:16
    for seconds, frames in ((2, 15), (4, 30), (8, 60), (16, 120))
}

SMALL_ACTIVATION = (2, 128, 3, 24, 40)  # in float64 too
SMALL_CONVOLUTION = ((1, 64, 3, 20, 24), (256, 3, 3, 3), (1, 1, 1))

# Compiled ahead of time and not run.
COMPILED_HEADS = {
    "720p-16s": (2, 120, 3600, 16, 72),  # 64-bit offsets
    "128 wide": (2, 15, 1590, 16, 128),
}
COMPILED_ACTIVATIONS = {
    "96 wide": (1, 96, 17, 60, 106),
    "720p, 64-bit offsets": (1, 128, 34, 720, 1280),
}
COMPILED_CONVOLUTIONS = {
    "2D, 128 wide": ((4, 128, 1, 480, 848), (128, 1, 3, 3), (1, 1, 1)),
    "2D, halve size": ((4, 128, 1, 480, 848), (128, 1, 3, 3), (1, 2, 2)),
    "128 wide, 64-bit offsets": ((1, 128, 34, 720, 1280), (128, 3, 3, 3), (1, 1, 1)),
    # The first and the last of a VAE, which fill their tiles with zeros.
    "4 to 512": ((1, 4, 5, 60, 106), (512, 3, 3, 3), (1, 1, 1)),
    "128 to 3": ((1, 128, 17, 60, 106), (3, 3, 3, 3), (1, 1, 1)),
}
