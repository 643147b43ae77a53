# The transformer and the byte-level text encoder of the embedded default: the second stage,
# which starts from the first one's weights.
vae = "outputs/tiny-vae/vae"
ckpt_path = "outputs/tiny/pipeline"
outputs = "outputs/tiny-refined"
seed = 42
fps = 8.0

model = dict(
    in_channels=4,
    hidden_size=128,
    depth=4,
    num_heads=4,
    mlp_ratio=3.0,
    pred_sigma=False,
    caption_channels=128,
    model_max_length=120,
    class_dropout_prob=0.1,
    input_sq_size=64,
    qk_norm=True,
)
text_encoder = dict(max_length=120, d_model=128, d_ff=256, num_layers=2, num_heads=4)
# The direction of a motion is decided between t = 700 and 900: most timesteps lie there.
scheduler = dict(
    type="rflow",
    num_sampling_steps=25,
    cfg_scale=3.0,
    sample_method="logit-normal",
    loc=0.8,
    scale=1.2,
)
defaults = dict(num_frames=17, height=64, width=64, fps=8)

# (num_frames, height, width, num_clips, batch_size, weight)
buckets = (
    (17, 64, 64, 14336, 64, 0.7),
    (17, 48, 80, 1024, 64, 0.07),
    (17, 80, 48, 1024, 64, 0.07),
    (17, 96, 96, 512, 28, 0.04),
    (34, 64, 64, 768, 32, 0.06),
    (1, 64, 64, 1024, 192, 0.06),
)
size_share = 0.6
mixed_steps = 800
steps = 3200
lr = 4e-3
adamw_lr = 2e-3
warmup_steps = 100
decay = 0.4
grad_clip = 1.0
ema_decay = 0.998
dtype = "bf16"
compile = False
log_every = 50
ckpt_every = 500
