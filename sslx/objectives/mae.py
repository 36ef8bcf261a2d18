"""Masked autoencoding: reconstruct the pixels of hidden patches from the visible ones (He et al. 2022).

B batch, N patches, M visible patches, P values of a patch, D model.
"""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from sslx import config
from sslx.config import Count, Part, UserError
from sslx.data import Info
from sslx.layers import Linear, Norm, Remat, Stack, weight
from sslx.models import check_heads
from sslx.models.vit import VisionTransformer, sincos_2d
from sslx.objectives import Objective
from sslx.objectives.image import check_images
from sslx.sharding import spec, whole
from sslx.views.image import View, augmentation, patchify, to_float, unpatchify
from sslx.views.tokens import random_keep


def reconstruction_loss(predicted_BNP, target_BNP, mask_BN):
    """Mean squared error over the hidden patches (mask 1)."""
    chex.assert_equal_shape([predicted_BNP, target_BNP])
    error_BN = jnp.square(predicted_BNP - target_BNP).mean(-1)
    return (error_BN * mask_BN).sum() / mask_BN.sum()


def per_patch(patches_BNP):
    """(mean, standard deviation) of each patch, [B, N, 1], by which its target is normalized."""
    return patches_BNP.mean(-1, keepdims=True), jnp.sqrt(patches_BNP.var(-1, ddof=1, keepdims=True) + 1e-6)


class Decoder(nn.Module):
    """Predictions float32 [B, N, P] from encoded visible patches and a mask token at every hidden one."""

    grid: tuple[int, int]
    width: int
    depth: int
    block: dict[str, Any]
    features: int
    scan: bool
    remat: Remat
    dtype: Any

    @nn.compact
    def __call__(self, encoded_BMD, restore_BN):
        n_hidden = restore_BN.shape[1] - encoded_BMD.shape[1]
        x_BMD = Linear(self.width, ("embed", None), dtype=self.dtype, name="embed")(encoded_BMD)
        mask_D = weight(self, "mask_token", nn.initializers.normal(0.02), (self.width,), (None,)).astype(self.dtype)
        hidden_BHD = jnp.broadcast_to(mask_D, (len(x_BMD), n_hidden, self.width), out_sharding=spec("batch"))
        x_BND = jnp.take_along_axis(jnp.concatenate([x_BMD, hidden_BHD], 1), restore_BN[..., None], 1)
        x_BND = x_BND + sincos_2d(*self.grid, self.width).astype(self.dtype)
        x_BND = Stack(self.depth, self.block, self.scan, self.remat, name="stack")(x_BND, mask="bidirectional")
        x_BND = whole(Norm(name="norm")(x_BND))
        return Linear(self.features, ("embed", None), dtype=self.dtype, name="pixels")(x_BND).astype(jnp.float32)


def make(model: VisionTransformer, info: Info, *, view: dict[str, Any], mask_ratio: Part = 0.75,
         decoder_width: Count = 512, decoder_depth: Count = 8, decoder_heads: Count = 16,
         normalize_target: bool = True) -> Objective:
    """MAE: the encoder sees the kept patches only, a light decoder all positions.

    view:             arguments of `views.image.augmentation`, the crop and flip before masking.
    mask_ratio:       of patches hidden.
    normalize_target: each patch of the target by its own mean and standard deviation.
    """
    check_images(model, info)
    augment: View = config.call(augmentation, view, "config.objective.view")
    check_heads(decoder_width, decoder_heads, names=("objective.decoder_width", "objective.decoder_heads"))
    if decoder_width % 4:
        raise UserError(f"objective.decoder_width={decoder_width} must be a multiple of 4, as its positions are sines")
    if view["size"] != model.grid[0] * model.patch:
        raise UserError(f"objective.view.size={view['size']} must be model.image_size={model.grid[0] * model.patch},"
                        " whose patches the decoder reconstructs")
    n = model.grid[0] * model.grid[1]
    n_keep = round(n * (1 - mask_ratio))
    if not 0 < n_keep < n:
        raise UserError(f"objective.mask_ratio={mask_ratio} of {n} patches keeps {n_keep};"
                        " it must keep some and hide some")
    n_cls = int(model.pool == "cls")
    shape = (model.grid[0] * model.patch, model.grid[1] * model.patch, info.shape[2])
    decoder = Decoder(model.grid, decoder_width, decoder_depth, dict(heads=decoder_heads, dtype=model.dtype),
                      model.patch**2 * info.shape[2], model.scan, model.remat, model.dtype)

    def init(key, batch):
        key_encoder, key_decoder = jax.random.split(key)
        images = augment(key, batch["image"])
        encoder, encoded = model.init_with_output(key_encoder, images)
        params = encoder if isinstance(encoder, dict) else encoded
        restore = random_keep(key, len(images), n, n)[1]
        encoded_BND = model.apply(params, images)[:, n_cls:]
        return {"encoder": params["params"], "decoder": decoder.init(key_decoder, encoded_BND, restore)["params"]}, {}

    def reconstruct(params, images, key, train=False):
        """(prediction, target, mask) of the patches of images."""
        keep_BM, restore_BN, mask_BN = random_keep(key, len(images), n, n_keep)
        with jax.named_scope("encoder"):
            rngs = {"drop": jax.random.fold_in(key, 1)} if train else {}
            encoded_BMD = model.apply({"params": params["encoder"]}, images, keep_BM, rngs=rngs)[:, n_cls:]
        with jax.named_scope("decoder"):
            predicted_BNP = decoder.apply({"params": params["decoder"]}, encoded_BMD, restore_BN)
        return predicted_BNP, patchify(images, model.patch), mask_BN

    def loss(params, aux, batch, key):
        key_view, key_mask = jax.random.split(key)
        predicted_BNP, target_BNP, mask_BN = reconstruct(params, augment(key_view, batch["image"]), key_mask,
                                                         train=True)
        if normalize_target:
            mean, std = per_patch(target_BNP)
            target_BNP = (target_BNP - mean) / std
        value = reconstruction_loss(predicted_BNP, target_BNP, mask_BN)
        return value, (aux, {"loss": value, "tokens": jnp.int32(mask_BN.size)})

    def encode(params, aux, batch):
        tokens_BND = model.apply({"params": params["encoder"]}, to_float(batch["image"]))
        return tokens_BND[:, n_cls:].astype(jnp.float32).mean(1)

    def show(params, aux, batch, key):
        key_view, key_mask = jax.random.split(key)
        predicted_BNP, target_BNP, mask_BN = reconstruct(params, augment(key_view, batch["image"]), key_mask,
                                                         train=True)
        if normalize_target:
            mean, std = per_patch(target_BNP)
            predicted_BNP = predicted_BNP * std + mean
        hidden_BN1 = mask_BN[..., None] > 0
        pictures = {"input": target_BNP, "masked": jnp.where(hidden_BN1, 0.5, target_BNP),
                    "reconstruction": jnp.where(hidden_BN1, predicted_BNP, target_BNP)}
        return {k: jnp.clip(unpatchify(v, model.patch, shape), 0, 1) for k, v in pictures.items()}

    return Objective(init, loss, encode, show)
