"""SimCLR with a ResNet-50 for 64 chips of TPU v5e (Chen et al. 2020).

    python -m sslx.aot --config configs/simclr_rn50.py --topology v5e:8x8
    python -m sslx.main --config configs/simclr_rn50.py --workdir gs://BUCKET/simclr_rn50

512 pairs of 224 pixels a chip, 800 epochs of ImageNet; batch norm and the 65536 candidates of a view are global.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug = arg == "debug"
    steps, size = (24, 16) if debug else (31_250, 224)
    rows = dict(modality="image", size=size)
    images = dict(name="synthetic", **rows) if debug else dict(name="arrayrecord", path="/data/images", size=size)
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1)
    network = dict(stages=(1, 1), width=16, stem="small") if debug else dict(stages=(3, 4, 6, 3), width=64)
    config.model = dict(name="resnet", bottleneck=True, remat="full", dtype="bfloat16", **network)
    config.objective = dict(name="simclr", view=dict(size=size, scale=(0.08, 1.0)), temperature=0.1, chunks=16)
    config.data = dict(batch_size=16 if debug else 32_768, train=images, synthetic=rows)
    config.optim = dict(steps=steps, optimizer="lars", learning_rate=13.6, schedule="cosine",
                        warmup=steps // 20, weight_decay=1e-6)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // 4, save_every=steps // 4)
    config.evals = dict(batch_size=8 if debug else 512, collapse=dict(),
                        labelled=dict(test=images))
    return config
