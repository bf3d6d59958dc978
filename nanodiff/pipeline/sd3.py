"""Stable Diffusion 3 and 3.5, and our own small MMDiT: flow matching by a multimodal transformer.

Explained in the book (docs/book): chapter 11.
"""

import torch
import torch.nn.functional as F

from nanodiff.config import UserError
from nanodiff.device import memory
from nanodiff.pipeline import families
from nanodiff.pipeline.base import Pipeline
from nanodiff.pipeline.conditions import Text, _penultimate, _same_length
from nanodiff.text import prompt


class Joint(Pipeline):
    """An MMDiT of ours with one text encoder, as train.py makes it: the parts are those of SD 3, the text is one CLIP's
    (or a label), its last layer normed, with its pooled projection."""

    family = families.MMDIT
    multiple = property(lambda self: self.downscale * self.net.cfg.patch_size)

    def check_fit(self):
        self.check_latents()
        text = self.encoders[0].cfg
        if not text.with_projection:
            raise UserError("text_encoder: has no text_projection, which an MMDiT needs")
        self.check_text(self.net.cfg.joint_attention_dim, text.hidden_size)
        self.check_text(self.net.cfg.pooled_projection_dim, text.projection_dim, "pooled text")
        self.check_tokenizers()

    def encode_uniques(self, texts, clip_skip, long_prompts, weighted, length):
        return Text(*self.clip(0, [t[0] for t in texts], clip_skip, long_prompts, weighted))

    def condition(self, text, extra, groups, net=None):
        return text.states, text.pooled

    def denoise(self, net, x, t, states, pooled, told=None):
        return net(x, t, states, pooled)


class SD3(Pipeline):
    """Stable Diffusion 3 and 3.5: flow matching by an MMDiT; two CLIPs and T5, which may be missing (its part of the
    text is then zeros; Esser et al. 2024, arXiv 2403.03206 §4, §5.3)."""

    family = families.SD3

    def check_fit(self):
        self.check_latents()
        if not self.schedule.flow:
            raise UserError(f"scheduler {self.schedule.kind}: an SD 3 model is a flow and uses flow-match Euler")
        net, clips, t5 = self.net.cfg, [e.cfg for e in self.encoders[:2]], self.encoders[2]
        if not all(c.with_projection for c in clips):
            raise UserError("text_encoder: has no text_projection, so it is not SD 3's")
        self.check_text(net.pooled_projection_dim, sum(c.projection_dim for c in clips), "pooled text", "the CLIPs")
        if t5 is not None:
            self.check_text(net.joint_attention_dim, t5.cfg.d_model, givers="text_encoder_3")
            if len(self.tokenizers) < 3:
                raise UserError("text_encoder_3 is there, tokenizer_3 is missing; leave it out with `no_t5`")
            if (words := self.tokenizers[2].backend.get_vocab_size()) > t5.cfg.vocab_size:
                raise UserError(
                    f"tokenizer_3 has {words} tokens, text_encoder_3 {t5.cfg.vocab_size}: they are not of one model"
                )
        if sum(c.hidden_size for c in clips) > net.joint_attention_dim:
            raise UserError("the CLIPs' text is wider than the transformer's: they are not of one model")
        self.check_tokenizers()

    @property
    def multiple(self):
        return self.downscale * self.net.cfg.patch_size

    def pick(self, i, clip_skip):
        return _penultimate(clip_skip)

    def encode_uniques(self, texts, clip_skip, long_prompts, weighted, length):
        pairs = [self.clip(i, [t[i] for t in texts], clip_skip, long_prompts, weighted) for i in range(2)]
        states, pooled = (
            torch.cat(_same_length(self, pairs, clip_skip), dim=-1),
            torch.cat([p for _, p in pairs], dim=-1),
        )
        wide = self.net.cfg.joint_attention_dim
        states = F.pad(states, (0, wide - states.shape[-1]))
        encoder = self.encoders[2]
        if encoder is None:
            return Text(torch.cat([states, states.new_zeros(len(texts), length, wide)], dim=1), pooled)
        for text in dict.fromkeys(t[2] for t in texts):
            prompt.warn_cut(
                self.tokenizers[2], text, length - 1, f"T5's {length} tokens (--max-sequence-length)", weighted
            )
        with memory.at_work(encoder):
            words = prompt.encode_t5(self.tokenizers[2], encoder, [t[2] for t in texts], length, weighted)
        return Text(torch.cat([states, words.to(states.dtype)], dim=1), pooled)

    def condition(self, text, extra, groups, net=None):
        return text.states, text.pooled

    def denoise(self, net, x, t, states, pooled, told=None):
        return net(x, t, states, pooled)

    def first_step(self, steps, strength):
        return int(max(steps - min(steps * strength, steps), 0))  # without SD 1's inner int(), as in diffusers
