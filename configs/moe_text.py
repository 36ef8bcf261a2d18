"""A mixture of experts, causal language modelling on the text of Python's standard library.

    python -m sslx.main --config configs/moe_text.py --workdir /tmp/moe_text

Bytes; 8 experts of which a token takes 2, one that all take. `--config.mesh.expert=2` gives each of two devices half of
the experts.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug = arg == "debug"
    steps = 24 if debug else 2000
    width, length = (64, 64) if debug else (192, 256)
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1, tensor=1, expert=1)
    config.model = dict(name="transformer", vocab_size=384, max_length=length, width=width, depth=2 if debug else 4,
                        heads=width // 32, hidden=width, norm="rms", position="rope", bias=False, loss_chunks=2,
                        experts=dict(n=8, top_k=2, capacity=1.25, shared=1, balance=0.01), dtype="bfloat16")
    config.objective = dict(name="causal_lm", sample_length=length)
    text = dict(name="text", path="stdlib", length=length)
    config.data = dict(batch_size=8, train=text | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=2e-3, schedule="cosine", warmup=steps // 20, final=0.1,
                        weight_decay=0.1, b2=0.95, clip=1.0)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // 2, save_every=steps // 3)
    config.evals = dict(batch_size=8, heldout=dict(source=text | dict(split="heldout"), batches=2 if debug else 64))
    return config
