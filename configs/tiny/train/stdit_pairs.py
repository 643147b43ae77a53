# Before stdit.py: which colour belongs to which shape, from pictures, which are cheap. A step of
# theirs has three times the samples of a step of clips, and nearly all of them two shapes.
_base_ = ["stdit.py"]

dataset = dict(
    clips=[(1, 64, 64, 12288), (17, 64, 64, 2048)],
    pair_share=0.9,
)
bucket_config = dict(_delete_=True, **{"64p": {1: (1.0, 192), 17: (1.0, 64)}})
mask_ratios = None
warmup_steps = 50
decay = 0.0
max_steps = 2000
validation = None
