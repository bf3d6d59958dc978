"""What a denoiser is trained on: pictures as clean samples x0, captions as conditions. Encoded once where that is possible.

Cached rows are named by what they were made from (the picture's bytes and how it was cut; the caption) in a file named by
the network that made them, so a changed picture, crop, VAE or text encoder is simply another row or another file.
"""

import torch

from nanodiff.config import UserError, printable, short
from nanodiff.device import dist
from nanodiff.diffusion import objective
from nanodiff.text.prompt import counting_cuts
from nanodiff.text.tokenizer import CLIPTokenizer
from nanodiff.training.loader import Cache, content, fingerprint, replacement

BATCH = 16  # captions, or pictures of 256 px, encoded at a time; of smaller pictures more, up to 256
LARGEST = 16 << 30  # bytes of encoded captions beyond which they are not kept


class Latents:
    """x0 of a batch: pixels in [-1, 1], or with a VAE its scaled latents, a sample of the posterior for every use.

    The posterior's mean and deviation are cached where a picture is cut the same way every time (mirrored ones beside the
    plain ones); random crops, jitter and rotation are encoded as they come. pictures: the feed's batches have them even so.
    """

    def __init__(self, vae, feed, seed, device, folder=None, cached=True, pictures=False):
        self.vae, self.feed, self.seed, self.device = vae, feed, seed, device
        decoder = feed.decoder
        self.cached = vae is not None and cached and decoder.transform.fixed
        if vae is not None and cached and not self.cached:
            dist.say("note: random crops, jitter or rotation: pictures are encoded at every use, not once")
        if self.cached:
            self.cache = Cache(folder, "latents", fingerprint(vae))
            self.names = {}
            self._fill(decoder)
            decoder.pictures = pictures

    def _fill(self, decoder):
        wanted, flips = {}, (False, True) if decoder.transform.flip else (False,)
        for i in range(len(decoder.dataset)):
            size, bytes_ = decoder.size(i), decoder.dataset.data(i)
            for flip in flips:
                self.names[i, flip] = content(bytes_, size, decoder.transform.key, flip)
                wanted[self.names[i, flip]] = (i, flip)
        by_size = {}
        for name, (i, flip) in wanted.items():
            by_size.setdefault(decoder.size(i), {})[name] = (i, flip)
        for (width, height), some in by_size.items():
            together = min(max(BATCH, BATCH * 256**2 // (width * height)), 256)
            self.cache.fill(some, lambda inputs: self._encode(decoder, inputs), together, "encoding pictures")
        empty = [i for i in range(len(decoder.dataset)) if not self.cache[self.names[i, False]].numel()]
        for i in empty:  # pictures that cannot be read: see Feed's policy
            if decoder.policy != "skip":
                decoder.one(i, None, decoder.size(i))
            self.feed.bad[i] = (decoder.dataset.keys[i], "cannot be read")
        if len(empty) > self.feed.limit * len(decoder.dataset):
            raise self.feed._too_many()
        gone = set(empty)
        for i in empty:  # one of the same size stands in
            others = (replacement(len(decoder.dataset), decoder.seed, i, k) for k in range(1, 10_000))
            fitting = (o for o in others if o not in gone and decoder.size(o) == decoder.size(i))
            if (other := next(fitting, None)) is None:
                raise UserError(
                    f"{printable(decoder.dataset.keys[i])} cannot be read, and no other picture has its size"
                )
            decoder.known_bad[i] = other

    def _encode(self, decoder, inputs):
        """[(position, mirrored)] -> [[2, C, h, w]]: mean and deviation; an empty tensor for what cannot be read."""
        arrays = []
        for i, flip in inputs:
            try:
                array = torch.from_numpy(decoder.one(i, None, decoder.size(i)).copy())
                arrays.append(array.flip(-1) if flip else array)
            except UserError as e:
                if decoder.policy != "skip":
                    raise
                dist.say(f"warning: {printable(e)}")
                arrays.append(None)
        good = [a for a in arrays if a is not None]
        if not good:
            return [torch.empty(0) for _ in arrays]
        pixels = (torch.stack(good).float() / 127.5 - 1).to(self.device)
        with torch.no_grad():
            mean, logvar = self.vae.encode_moments(pixels)
        rows = iter(torch.stack([mean, (0.5 * logvar).exp()], dim=1).cpu())  # one copy for all
        out = [torch.empty(0) if a is None else next(rows) for a in arrays]
        for row, (i, _) in zip(out, inputs, strict=True):
            if not torch.isfinite(row).all():
                raise UserError(f"the VAE's latents of {printable(decoder.dataset.keys[i])} are not finite")
        return out

    def __call__(self, batch):
        """x0 [B, C, h, w] of a loader's Batch, on the device, fp32."""
        if self.vae is None:
            return batch.pixels.to(self.device)
        if self.cached:
            rows = [self.cache[self.names[p, bool(f)]] for p, f in zip(batch.positions, batch.flips, strict=True)]
            mean, std = torch.stack(rows).to(self.device).unbind(1)
        else:
            with torch.no_grad(), torch.autocast(torch.device(self.device).type, enabled=False):
                mean, logvar = self.vae.encode_moments(batch.pixels.to(self.device))
            std = (0.5 * logvar).exp()
        shape = mean.shape[1:]
        noise = objective.draw(self.seed, "posterior", batch.indices, lambda g: torch.randn(shape, generator=g))
        cfg = self.vae.cfg
        return (mean + std * noise.to(self.device) - (cfg.shift_factor or 0)) * cfg.scaling_factor


def vocabularies(sd):
    """A hash of how a pipeline turns texts into numbers."""
    vocabularies_of = [t.backend.to_str() if hasattr(t, "backend") else t.labels for t in sd.tokenizers]
    masked = ["masked" for e in sd.encoders if getattr(getattr(e, "cfg", None), "use_attention_mask", False)]
    return content(*vocabularies_of, *(getattr(t, "length", "") for t in sd.tokenizers), *masked)


class Texts:
    """The condition of a batch: which caption each picture gets this time, sometimes none, encoded.

    trained: the call of a text encoder that learns along; otherwise the pipeline's frozen encoders, each caption once.
    dropout: share of the samples that get what stands for no text, for classifier-free guidance (Ho & Salimans 2022 §3.1).
    """

    def __init__(
        self, sd, texts, seed, device, dropout=0.0, trained=None, folder=None, cached=True, dtype=torch.float32
    ):
        self.sd, self.texts, self.seed, self.device, self.dropout, self.trained = (
            sd,
            texts,
            seed,
            device,
            dropout,
            trained,
        )
        self.cache, self.cut = None, False
        if trained is not None:
            self.ids = {}
            return
        different = sorted({t for group in texts for t in group} | {""})
        first = self._encode([different[-1]])
        self.shape = first.states.shape[1:]
        size = len(different) * first.states[0].numel() * dtype.itemsize
        if not cached or size > LARGEST:
            dist.say(f"note: {len(different)} captions are encoded as they come ({size >> 20} MB encoded)")
            return
        networks = [e for e in sd.encoders if e is not None]
        self.cache = Cache(folder, f"text-{str(dtype).removeprefix('torch.')}", fingerprint(*networks))
        words = vocabularies(sd)
        self.names = {text: content(text, words) for text in different}

        def make(inputs):
            text = self._encode(inputs)
            parts = [text.states.flatten(1)] + ([text.pooled] if text.pooled is not None else [])
            return torch.cat(parts, dim=1).to(dtype)

        self.cache.fill({n: t for t, n in self.names.items()}, make, BATCH, "encoding captions")
        self.pooled = first.pooled is not None

    @torch.no_grad()
    def _encode(self, texts):
        with torch.autocast(torch.device(self.device).type, enabled=False), counting_cuts() as cut:
            encoded = self.sd.encode(texts)
        if cut and not self.cut:
            self.cut = True
            text, what = cut[0]
            dist.say(f"warning: captions of more than {what} are cut, such as {short(text, 60)}")
        return encoded

    def _say_cut(self, text):
        """A line for the first caption that the encoder in training does not see the end of."""
        tokenizer, room = self.sd.tokenizer, getattr(self.sd.tokenizer, "length", 0) - 2
        if isinstance(tokenizer, CLIPTokenizer) and not self.cut and len(tokenizer.pieces(text)) > room:
            self.cut = True
            dist.say(f"warning: captions of more than {room} tokens are cut, such as {short(text, 60)}")

    def chosen(self, batch):
        """The text of every sample; None where it is dropped."""
        out = []
        for index, position in zip(batch.indices, batch.positions, strict=True):
            g = objective.generator(self.seed, "dropout", index)
            if torch.rand((), generator=g).item() < self.dropout:
                out.append(None)
                continue
            group = self.texts[position]
            pick = torch.randint(len(group), (), generator=objective.generator(self.seed, "caption", index)).item()
            out.append(group[pick])
        return out

    def __call__(self, batch, texts=None):
        """The condition (states, pooled) of a loader's Batch, on the device. texts: instead of the drawn ones."""
        texts = self.chosen(batch) if texts is None else texts
        states, pooled = self._said([t or "" for t in texts])
        if None in texts and self.sd.nothing_is_zeros:  # SDXL's guidance has zeros in place of the empty text
            kept = torch.tensor([t is not None for t in texts], device=states.device)
            states = torch.where(kept[:, None, None], states, 0.0)
            pooled = torch.where(kept[:, None], pooled, 0.0)
        return states, pooled

    def _said(self, texts):
        """(states, pooled) of texts."""
        if self.trained is not None:
            for text in texts:
                if text not in self.ids:
                    self.ids[text] = self.sd.tokenizer([text])[0]
                    self._say_cut(text)
            ids = torch.tensor([self.ids[t] for t in texts], device=self.device)
            states, pooled = self.trained(ids)
            return self.sd.pick(0, 0)(states), pooled
        if self.cache is None:
            text = self._encode(texts)
            return text.states, text.pooled
        rows = torch.stack([self.cache[self.names[t]] for t in texts]).to(self.device).float()
        size = self.shape[0] * self.shape[1]
        return rows[:, :size].unflatten(1, self.shape), rows[:, size:] if self.pooled else None
