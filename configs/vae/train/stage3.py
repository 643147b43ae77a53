# Third stage: everything learns on pixels, on clips of 1 to 33 frames, from the second's VAE.
# python scripts/train_vae.py configs/vae/train/stage3.py --data-path meta.csv --lpips-path FOLDER
_base_ = ["stage1.py"]

num_frames = 33
dataset = dict(num_frames=num_frames)
model = dict(
    type="OpenSoraVAE_V1_2",
    freeze_vae_2d=False,
    from_pretrained="outputs/vae_stage2",
    cal_loss=True,
)
# LPIPS needs weights that are not part of this package, see --lpips-path; a weight of 0 trains
# without.
use_real_rec_loss = True
use_z_rec_loss = False
use_image_identity_loss = False
mixed_strategy = "mixed_video_random"
outputs = "outputs/vae_stage3"
