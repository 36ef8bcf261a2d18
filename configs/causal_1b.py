"""A Llama of 1.1B parameters (TinyLlama with wider heads) for 64 chips of TPU v6e, weights over all of them (ZeRO-3).

    python -m sslx.aot --config configs/causal_1b.py --topology v6e:8x8
    python -m sslx.data.prepare --out /data/tokens ...
    python -m sslx.main --config configs/causal_1b.py --workdir gs://BUCKET/causal_1b

One sequence of 4096 tokens a chip, 262144 tokens a step.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug = arg == "debug"
    steps, length = (24, 64) if debug else (100_000, 4096)
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1, tensor=1, expert=1) if debug else dict(data=1, fsdp=-1, tensor=1)
    small = dict(vocab_size=384, width=64, depth=2, heads=2)
    large = dict(vocab_size=32_000, width=2048, depth=22, heads=16, kv_heads=4, hidden=5632)
    size = small if debug else large
    config.model = dict(name="transformer", max_length=length, norm="rms", mlp="swiglu", position="rope", bias=False,
                        tied=False, remat="full", loss_chunks=4, dtype="bfloat16", **size)
    config.objective = dict(name="causal_lm")
    rows = dict(modality="text", length=length, vocab_size=size["vocab_size"])
    tokens = dict(name="synthetic", **rows) if debug else dict(name="tokens", path="/data/tokens", length=length)
    config.data = dict(batch_size=8 if debug else 64, train=tokens, synthetic=rows)
    config.optim = dict(steps=steps, learning_rate=4e-4, schedule="cosine", warmup=steps // 50, final=0.1,
                        weight_decay=0.1, b2=0.95, clip=1.0)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // 4, save_every=steps // 4)
    heldout = tokens if debug else tokens | dict(split="heldout")
    config.evals = dict(batch_size=8 if debug else 64, heldout=dict(source=heldout, batches=2 if debug else 16))
    return config
