"""T5's span corruption on the text of Python's standard library, judged by which package a text is from.

    python -m sslx.main --config configs/span_text.py --workdir /tmp/span_text

Bytes; 15 % of 256 in spans of 3 on average, so an encoder input of 232 and a target of 52 tokens.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug = arg == "debug"
    steps = 24 if debug else 3000
    width, length = (64, 64) if debug else (256, 256)
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.model = dict(name="encdec", vocab_size=384, width=width, depth=2 if debug else 4, heads=width // 32,
                        position="relative", mlp="gelu", remat="none", dtype="bfloat16")
    config.objective = dict(name="span_corruption", rate=0.15, mean_span=3.0)
    text = dict(name="text", path="stdlib", length=length)
    config.data = dict(batch_size=8 if debug else 16, train=text | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=1e-3, schedule="cosine", warmup=steps // 10, weight_decay=0.01,
                        b2=0.98, clip=1.0)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // 2, save_every=steps // 3)
    labelled = text | dict(labels="package")
    config.evals = dict(
        batch_size=8 if debug else 64,
        heldout=dict(source=text | dict(split="heldout"), batches=2 if debug else 16),
        labelled=dict(train=labelled | dict(split="train", limit=100 if debug else 4000),
                      test=labelled | dict(split="heldout", limit=50 if debug else 1000)),
        probe=dict(), knn=dict(k=5), collapse=dict(),
    )
    return config
