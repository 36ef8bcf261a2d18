"""T5 v1.1 XXL's shape (11B parameters) for 64 chips of TPU v5p: span corruption (Raffel et al. 2020).

    python -m sslx.aot --config configs/t5_11b.py --topology v5p:4x4x4
    python -m sslx.data.prepare --out /data/tokens ...
    python -m sslx.main --config configs/t5_11b.py --workdir gs://BUCKET/t5_11b

16 windows of 568 tokens a chip, which make inputs of 512 and targets of 114.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug = arg == "debug"
    steps, length, vocabulary = (24, 64, 384) if debug else (100_000, 568, 32_128)
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1) if debug else dict(data=1, fsdp=-1)
    width, depth, heads, hidden = (64, 2, 2, 128) if debug else (4096, 24, 64, 10_240)
    config.model = dict(name="encdec", vocab_size=vocabulary, width=width, depth=depth, heads=heads, hidden=hidden,
                        mlp="swiglu", tied=False, remat="full", dtype="bfloat16")
    config.objective = dict(name="span_corruption", rate=0.15, mean_span=3.0)
    rows = dict(modality="text", length=length, vocab_size=vocabulary)
    tokens = dict(name="synthetic", **rows) if debug else dict(name="tokens", path="/data/tokens", length=length)
    config.data = dict(batch_size=8 if debug else 1024, train=tokens, synthetic=rows)
    config.optim = dict(steps=steps, learning_rate=3e-4, schedule="cosine", warmup=steps // 50, weight_decay=0.01,
                        clip=1.0)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // 4, save_every=steps // 4)
    heldout = tokens if debug else tokens | dict(split="heldout")
    config.evals = dict(batch_size=8 if debug else 1024, heldout=dict(source=heldout, batches=2 if debug else 16))
    return config
