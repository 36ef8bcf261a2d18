"""CLIP on the emoji of openmoji and their captions, judged by retrieval among those held out.

    npm pack openmoji && pip install -e '.[emoji]'
    python -m sslx.data.openmoji openmoji-*.tgz emoji
    python -m sslx.main --config configs/clip_openmoji.py --workdir /tmp/clip --config.data.train.path=emoji

`:digits` needs nothing installed (scikit-learn's 8x8 digits, with captions in words).
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug, digits = arg == "debug", arg in ("debug", "digits")
    steps = 24 if debug else 500 if digits else 1000
    size, length = (8, 24) if digits else (32, 64)
    pairs = (dict(name="digits", captions=length) if digits else
             dict(name="captions", path="emoji", size=size, length=length, heldout=0.1))
    heldout = pairs | dict(split="test" if digits else "heldout")
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.model = dict(
        name="two_towers",
        image=dict(name="resnet", stages=(1,) if debug else (1, 1, 1), width=8 if debug else 32, stem="small_stride2"),
        text=dict(name="transformer", vocab_size=384, max_length=length, width=32 if debug else 128,
                  depth=1 if debug else 2, heads=2 if debug else 4, scan=False),
        dtype="float32")
    view = dict(size=size, scale=(0.6, 1.0), flip=0.0 if digits else 0.5, jitter=0.0, grayscale=0.0, blur=0.0)
    config.objective = dict(name="clip", features=16 if debug else 128, view=view)
    config.data = dict(batch_size=32 if debug else 128, train=pairs | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=1e-3, schedule="cosine", warmup=steps // 10, weight_decay=0.1)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // 2, save_every=steps // 3)
    config.evals = dict(batch_size=32 if debug else 128, retrieval=dict(source=heldout),
                        labelled=dict(train=pairs | dict(split="train"), test=heldout), zero_shot=dict(), knn=dict(k=5))
    return config
