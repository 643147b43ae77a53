# Before stdit.py: which colour belongs to which shape, from pictures, which are cheap: 16 patches
# each. The text encoder's states tell it already, so only the transformer has to learn to look.
_base_ = ["stdit.py"]

dataset = dict(clips=[(1, 64, 64, 12288)], pair_share=0.9)
bucket_config = dict(_delete_=True, **{"64p": {1: (1.0, 192)}})
mask_ratios = None
text_encoder = dict(_delete_=True, type="t5", from_pretrained="tiny")
decay = 0.0
max_steps = 6000
validation = None
