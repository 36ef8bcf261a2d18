"""DINO with a ViT-g/14 for 256 chips of TPU v6e (Caron et al. 2021; the network of Oquab et al. 2023).

    python -m sslx.aot --config configs/dino_vit_g.py --topology v6e:16x16
    python -m sslx.main --config configs/dino_vit_g.py --workdir gs://BUCKET/dino_vit_g

4 images a chip, each in 2 crops of 224 and 8 of 98 pixels, 65536 prototypes; all chips hold the whole network.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug = arg == "debug"
    steps, size = (24, 16) if debug else (250_000, 224)
    rows = dict(modality="image", size=size)
    images = dict(name="synthetic", **rows) if debug else dict(name="arrayrecord", path="/data/images", size=size)
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1)
    patch, width, depth, heads = (4, 64, 2, 2) if debug else (14, 1536, 40, 24)
    config.model = dict(name="vit", image_size=size, patch=patch, width=width, depth=depth, heads=heads,
                        hidden=2 * width if debug else 4096, mlp="swiglu", pool="cls", remat="full", dtype="bfloat16")
    config.objective = dict(name="dino", steps=steps, global_view=dict(size=size, scale=(0.32, 1.0)),
                            local_view=dict(size=8 if debug else 98, scale=(0.05, 0.32)), n_local=2 if debug else 8,
                            n_prototypes=64 if debug else 65_536, teacher_temperature=(0.04, 0.07),
                            temperature_warmup=steps // 8)
    config.data = dict(batch_size=16 if debug else 1024, train=images, synthetic=rows)
    config.optim = dict(steps=steps, learning_rate=5e-4, schedule="cosine", warmup=steps // 10, weight_decay=0.04,
                        final_weight_decay=0.4, clip=3.0, moments="bfloat16")
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // 4, save_every=steps // 4)
    config.evals = dict(batch_size=8 if debug else 512, collapse=dict(),
                        labelled=dict(test=images))
    return config
