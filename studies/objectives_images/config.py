"""MAE, SimCLR and DINO with one ViT, on the same images in the same order; the argument is which.

    apt-get install dataset-fashion-mnist
    for objective in mae simclr dino; do
        python -m sslx.scaling.sweep --config studies/objectives_images/config.py:$objective --out RUNS/$objective \
            --sizes model.width=64 --budgets 3e11,1e12,3e12
    done
"""

import ml_collections

VIEW = dict(flip=0.5, blur=0.0)
COLOURS = VIEW | dict(brightness=0.4, contrast=0.4)
# As configs/<objective>_fashion_mnist.py had them when these ran.
OBJECTIVES = dict(
    mae=dict(view=VIEW | dict(size=28, scale=(0.5, 1.0), jitter=0.0), mask_ratio=0.75, decoder_width=64,
             decoder_depth=1, decoder_heads=4, normalize_target=True),
    simclr=dict(view=COLOURS | dict(size=28, scale=(0.3, 1.0)), temperature=0.1, hidden=256, features=128),
    dino=dict(global_view=COLOURS | dict(size=28, scale=(0.4, 1.0)),
              local_view=COLOURS | dict(size=14, scale=(0.15, 0.4)), n_local=2, n_prototypes=1024, hidden=256,
              bottleneck=64, teacher_temperature=(0.04, 0.06), momentum=(0.99, 1.0)))
LEARNING_RATE = dict(mae=2e-3, simclr=2e-3, dino=1e-3)


def get_config(objective: str = "mae") -> ml_collections.ConfigDict:
    steps = 1000
    images = dict(name="idx", path="fashion-mnist")
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1)
    config.model = dict(name="vit", image_size=28, patch=7, width=64, depth=3, heads=2, pool="mean", position="sincos",
                        norm="rms", bias=False, scan=False, dtype="float32")
    config.objective = dict(name=objective, **OBJECTIVES[objective])
    if objective == "dino":
        config.objective.update(steps=steps, temperature_warmup=steps // 4)
    config.data = dict(batch_size=64, train=images | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=LEARNING_RATE[objective], schedule="cosine", warmup=steps // 10,
                        weight_decay=0.04, b2=0.95, clip=3.0)
    if objective == "dino":
        config.optim.freeze_prototypes = steps // 20
    config.run = dict(steps=steps, seed=0)
    config.evals = dict(batch_size=500, knn=dict(k=5), probe=dict(), collapse=dict(),
                        labelled=dict(train=images | dict(split="train", limit=10_000),
                                      test=images | dict(split="test", limit=2000)))
    return config
