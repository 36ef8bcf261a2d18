"""Causal language modelling on the text of Python's own standard library: nothing to download.

    python -m sslx.main --config configs/quickstart.py --workdir /tmp/quickstart

A byte-level transformer of 1.8M parameters; about two minutes on two CPU cores.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug = arg == "debug"
    steps = 24 if debug else 600
    width, length = (64, 64) if debug else (192, 128)
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.model = dict(name="transformer", vocab_size=384, max_length=256, width=width, depth=2 if debug else 4,
                        heads=width // 32, norm="rms", mlp="gelu", position="rope", bias=False, qk_norm=True, tied=True,
                        scan=False, dtype="bfloat16")
    config.objective = dict(name="causal_lm", sample_length=length)
    text = dict(name="text", path="stdlib", length=length)
    config.data = dict(batch_size=8, train=text | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=3e-3, schedule="cosine", warmup=steps // 20, final=0.05,
                        weight_decay=0.1, b2=0.99, clip=1.0)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // 2, save_every=steps // 3)
    config.evals = dict(
        batch_size=8 if debug else 32,
        heldout=dict(source=text | dict(split="heldout"), batches=2 if debug else 32),
    )
    return config
