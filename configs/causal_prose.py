"""Causal language modelling on English prose, byte by byte, in muP: what a scaling law on a few CPU cores is made of.

    apt-get install dict-gcide
    python -m sslx.data.gcide /usr/share/dictd/gcide.dict.dz prose.jsonl
    python -m sslx.scaling.sweep --config configs/causal_prose.py:prose.jsonl --out /tmp/prose \
        --sizes 32x2,48x3,64x3,96x4,128x4 --budgets 1e12,3e12,1e13 --batch-size config --jobs 2

Without an argument it reads Python's standard library. The learning rate is that of the base, 64 x 3.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug = arg == "debug"
    path = "stdlib" if debug or not arg else arg
    steps, length = (24, 64) if debug else (2000, 128)
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.model = dict(name="transformer", vocab_size=384, max_length=length, width=64, depth=2 if debug else 3,
                        heads=4, norm="rms", mlp="gelu", position="rope", bias=False, qk_norm=True, tied=False,
                        scan=False, dtype="float32",
                        base=dict(width=32, depth=1, heads=2) if debug else dict(width=64, depth=3, heads=4))
    config.objective = dict(name="causal_lm", sample_length=64)
    text = dict(name="text", path=path, length=length)
    config.data = dict(batch_size=8 if debug else 4, train=text | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=4e-3, schedule="wsd", warmup=steps // 20, decay=steps // 5,
                        weight_decay=0.1, b2=0.98, clip=1.0)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // 2, save_every=steps // 3)
    config.evals = dict(batch_size=8 if debug else 64,
                        heldout=dict(source=text | dict(split="heldout"), batches=2 if debug else 32),
                        copying=dict(batches=2 if debug else 4))
    return config
