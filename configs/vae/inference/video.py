# Reconstruct clips and measure what the published video VAE loses.
# python scripts/inference_vae.py configs/vae/inference/video.py --data-path meta.csv
num_frames = 17
image_size = (256, 256)
dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # table of clips, or --data-path
    num_frames=num_frames,
    frame_interval=1,
    image_size=image_size,
)
num_workers = 4
num_samples = 100

model = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.2",
    micro_frame_size=None,
    micro_batch_size=4,
    cal_loss=True,
)
dtype = "bf16"
cal_stats = True
perceptual_loss_weight = 0.1  # with --lpips-path
kl_loss_weight = 1e-6
seed = 42
save_dir = "samples/vae_video"
