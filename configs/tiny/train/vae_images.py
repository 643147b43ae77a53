# The VAE of the embedded default learns single frames beside clips, from its first edition's
# weights: norms that span the frames of a clip had only ever seen seventeen.
# python scripts/train_vae.py configs/tiny/train/vae_images.py
num_frames = 17
image_size = (64, 64)
dataset = dict(type="ShapesDataset", clips=[(17, 64, 64, 6400)], pair_share=0.3, seed=45)
num_workers = 1
dtype = "fp32"

model = dict(type="VideoAutoencoderPipeline", from_pretrained="tiny", freeze_vae_2d=False)

perceptual_loss_weight = 0.0
kl_loss_weight = 1e-6
mixed_strategy = "mixed_video_image"
mixed_image_ratio = 0.5
use_real_rec_loss = True
use_z_rec_loss = False
use_image_identity_loss = False

seed = 45
outputs = "outputs/tiny-vae-images"
epochs = 1
log_every = 25
ckpt_every = 400
keep_last = 1
batch_size = 4
lr = 5e-4
warmup_steps = 20
grad_clip = 1.0
ema_decay = 0.99
