"""Masked autoencoding of Fashion-MNIST in muP: loss on held-out images and kNN of frozen features against compute.

    apt-get install dataset-fashion-mnist
    python -m sslx.scaling.sweep --config studies/masked_images/config.py --out RUNS \
        --sizes 32x2,48x2,64x3,96x4,128x4 --budgets 2e11,6e11,2e12 --learning-rate config --batch-size config
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    steps = 1000
    images = dict(name="idx", path="fashion-mnist")
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1)
    config.model = dict(name="vit", image_size=28, patch=4, width=64, depth=3, heads=2, pool="mean", position="sincos",
                        norm="rms", bias=False, scan=False, dtype="float32", base=dict(width=64, depth=3, heads=2))
    view = dict(size=28, scale=(0.5, 1.0), flip=0.5, jitter=0.0, blur=0.0)
    config.objective = dict(name="mae", view=view, mask_ratio=0.75, decoder_width=64, decoder_depth=1, decoder_heads=2,
                            normalize_target=True)
    config.data = dict(batch_size=8, train=images | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=1e-3, schedule="wsd", warmup=steps // 20, decay=steps // 5,
                        weight_decay=0.05, b2=0.95, clip=1.0)
    config.run = dict(steps=steps, seed=0)
    config.evals = dict(batch_size=500, heldout=dict(source=images | dict(split="test"), batches=20), knn=dict(k=5),
                        labelled=dict(train=images | dict(split="train", limit=10_000),
                                      test=images | dict(split="test", limit=2000)))
    return config
