"""What grows: a network of text, one of pairs of images, one of crops, as small as it can be and still cost something.

    python -m sslx.bench --config tests/growth/config.py:text --config.model.width=256
"""

import ml_collections


def get_config(arg: str) -> ml_collections.ConfigDict:
    vit = dict(name="vit", image_size=16, patch=4, width=64, depth=2, heads=2, scan=False, dtype="float32")
    images = dict(name="synthetic", modality="image", size=16)
    crop = dict(size=16, jitter=0.0, blur=0.0)
    model, objective, rows, batch = {
        "text": (dict(name="transformer", vocab_size=256, max_length=128, width=128, depth=2, heads=2, scan=False,
                      dtype="float32"),
                 dict(name="causal_lm"), dict(name="synthetic", modality="text", length=128, vocab_size=256), 8),
        "pairs": (vit, dict(name="simclr", view=crop, hidden=128, features=256), images, 64),
        "crops": (vit | dict(pool="cls"), dict(name="dino", global_view=crop, local_view=crop | dict(size=8), n_local=2,
                                               n_prototypes=1024, hidden=256, bottleneck=64, steps=1000), images, 32),
    }[arg]
    return ml_collections.ConfigDict(dict(
        mesh=dict(data=1), model=model, objective=objective, evals={}, run=dict(steps=1000),
        data=dict(batch_size=batch, train=rows), optim=dict(steps=1000, learning_rate=1e-3)))
