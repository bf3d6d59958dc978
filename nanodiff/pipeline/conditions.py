"""What the denoiser is conditioned on: prompts as the text encoders' hidden states, padded, cached, joined into batches."""

from typing import NamedTuple

import torch

from nanodiff.config import UserError
from nanodiff.device import derived, memory
from nanodiff.models.clip import CLIPTextModel
from nanodiff.models.labels import LabelEncoder
from nanodiff.pipeline.settings import Words
from nanodiff.text import prompt
from nanodiff.text.tokenizer import CLIPTokenizer, LabelTokenizer

NO_WORDS = Words()
CACHE_BYTES = 1 << 30  # encoded prompts that are kept, in host memory
GROUP = 32  # prompts that are encoded at a time


def negative_skip(words):
    """clip_skip of the negative prompt: in diffusers it is the prompt's alone, in AUTOMATIC1111 and ComfyUI every text's."""
    return words.clip_skip if words.syntax or words.weighted == "comfyui" else 0


class Text(NamedTuple):
    """An encoded prompt, or several."""

    states: torch.Tensor  # [B, S, D], what the denoiser attends to
    pooled: torch.Tensor | None = None  # [B, P], SDXL and SD 3


class Extra(NamedTuple):
    """What the denoiser is told beside the text."""

    sizes: torch.Tensor | None = None  # SDXL's, see its size_ids()
    pictures: tuple = ()  # pictures.ImagePrompt


def _penultimate(clip_skip):
    """SDXL and SD 3 take the last layer but one, not normed; clip_skip counts from there."""

    def picked(states):
        if not 0 <= clip_skip < len(states) - 1:
            raise UserError(f"`clip_skip` {clip_skip}: the text encoder has {len(states) - 1} layers")
        return states[-2 - clip_skip]

    return picked


def _rows(n, first, second=None, third=None):
    """n tuples of a prompt's texts; each argument is one text for all, a list of n, or None."""
    columns = [list(c) if isinstance(c, list | tuple) else [c] * n for c in (first, second, third)]
    if odd := [len(c) for c in columns if len(c) != n]:
        raise UserError(f"{odd[0]} texts for {n} pictures: one for all, or one for each")
    return list(zip(*columns, strict=True))


def _per_encoder(text, n):
    """The n texts of a prompt: what is not given is the first one's."""
    texts = (text,) if isinstance(text, str) else tuple(text)
    first = texts[0] or ""
    return tuple((texts[i] if i < len(texts) else None) or first for i in range(n))


def _bytes(text):
    return sum(part.numel() * part.element_size() for part in text if part is not None)


def _same_length(sd, pairs, clip_skip):
    """The two CLIPs' states with as many chunks: the shorter one filled with those of the empty prompt."""
    longest = max(states.shape[1] for states, _ in pairs)
    filled = []
    for i, (states, _) in enumerate(pairs):
        missing = (longest - states.shape[1]) // sd.tokenizers[i].length
        if missing:
            empty, _ = sd.clip(i, [""], clip_skip, False, False)
            states = torch.cat([states, empty.repeat(len(states), missing, 1)], dim=1)
        filled.append(states)
    return filled


