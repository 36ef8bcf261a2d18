"""MAE with a ViT-H/14 for 64 chips of TPU v5e (He et al. 2022).

    python -m sslx.aot --config configs/mae_vit_h.py --topology v5e:8x8
    python -m sslx.main --config configs/mae_vit_h.py --workdir gs://BUCKET/mae_vit_h

64 images of 224 pixels a chip, of whose 256 patches the encoder sees 64; all chips hold the whole network.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug = arg == "debug"
    steps, size = (24, 16) if debug else (250_000, 224)
    rows = dict(modality="image", size=size)
    images = dict(name="synthetic", **rows) if debug else dict(name="arrayrecord", path="/data/images", size=size)
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1)
    shape = dict(patch=4, width=64, depth=2, heads=4) if debug else dict(patch=14, width=1280, depth=32, heads=16)
    config.model = dict(name="vit", image_size=size, pool="mean", position="sincos", remat="dots", dtype="bfloat16",
                        **shape)
    view = dict(size=size, scale=(0.2, 1.0), jitter=0.0, grayscale=0.0, blur=0.0)
    decoder = dict(decoder_width=32, decoder_depth=1, decoder_heads=2) if debug else {}
    config.objective = dict(name="mae", view=view, mask_ratio=0.75, **decoder)
    config.data = dict(batch_size=16 if debug else 4096, train=images, synthetic=rows)
    config.optim = dict(steps=steps, learning_rate=2.4e-3, schedule="cosine", warmup=steps // 20, weight_decay=0.05,
                        b2=0.95)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // 4, save_every=steps // 4)
    config.evals = dict(batch_size=8 if debug else 512, collapse=dict(),
                        labelled=dict(test=images))
    return config
