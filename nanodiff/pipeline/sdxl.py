"""Stable Diffusion XL.

Explained in the book (docs/book): chapter 10.
"""

from numbers import Real

import torch

from nanodiff.config import UserError, short
from nanodiff.device import memory
from nanodiff.pipeline import families
from nanodiff.pipeline.base import Pipeline
from nanodiff.pipeline.conditions import Text, _penultimate, _same_length


class SDXL(Pipeline):
    """Stable Diffusion XL and its turbo: two text encoders, a pooled text and six sizes (Podell et al. 2023, arXiv
    2307.01952 §2.2)."""

    family = families.SDXL

    def check_fit(self):
        self.check_latents()
        unet, encoders = self.net.cfg, [e.cfg for e in self.encoders]
        if unet.addition_embed_type != "text_time":
            raise UserError("unet: has no text_time condition, so it is not SDXL's")
        if not encoders[-1].with_projection:
            raise UserError("text_encoder_2: has no text_projection, so it is not SDXL's")
        givers = "the text encoders" if len(encoders) > 1 else "text_encoder_2"
        self.check_text(unet.cross_attention_dim, sum(e.hidden_size for e in encoders), givers=givers)
        vector = encoders[-1].projection_dim + self.family.sizes * unet.addition_time_embed_dim
        self.check_text(unet.projection_class_embeddings_input_dim, vector, "a vector", "text_encoder_2")
        self.check_tokenizers()

    def pick(self, i, clip_skip):
        return _penultimate(clip_skip)

    def encode_uniques(self, texts, clip_skip, long_prompts, weighted, length):
        pairs = [
            self.clip(i, [t[i] for t in texts], clip_skip, long_prompts, weighted) for i in range(len(self.encoders))
        ]
        return Text(torch.cat(_same_length(self, pairs, clip_skip), dim=-1), pairs[-1][1])

    @property
    def nothing_is_zeros(self):
        return self.index.get("force_zeros_for_empty_prompt", True)

    def size_ids(self, n, height, width, sizes, begun=False):
        """[2, 6]: the six sizes of the negative and of the positive condition, heights first.

        sizes: {"original_size": (h, w), "crops_coords_top_left": (top, left), "target_size": (h, w)} and the same with
        "negative_", which need original and target together and otherwise are the positive ones. begun: with a picture, where
        either is enough and the corner is the positive one's, as in diffusers.
        """
        sizes = known_sizes(sizes, ("original_size", "crops_coords_top_left", "target_size"))
        defaults = {
            "original_size": (height, width),
            "crops_coords_top_left": (0, 0),
            "target_size": (height, width),
        }
        own = {k: sizes.get(k, default) for k, default in defaults.items()}
        ids = [v for pair in own.values() for v in pair]
        fallback = own if begun else {"crops_coords_top_left": (0, 0)}
        against = {k: sizes.get(f"negative_{k}", fallback.get(k)) for k in own}
        if any(k.startswith("negative_") for k in sizes) and None not in against.values():
            negative = [v for pair in against.values() for v in pair]
        elif any(k.startswith("negative_") for k in sizes):
            raise UserError("`negative_original_size` and `negative_target_size` must be given together")
        else:
            negative = ids
        return torch.tensor([negative, ids], dtype=torch.float32, device=self.device)

    def condition(self, text, extra, groups, net=None):
        n, sizes = len(text.states) // groups, extra.sizes
        ids = sizes[1:].expand(n * groups, -1)
        if groups > 1:  # the unconditional first
            ids = torch.cat([sizes[:1].expand(n, -1), ids[n:]])
        return *super().condition(text, extra, groups, net), (text.pooled, ids)

    def denoise(self, net, x, t, states, pooled, told=None):
        """told: [B, 6] as size_ids(); without it the sizes are the picture's own, uncropped."""
        self.check_trainable()
        if told is None:
            height, width = (s * self.downscale for s in x.shape[-2:])
            told = self.size_ids(1, height, width, None)[1:].expand(len(x), -1)
        return net(x, t, states, (pooled, told.to(x.device)))

    def vae_dtype(self):
        """SDXL's own VAE overflows in fp16 (`force_upcast`), so it is not even tried there."""
        dtype = memory.dtype_of(self.vae)
        return torch.float32 if dtype == torch.float16 and self.vae.cfg.force_upcast else dtype


class Refiner(SDXL):
    """SDXL's refiner: it goes on where the base model stops, with the second text encoder alone, and is told how much people liked the picture in
    place of a target size (Podell et al. 2023, arXiv 2307.01952 §2.5)."""

    family = families.REFINER

    def check_trainable(self):
        raise UserError("a refiner is only drawn with here, not trained or distilled; take the base model")

    def check_options(self, drawing, start, words):
        super().check_options(drawing, start, words)
        if not start.begun:
            raise UserError(
                "this is a refiner, which goes on with a picture: give `image`, or take it as the `refiner` of a base model"
            )

    def size_ids(self, n, height, width, sizes, begun=False):
        """[2, 5]: original size, corner and aesthetic score (about 1 to 10) of the negative and of the positive condition.

        sizes: {"original_size": (h, w), "crops_coords_top_left": (top, left), "aesthetic_score": 6.0} and the same with "negative_", which are the
        positive size, (0, 0) and 2.5 where not given.
        """
        sizes = known_sizes(sizes, ("original_size", "crops_coords_top_left", "aesthetic_score"))
        own = sizes.get("original_size", (height, width))
        rows = [
            [
                *sizes.get("negative_original_size", own),
                *sizes.get("negative_crops_coords_top_left", (0, 0)),
                sizes.get("negative_aesthetic_score", 2.5),
            ],
            [*own, *sizes.get("crops_coords_top_left", (0, 0)), sizes.get("aesthetic_score", 6.0)],
        ]
        return torch.tensor(rows, dtype=torch.float32, device=self.device)


def known_sizes(sizes, known):
    """Those of `sizes` that are given; all must be of the names `known`, also with "negative_" before. Raises UserError."""
    sizes = {k: v for k, v in (sizes or {}).items() if v is not None}
    for key in sizes:
        if key.removeprefix("negative_") not in known:
            raise UserError(f"`{key}`: this model has no such condition")
        numbers = [sizes[key]] if key.endswith("score") else sizes[key]
        pair = key.endswith("score") or (
            (isinstance(numbers, list | tuple) or getattr(numbers, "ndim", 0) == 1) and len(numbers) == 2
        )
        if not pair or any(isinstance(n, bool) or not isinstance(n, Real) for n in numbers):
            raise UserError(
                f"`{key}` {short(sizes[key])}: expected {'a number' if key.endswith('score') else 'a pair of numbers'}"
            )
    return sizes
