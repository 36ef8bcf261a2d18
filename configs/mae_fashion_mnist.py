"""MAE on Fashion-MNIST, 60000 images without labels, judged by kNN and a linear probe.

    apt-get install dataset-fashion-mnist
    python -m sslx.main --config configs/mae_fashion_mnist.py --workdir /tmp/mae

`:digits` needs nothing installed (scikit-learn's 8x8 digits).
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug, digits = arg == "debug", arg in ("debug", "digits")
    steps = 24 if debug else 1000 if digits else 3000
    size, patch = (8, 2) if digits else (28, 4)
    width = 64 if debug else 128
    images = dict(name="digits") if digits else dict(name="idx", path="fashion-mnist")
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.model = dict(name="vit", image_size=size, patch=patch, width=width, depth=2 if debug else 4, heads=4,
                        pool="mean", position="sincos", norm="rms", bias=False, scan=False, dtype="bfloat16")
    view = dict(size=size, scale=(0.5, 1.0), flip=0.0 if digits else 0.5, jitter=0.0, blur=0.0)
    config.objective = dict(name="mae", view=view, mask_ratio=0.75, decoder_width=64, decoder_depth=1,
                            decoder_heads=4, normalize_target=True)
    config.data = dict(batch_size=32 if debug else 256, train=images | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=2e-3, schedule="cosine", warmup=steps // 10, weight_decay=0.05,
                        b2=0.95)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // 2, save_every=steps // 3)
    config.evals = dict(
        batch_size=32 if debug else 500,
        labelled=dict(train=images | dict(split="train") | ({} if digits else dict(limit=10_000)),
                      test=images | dict(split="test") | ({} if digits else dict(limit=2000))),
        probe=dict(), knn=dict(k=5), collapse=dict(),
    )
    return config
