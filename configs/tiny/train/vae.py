# The VAE of the embedded default: 4x8x8, 4 latent channels, for 64 x 64 pixels.
outputs = "outputs/tiny-vae"
seed = 42
num_frames = 17
image_size = (64, 64)

model = dict(
    vae_2d=dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=2,
    ),
    vae_temporal=dict(
        in_out_channels=8,
        latent_embed_dim=4,
        embed_dim=4,
        filters=16,
        num_res_blocks=1,
        channel_multipliers=(1, 2, 2, 4),
        temporal_downsample=(False, True, True),
        num_groups=2,
    ),
    shift=(0.0, 0.0, 0.0, 0.0),
    scale=(1.0, 1.0, 1.0, 1.0),
    micro_frame_size=17,
    micro_batch_size=17,
)

# Single frames, 2D latents, windows that follow the shape, whole frames.
window = 32
stages = (1000, 1000, 600, 150)
batch_sizes = (32, 8, 6, 2)

lr = 2e-3
adamw_lr = 1e-3
warmup_steps = 20
decay = 0.25
kl_loss_weight = 2e-4
grad_clip = 1.0
ema_decay = 0.99
dtype = "bf16"
log_every = 50
ckpt_every = 300
