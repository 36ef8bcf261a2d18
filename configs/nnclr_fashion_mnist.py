"""NNCLR on Fashion-MNIST, 60000 images without labels, judged by kNN and a linear probe.

    apt-get install dataset-fashion-mnist
    python -m sslx.main --config configs/nnclr_fashion_mnist.py --workdir /tmp/nnclr

`:digits` needs nothing installed (scikit-learn's 8x8 digits).
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug, digits = arg == "debug", arg in ("debug", "digits")
    steps = 24 if debug else 1150  # 10 to 16 minutes of a core
    size = 16 if digits else 28
    images = dict(name="digits") if digits else dict(name="idx", path="fashion-mnist")
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.model = dict(name="resnet", stages=(1,) if debug else (1, 1, 1, 1), width=8 if debug else 32,
                        stem="small_stride2", dtype="float32")
    # Weaker looks leave the brightness of an image as a shortcut: docs/joint_embeddings.md.
    looks = (dict(flip=0.0, brightness=0.4, contrast=0.4, blur=0.0) if digits else
             dict(flip=0.5, jitter=1.0, brightness=0.8, contrast=0.8, blur=0.5, solarize=0.2))
    view = dict(size=size, scale=(0.3, 1.0), **looks)
    config.objective = dict(name="nnclr", view=view, queue=64 if debug else 4096, temperature=0.1,
                            hidden=32 if debug else 512, features=16 if debug else 128,
                            predictor=32 if debug else 512)
    config.data = dict(batch_size=32 if debug else 256, train=images | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=5e-3, schedule="cosine", warmup=steps // 20, weight_decay=1e-4)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // (2 if debug else 5),
                      save_every=steps // (3 if debug else 5))
    config.evals = dict(
        batch_size=32 if debug else 500,
        labelled=dict(train=images | dict(split="train") | ({} if digits else dict(limit=10_000)),
                      test=images | dict(split="test") | ({} if digits else dict(limit=2000))),
        probe=dict(), knn=dict(k=5), collapse=dict(),
    )
    return config
