# The second stage of the embedded transformer and text encoder: from the first one's weights.
_base_ = ["stdit.py"]
ckpt_path = "outputs/tiny/pipeline"
outputs = "outputs/tiny-refined"
steps = 3200
decay = 0.4
