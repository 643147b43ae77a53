# First stage of Open-Sora's video VAE: the temporal VAE learns 2D latents, the 2D VAE is frozen.
# python scripts/train_vae.py configs/vae/train/stage1.py --data-path meta.csv
num_frames = 17
image_size = (256, 256)
dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # table of clips, or --data-path
    num_frames=num_frames,
    frame_interval=1,
    image_size=image_size,
)
num_workers = 16
batch_size = 1

# The 2D VAE is that of PixArt-Sigma; --model.vae_2d.from_pretrained FOLDER names another.
model = dict(type="OpenSoraVAE_V1_2", freeze_vae_2d=True, from_pretrained=None, cal_loss=True)
dtype = "bf16"
grad_checkpoint = True

# 2D latents are compared; single frames (a fifth of the batches) shall keep their 2D latent.
use_real_rec_loss = False
use_z_rec_loss = True
use_image_identity_loss = True
mixed_strategy = "mixed_video_image"
mixed_image_ratio = 0.2
perceptual_loss_weight = 0.1  # of pixels, so without effect here
kl_loss_weight = 1e-6  # likewise

lr = 1e-5
grad_clip = 1.0
epochs = 100
seed = 42
outputs = "outputs/vae_stage1"
load = None
log_every = 1
ckpt_every = 1000
