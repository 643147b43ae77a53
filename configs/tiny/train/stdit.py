# The embedded default, second edition: goes on from the first one's weights and learns images,
# given frames, two shapes, more sizes and lengths, and frame rates.
outputs = "outputs/tiny"
seed = 44

dataset = dict(
    type="ShapesDataset",
    # (frames, height, width, clips)
    clips=[
        (17, 64, 64, 16384),
        (17, 48, 80, 2048),
        (17, 80, 48, 2048),
        (17, 80, 80, 1536),
        (17, 64, 96, 768),
        (17, 96, 64, 768),
        (17, 96, 96, 768),
        (17, 80, 128, 384),
        (17, 128, 80, 384),
        (34, 64, 64, 1536),
        (34, 48, 80, 384),
        (34, 80, 48, 384),
        (1, 64, 64, 3072),
        (1, 48, 80, 768),
        (1, 80, 48, 768),
        (1, 96, 96, 768),
    ],
    pair_share=0.3,
    fps=(8, 8, 12),
    size_share=0.6,
    first_frame_alone=True,
)
# Every clip is of exactly one bucket's size.
bucket_config = {
    "64p": {1: (1.0, 192), 17: (1.0, 64), 34: (1.0, 32)},
    "80p": {17: (1.0, 40)},
    "96p": {1: (1.0, 96), 17: (1.0, 24)},
}
num_workers = 1
mask_ratios = {
    "random": 0.03,
    "intepolate": 0.01,
    "quarter_random": 0.02,
    "quarter_head": 0.04,
    "quarter_tail": 0.02,
    "quarter_head_tail": 0.02,
    "image_random": 0.01,
    "image_head": 0.1,
    "image_tail": 0.02,
    "image_head_tail": 0.03,
}

model = dict(type="STDiT3", from_pretrained="tiny")
vae = dict(type="VideoAutoencoderPipeline", from_pretrained="outputs/tiny-vae-images")
# Two shapes need heads that look further than the letters of a word, and a layer for them.
text_encoder = dict(
    type="t5", from_pretrained="tiny", train=True, grow=dict(num_layers=3, num_heads=8)
)
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

optimizer = dict(name="muon", betas=(0.9, 0.95), eps=1e-8, adamw_lr=1.5e-3)
lr = 3e-3
warmup_steps = 50
decay = 0.5
max_steps = 14000
grad_clip = 1.0
ema_decay = 0.998
ema_warm_up = True
dtype = "bf16"
log_every = 50
ckpt_every = 250
keep_last = 2
validation = dict(
    every=1000,
    dataset=dict(
        clips=[
            (17, 64, 64, 64),
            (17, 48, 80, 64),
            (17, 80, 80, 40),
            (34, 64, 64, 32),
            (1, 64, 64, 192),
        ],
        seed=7,
    ),
    samples=32,
)
