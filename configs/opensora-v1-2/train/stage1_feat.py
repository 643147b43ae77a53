# Training on latents and text states that scripts/misc/extract_feat.py stored.
_base_ = ["base.py"]

dataset = dict(_delete_=True, type="CachedFeatures")
load_video_features = True
load_text_features = True
num_workers = 4
lr = 2e-4
warmup_steps = None

bucket_config = {
    "144p": {1: (1.0, 475), 51: (1.0, 51), 102: (1.0, 27), 204: (1.0, 13), 408: (1.0, 6)},
    "240p": {1: (1.0, 297), 51: (1.0, 20), 102: (1.0, 10), 204: (1.0, 5), 408: (1.0, 2)},
    "360p": {1: (1.0, 141), 51: (1.0, 8), 102: (1.0, 4), 204: (1.0, 2), 408: (1.0, 1)},
    "480p": {1: (1.0, 89), 51: (1.0, 5), 102: (1.0, 3), 204: (1.0, 1)},
    "720p": {1: (1.0, 36), 51: (1.0, 2), 102: (1.0, 1)},
}
