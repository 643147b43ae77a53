# What the stages of Open-Sora 1.2 share; each adds its buckets.
dataset = dict(type="VariableVideoTextDataset", transform_name="resize_crop")
num_workers = 8
dtype = "bf16"
grad_checkpoint = True

model = dict(
    type="STDiT3-XL/2",
    from_pretrained=None,
    qk_norm=True,
    freeze_y_embedder=True,
)
vae = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.2",
    micro_frame_size=17,
    micro_batch_size=4,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=300,
)
scheduler = dict(
    type="rflow",
    use_timestep_transform=True,
    sample_method="logit-normal",
)
# A quarter of all clips has given frames.
mask_ratios = {
    "random": 0.05,
    "intepolate": 0.005,
    "quarter_random": 0.005,
    "quarter_head": 0.005,
    "quarter_tail": 0.005,
    "quarter_head_tail": 0.005,
    "image_random": 0.025,
    "image_head": 0.05,
    "image_tail": 0.025,
    "image_head_tail": 0.025,
}

lr = 1e-4
adam_eps = 1e-15
ema_decay = 0.99
grad_clip = 1.0
warmup_steps = 1000

seed = 42
outputs = "outputs"
epochs = 1000
log_every = 10
ckpt_every = 200
