"""Rotation prediction on Fashion-MNIST, judged by kNN and a linear probe.

    python -m sslx.main --config configs/rotation_fashion_mnist.py --workdir /tmp/rotation

`:digits` needs nothing installed (scikit-learn's 8x8 digits).
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug, digits = arg == "debug", arg in ("debug", "digits")
    steps = 24 if debug else 1000
    images = dict(name="digits") if digits else dict(name="idx", path="fashion-mnist")
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.model = dict(name="resnet", stages=(1, 1, 1), width=8 if debug else 32, stem="small_stride2",
                        dtype="float32")
    config.objective = dict(name="rotation")
    config.data = dict(batch_size=32 if debug else 128, train=images | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=2e-3, warmup=steps // 10, weight_decay=1e-4)
    config.run = dict(steps=steps, log_every=4 if debug else 20, eval_every=steps // 2, save_every=steps // 3)
    config.evals = dict(
        batch_size=32 if debug else 500,
        labelled=dict(train=images | dict(split="train") | ({} if digits else dict(limit=10_000)),
                      test=images | dict(split="test") | ({} if digits else dict(limit=2000))),
        probe=dict(), knn=dict(k=5), collapse=dict(),
    )
    return config
