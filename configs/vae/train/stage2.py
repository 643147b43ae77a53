# Second stage: the 2D encoder learns too, still on 2D latents. Starts from the first stage's VAE.
# python scripts/train_vae.py configs/vae/train/stage2.py --data-path meta.csv
_base_ = ["stage1.py"]

model = dict(
    type="OpenSoraVAE_V1_2",
    freeze_vae_2d=False,
    from_pretrained="outputs/vae_stage1",
    cal_loss=True,
)
use_image_identity_loss = False
outputs = "outputs/vae_stage2"
