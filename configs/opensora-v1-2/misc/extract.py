# Latents and text states of a table, for training without VAE and text encoder:
#   python scripts/misc/extract_feat.py configs/opensora-v1-2/misc/extract.py \
#       --data-path meta.csv --outputs features
dataset = dict(type="VariableVideoTextDataset", transform_name="resize_crop")

# resolution -> frames -> (probability, clips encoded together)
bucket_config = {
    "144p": {1: (1.0, 100), 51: (1.0, 8), 102: (1.0, 4), 204: (1.0, 2), 408: (1.0, 1)},
    "240p": {1: (0.3, 50), 51: (0.4, 4), 102: (0.4, 2), 204: (0.4, 1), 408: (0.3, 1)},
    "360p": {1: (0.5, 30), 51: (0.3, 2), 102: (0.3, 1), 204: (0.3, 1)},
    "480p": {1: (0.5, 20), 51: (0.2, 1), 102: (0.1, 1)},
    "720p": {1: (0.2, 10), 51: (0.0, None)},
}

vae = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.2",
    micro_frame_size=17,
    micro_batch_size=4,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=300,
    shardformer=True,
)

save_text_features = True
dtype = "bf16"
num_workers = 16
bin_size = 250
seed = 42
