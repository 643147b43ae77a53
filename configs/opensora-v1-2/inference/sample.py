"""Sample Open-Sora 1.2 from its published checkpoints.

    python scripts/inference.py configs/opensora-v1-2/inference/sample.py \
        --num-frames 4s --resolution 720p --aspect-ratio 9:16 --prompt "waves at sunset"

Any flag of `--help` overrides the key of the same name. Folders work in place of the hub names.
"""

# Clip
resolution = "240p"
aspect_ratio = "9:16"  # height:width, so a landscape clip
num_frames = 51  # 2 seconds; "2s" is the same
fps = 24  # what the model is told
frame_interval = 1
save_fps = 24  # what the file is played at

# Output
save_dir = "samples"
seed = 42
batch_size = 1

# Conditioning
multi_resolution = "STDiT2"  # the model is told height, width and frames per second
condition_frame_length = 5  # latent frames shared by consecutive parts of a long video
align = 5  # latent frames per decoded chunk

# Appended to the prompt: " aesthetic score: 6.5." and, if set, a motion score
aes = 6.5
flow = None

# Models
dtype = "bf16"
model = dict(
    type="STDiT3-XL/2",
    from_pretrained="hpcai-tech/OpenSora-STDiT-v3",
    qk_norm=True,
)
vae = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.2",
    micro_frame_size=17,  # video frames decoded at once
    micro_batch_size=4,  # of which the spatial part takes four at a time
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=300,
)
scheduler = dict(
    type="rflow",
    use_timestep_transform=True,
    num_sampling_steps=30,
    cfg_scale=7.0,
)
