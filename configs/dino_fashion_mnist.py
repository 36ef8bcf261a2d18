"""DINO on Fashion-MNIST, 60000 images without labels, judged by kNN and a linear probe.

    apt-get install dataset-fashion-mnist
    python -m sslx.main --config configs/dino_fashion_mnist.py --workdir /tmp/dino

Two global crops of 28 pixels and two local ones of 14. `:digits` needs nothing installed (scikit-learn's 8x8 digits).
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug, digits = arg == "debug", arg in ("debug", "digits")
    steps = 24 if debug else 1750  # 10 to 16 minutes of a core
    size, small, patch = (8, 4, 2) if digits else (28, 14, 7)
    width = 64 if debug else 128
    images = dict(name="digits") if digits else dict(name="idx", path="fashion-mnist")
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.model = dict(name="vit", image_size=size, patch=patch, width=width, depth=2 if debug else 4, heads=4,
                        pool="cls", position="learned", norm="rms", bias=False, scan=False, dtype="float32")
    # Weaker looks leave the brightness of an image as a shortcut: docs/joint_embeddings.md.
    looks = (dict(flip=0.0, brightness=0.4, contrast=0.4, blur=0.0) if digits else
             dict(flip=0.5, jitter=1.0, brightness=0.8, contrast=0.8, blur=0.5, solarize=0.2))
    # The paper's warmer and slower teachers, and slower centres, are for runs of epochs: here assignments would become
    # uniform.
    config.objective = dict(name="dino", steps=steps, global_view=looks | dict(size=size, scale=(0.4, 1.0)),
                            local_view=looks | dict(size=small, scale=(0.15, 0.4)), n_local=2,
                            n_prototypes=64 if debug else 1024, hidden=64 if debug else 256,
                            bottleneck=32 if debug else 64, teacher_temperature=(0.04, 0.04),
                            temperature_warmup=0, momentum=(0.97, 1.0), centre_momentum=0.5, batch_norm=True)
    config.data = dict(batch_size=32 if debug else 128, train=images | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=3e-3, schedule="cosine", warmup=steps // 10, weight_decay=0.04,
                        clip=3.0, freeze_prototypes=steps // 20)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // (2 if debug else 5),
                      save_every=steps // (3 if debug else 5))
    config.evals = dict(
        batch_size=32 if debug else 500,
        labelled=dict(train=images | dict(split="train") | ({} if digits else dict(limit=10_000)),
                      test=images | dict(split="test") | ({} if digits else dict(limit=2000))),
        probe=dict(), knn=dict(k=5), collapse=dict(),
    )
    return config