class Conditions:
    """What a pipeline does with words. Needs: encoders, tokenizers, encoder_names, kept (an OrderedDict), device, ready()."""

    text_encoder = property(lambda self: self.encoders[0])
    tokenizer = property(lambda self: self.tokenizers[0])

    @property
    def unconditional(self):
        """Does it draw without a condition?"""
        encoder = self.encoders[0]
        return isinstance(encoder, LabelEncoder) and not encoder.cfg.labels

    def check_text(self, wanted, given, what="text", givers="text_encoder"):
        if wanted != given:
            raise UserError(
                f"{self.denoiser_name} wants {what} of width {wanted}, {givers} gives {given}: they are not of one model"
            )

    def check_tokenizers(self):
        pairs = [(t, e) for t, e in zip(self.tokenizers, self.encoders, strict=False) if isinstance(t, CLIPTokenizer)]
        for tokenizer, encoder in pairs:
            text, vocabulary = encoder.cfg, tokenizer.size
            if tokenizer.words and text.eos_token_id == 2:
                # "the largest id", which a learned word may be: see add_embedding
                text.eos_token_id = tokenizer.eos
            if tokenizer.length > text.max_position_embeddings or vocabulary > text.vocab_size:
                sizes = f"{tokenizer.length} tokens of {vocabulary}, text_encoder {text.max_position_embeddings} of {text.vocab_size}"
                raise UserError(f"tokenizer has {sizes}: they are not of one model")

    def encode(self, texts, clip_skip=0, long_prompts=False, weighted=False, length=256):
        """Prompts -> Text. A prompt is a text, or a tuple with one for each encoder (None: the first one's).

        Each different prompt is encoded once and kept, until the encoders change. What does not fit is said. length: tokens of T5.
        """
        texts = [texts] if isinstance(texts, str) else texts
        how = (clip_skip, long_prompts, weighted, length)
        for encoder in self.encoders:
            if encoder is not None:
                derived.noticed(encoder)
        kind = self.device.type
        auto = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        versions = (auto, *(derived.version(e) for e in self.encoders if e is not None))
        keys = [(*_per_encoder(t, len(self.encoder_names)), *how, versions) for t in texts]
        missing, fresh = {}, {}  # those of one length together: none is filled because of its neighbours
        for k in dict.fromkeys(keys):
            if k not in self.kept:
                missing.setdefault(self.chunks(k[: len(self.encoder_names)], long_prompts, weighted), []).append(k)
        for group in [ks[i : i + GROUP] for ks in missing.values() for i in range(0, len(ks), GROUP)]:
            encoded = self.encode_uniques([k[: len(self.encoder_names)] for k in group], *how)
            for i, k in enumerate(group):
                fresh[k] = Text(*(None if part is None else part[i : i + 1].cpu() for part in encoded))
        found = fresh | {k: self.kept[k] for k in keys if k in self.kept}
        if fresh:  # what the encoders said before they changed is not asked for again
            for k in [k for k in self.kept if k[-1] != versions]:
                del self.kept[k]
        self.kept |= fresh
        while len(self.kept) > 1 and sum(_bytes(t) for t in self.kept.values()) > CACHE_BYTES:
            self.kept.popitem(last=False)
        return self.joined(
            [Text(*(None if p is None else p.to(self.device, self.dtype) for p in found[k])) for k in keys], clip_skip
        )

    def chunks(self, texts, long_prompts, weighted):
        """How many chunks of 77 tokens a prompt takes (a text, or a tuple with one for each encoder)."""
        if not long_prompts:
            return 1
        clips = [t for t in self.tokenizers if isinstance(t, CLIPTokenizer)]
        if not clips:
            return 1
        texts = _per_encoder(texts, len(self.encoder_names))
        return max(len(prompt.chunks(t, text, True, weighted)) for t, text in zip(clips, texts, strict=False))

    def encode_uniques(self, texts, clip_skip, long_prompts, weighted, length):
        """Tuples of texts, one for each encoder -> Text."""
        states, _ = self.clip(0, [t[0] for t in texts], clip_skip, long_prompts, weighted)
        return Text(states)

    def clip(self, i, texts, clip_skip, long_prompts, weighted):
        """What CLIP encoder i makes of texts: (states [B, S, D], pooled [B, P])."""
        tokenizer = self.tokenizers[i]
        if isinstance(tokenizer, LabelTokenizer):
            states, pooled = self.encoders[i](torch.tensor(tokenizer(texts), device=self.device))
            return self.pick(i, clip_skip)(states), pooled
        if not long_prompts:
            for text in dict.fromkeys(texts):
                prompt.warn_cut(tokenizer, text, tokenizer.length - 2, f"{tokenizer.length - 2} tokens", weighted)
        with memory.at_work(self.encoders[i]):
            return prompt.encode_clip(
                tokenizer, self.encoders[i], texts, self.pick(i, clip_skip), long_prompts, weighted
            )

    def pick(self, i, clip_skip):
        """states -> the hidden state of encoder i that the denoiser was trained with."""
        encoder = self.encoders[i]

        def picked(states):
            if not 0 <= clip_skip < len(states):
                raise UserError(f"`clip_skip` {clip_skip}: the text encoder has {len(states) - 1} layers")
            return encoder.final_norm(states[-1 - clip_skip])

        return picked

    def encode_ids(self, ids, clip_skip=0):
        """Token ids [B, S] -> the text that the UNet attends to [B, S, D]: the last layer but `clip_skip`, normed."""
        return self.pick(0, clip_skip)(self.encoders[0](ids)[0])

    nothing_is_zeros = False  # what stands against a prompt where there is no negative one; otherwise the empty prompt

    def nothing(self, text, how):
        """What stands against `text` when there is no negative prompt."""
        if self.nothing_is_zeros:
            return Text(torch.zeros_like(text.states), torch.zeros_like(text.pooled))
        return self.encode([""] * len(text.states), **how)

    def joined(self, texts, clip_skip=0):
        """Several Texts as one batch. Shorter ones (long_prompts) are filled with chunks of the empty prompt, or of
        zeros where they are zeros; in SD 3 the order of the text's tokens means nothing, so they may come last."""
        longest = max(t.states.shape[1] for t in texts)
        pooled = None if texts[0].pooled is None else torch.cat([t.pooled for t in texts])
        return Text(torch.cat([self.filled(t, longest, clip_skip).states for t in texts]), pooled)

    def filled(self, text, length, clip_skip):
        """A Text with `length` tokens: see joined()."""
        missing = (length - text.states.shape[1]) // self.tokenizer.length
        if not missing:
            return text
        empty = self.encode([""], clip_skip).states[:, : self.tokenizer.length]
        empty = empty.repeat(len(text.states), missing, 1) * (1 if text.states.any() else 0)
        return text._replace(states=torch.cat([text.states, empty], dim=1))

    def conditions(self, prompts, negative_prompt=None, words=NO_WORDS, guided=True):
        """(text, negative) of a batch; negative is None without guidance.

        prompts: n texts. negative_prompt: one text for all, or n. words: settings.Words.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        for encoder in self.encoders:
            self.ready(encoder, self.packs)
        n, how = len(prompts), {"long_prompts": words.long_prompts, "weighted": words.weighted}
        how["length"] = words.max_sequence_length or 256
        text = self.encode(_rows(n, list(prompts), words.prompt_2, words.prompt_3), words.clip_skip, **how)
        if not guided:
            return text, None
        how["clip_skip"] = skip = negative_skip(words)
        alone = next((k for k in ("negative_prompt_2", "negative_prompt_3") if any(getattr(words, k) or ())), None)
        if negative_prompt is None and alone and self.nothing_is_zeros:
            raise UserError(f"`{alone}` does nothing without `negative_prompt`")
        negative_prompt = "" if negative_prompt is None and alone else negative_prompt
        if negative_prompt is None:
            negative = self.nothing(text, how)
        else:
            negative = self.encode(_rows(n, negative_prompt, words.negative_prompt_2, words.negative_prompt_3), **how)
        longest = max(text.states.shape[1], negative.states.shape[1])  # fill each with its own clip_skip
        return self.filled(text, longest, words.clip_skip), self.filled(negative, longest, skip)

    @torch.no_grad()
    def prepare(self, prompts, negative_prompt=None, *args, **options):
        """Encode what generate() will need and keep it, so that the text encoders work once. Arguments of conditions()."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        for i in range(0, len(prompts), GROUP):
            some = negative_prompt if isinstance(negative_prompt, str | None) else negative_prompt[i : i + GROUP]
            self.conditions(prompts[i : i + GROUP], some, *args, **options)

    def learn(self, path, allow_pickle=False):
        """Teach the text encoders the word of a textual-inversion file; returns the word. Raises UserError."""
        return self.learn_word(*prompt.load_embedding(path, allow_pickle), path)

    def learn_word(self, name, vectors, path):
        """Teach the text encoders a word: {"clip_l", "clip_g" or "" (of the only one): vectors [n, D]}; path: where it is from, for errors."""
        clips = {"clip_l": 0, "clip_g": 1, "": 0}
        if strange := [
            k for k in vectors if not isinstance(dict(enumerate(self.encoders)).get(clips[k]), CLIPTextModel)
        ]:
            raise UserError(
                f"{path}: has {strange[0]} vectors, this model has one text encoder; it is for SDXL or SD 3"
            )
        if len([e for e in self.encoders if isinstance(e, CLIPTextModel)]) > len(vectors):
            raise UserError(f"{path}: has vectors for one text encoder, this model has two; it is for SD 1 or 2")
        pupils = [(self.tokenizers[clips[key]], self.encoders[clips[key]], value) for key, value in vectors.items()]
        for pupil in pupils:  # all of them before any: a word that one of two encoders knows would be half a word
            prompt.check_embedding(*pupil[:2], name, pupil[2])
        for tokenizer, encoder, value in pupils:
            prompt.add_embedding(tokenizer, encoder, name, value)
        self.kept.clear()
        return name
