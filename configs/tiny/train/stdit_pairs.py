# Before stdit.py: which colour belongs to which shape, from pictures of two shapes alone, 16
# patches each, at the timesteps where the caption decides it. Among clips of one it is not learned.
_base_ = ["stdit.py"]

dataset = dict(clips=[(1, 64, 64, 12288)], pair_share=1.0)
bucket_config = dict(_delete_=True, **{"64p": {1: (1.0, 128)}})
mask_ratios = None
scheduler = dict(loc=0.9, scale=0.6)

optimizer = dict(adamw_lr=5e-4)
lr = 1e-3
decay = 0.0
max_steps = 6000
ckpt_every = 100
validation = None
