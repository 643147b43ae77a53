# Reconstruct images: clips of one frame.
# python scripts/inference_vae.py configs/vae/inference/image.py --data-path meta.csv
_base_ = ["video.py"]

num_frames = 1
dataset = dict(num_frames=num_frames)
save_dir = "samples/vae_image"
