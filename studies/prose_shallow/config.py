"""Causal LM of one layer on prose, byte by byte, in muP: a law on one side of copying.

    apt-get install dict-gcide
    python -m sslx.data.gcide /usr/share/dictd/gcide.dict.dz prose.jsonl
    python -m sslx.scaling.sweep --config studies/prose_shallow/config.py:prose.jsonl --out RUNS \
        --sizes 48x1,64x1,96x1,128x1,160x1,192x1,256x1 --budgets 1e12,3e12,1e13 --batch-size config

Copying from what was read takes two layers, of which one finds what came before (Elhage et al. 2021). Networks of
several learn it suddenly, some of them, and then are no longer on the curve of the others (studies/prose).
"""

import ml_collections


def get_config(path: str = "stdlib") -> ml_collections.ConfigDict:
    steps, length = 2000, 128
    text = dict(name="text", path=path, length=length)
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1)
    config.model = dict(name="transformer", vocab_size=384, max_length=length, width=96, depth=1, heads=6, norm="rms",
                        mlp="gelu", position="rope", bias=False, qk_norm=True, tied=False, scan=False, dtype="float32",
                        base=dict(width=96, depth=1, heads=6))
    config.objective = dict(name="causal_lm", sample_length=64)
    config.data = dict(batch_size=4, train=text | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=2e-3, schedule="wsd", warmup=steps // 20, decay=steps // 5,
                        weight_decay=0.1, b2=0.98, clip=1.0)
    config.run = dict(steps=steps, seed=0)
    config.evals = dict(batch_size=64, heldout=dict(source=text | dict(split="heldout"), batches=32),
                        copying=dict(batches=4))
    return config
