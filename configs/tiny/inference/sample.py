"""Sample the small model that ships inside the package: no download, a second or two on a CPU.

opensora generate configs/tiny/inference/sample.py --prompt "a red circle moving right"
"""

num_frames = 17
image_size = (64, 64)  # height, width
fps = 8
save_dir = "samples"
seed = 42
scheduler = dict(num_sampling_steps=25, cfg_scale=3.0)
