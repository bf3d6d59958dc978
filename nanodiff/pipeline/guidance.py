"""The denoiser as a sampler asks it: with its condition, and with classifier-free guidance.

Explained in the book (docs/book): chapter 4.
"""

import torch

from nanodiff.config import UserError
from nanodiff.device import cudagraph, derived, memory, onednn
from nanodiff.models.layers import computed_by, join
from nanodiff.models.unet import UNet2DConditionModel, perturbed
from nanodiff.pipeline.conditions import Extra
from nanodiff.pipeline.control import Controls
from nanodiff.pipeline.pictures import with_pictures
from nanodiff.pipeline.settings import Perturbed, SkipLayers

MOST_SHIFTS = 256 << 20  # bytes up to which what the steps of a run take from the condition is made beforehand
NOTHING = Extra()
LAUNCH_BOUND = 4  # rows of a batch (two guided pictures) up to which a GPU may wait for the host


class Guidance:
    """What a pipeline does at every step. Needs: net, schedule, device, dtype, joined()."""

    replays = False  # record denoising steps as CUDA graphs (cudagraph.Replayed)? "auto": where launches bound them
    packs = False  # may weights be packed for a CPU (onednn.prepare), which empties the plain ones?

    @property
    def device(self):
        return memory.device_of(self.net)

    @property
    def dtype(self):
        """The type in which the denoiser computes."""
        return memory.dtype_of(self.net)

    @property
    def is_told(self):
        """Was the denoiser distilled from guidance, and is told its scale in place of being asked twice?"""
        return bool(getattr(self.net.cfg, "time_cond_proj_dim", None))

    def denoiser(
        self, text, negative, scale, rescale=0.0, extra=NOTHING, weaker=None, times=(), controls=None, beside=None
    ):
        """model(x, t) with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598 eq. 6).

        text, negative: Text; negative None = no guidance, one pass. One batch of 2B, unconditional first. Of several texts, [(Text, its
        weights [B])], each is guided to by its weight (Liu et al. 2022, arXiv 2206.01714, conjunction). rescale: std
        correction (Lin et al. 2024 §3.4). extra: conditions.Extra. weaker: a SkipLayers, a Perturbed or None, on a run over the timesteps `times`. controls: (ControlNets at
        work, model calls of the run, a count of them). beside: what an inpainting model is given with x (start.Beginning).
        """
        if self.device.type == "cuda" and memory.whole(self.net):
            join(self.net)
        parts = text if isinstance(text, list) else [(text, None)]
        groups = 1 if negative is None else 1 + len(parts)
        if weaker and len(parts) > 1:
            raise UserError("AND in a prompt is not for `skip_layers` or `perturbed`")
        both = text if negative is None else self.joined([negative, *(part for part, _ in parts)])
        condition = self.condition(both, extra, groups)
        # the prompt's pass alone, with the prompt's sizes
        alone = self.condition(parts[0][0], extra, 1) if isinstance(weaker, Perturbed) else None
        steered = Controls(self, *controls, both, extra, groups) if controls else None
        # what a ControlNet adds comes from other tensors at every step, which a recording would not see
        net = self.net if steered else self.replayed(len(both.states)) or self.net
        known = self.shifts(times, *condition[1:])
        known_alone = self.shifts(times, *alone[1:]) if alone else {}
        shown = None if beside is None else beside.to(self.dtype)

        def predict(x, t, more, condition=condition, net=net, known=known):
            if shown is not None:
                x = torch.cat([x, shown.repeat(len(x) // len(shown), 1, 1, 1)], dim=1)
            return net(x, known.get(float(t), t), *condition, **more).float()

        def led(out, with_text, x, t, more):
            """`out`, away from what a weaker model says."""
            if not weaker or not weaker.active(sum(u > t for u in times), len(times)):
                return out
            own = {k: v and v.map(lambda r: r[-len(x) :]) for k, v in more.items()}
            if isinstance(weaker, SkipLayers):
                blind = self.net(x, t, parts[0][0].states, parts[0][0].pooled, weaker.layers, **own).float()
            else:
                with perturbed(self.net, weaker.layers):
                    blind = predict(x, t, own, alone, self.net, known_alone)
            return out + weaker.scale * (with_text - blind)

        def model(x, t):
            x = x.to(self.dtype)
            more = {"control": steered.at(x, t)} if steered else {}
            if negative is None:
                out = predict(x, t, more)
                return led(out, out, x, t, more)
            without, with_text, *others = predict(torch.cat([x] * groups), t, more).chunk(groups)
            if parts[0][1] is not None:
                each = zip((with_text, *others), (w for _, w in parts), strict=True)
                with_text = without + sum(w.to(x.device).view(-1, 1, 1, 1) * (p - without) for p, w in each)
            out = led(without + scale * (with_text - without), with_text, x, t, more)
            if rescale:
                dims = list(range(1, out.dim()))
                matched = out * (with_text.std(dims, keepdim=True) / out.std(dims, keepdim=True))
                out = rescale * matched + (1 - rescale) * out
            return out

        return model

    def condition(self, text, extra, groups, net=None):
        """What the denoiser (or the ControlNet `net`) takes after x and t for `text`; its keys and values are computed here, once a run.
        groups: 1, or with guidance how many texts a picture has, the unconditional one among them."""
        kvs = (net or self.net).text_kv(text.states) if memory.whole(net or self.net) else text.states
        if net is None and extra.pictures:
            kvs = with_pictures(kvs, self.net, extra.pictures, len(text.states), groups)
        return (kvs,)

    def denoise(self, net, x, t, states, pooled, told=None):
        """One call of the denoiser, or of what training put in its place, without guidance. told: what SDXL is told of pictures [B, 6], see its size_ids()."""
        self.check_trainable()
        return net(x, t, states)

    def check_trainable(self):
        """Raise UserError for an inpainting model, since what trains here has no masks, and for one that is told its guidance."""
        if self.inpaints:
            raise UserError(
                "an inpainting model is only drawn with here, not trained or distilled; take an ordinary one"
            )
        if self.is_told:
            raise UserError(
                "a model that is told its guidance (time_cond_proj_dim) is only drawn with here, not trained or distilled"
            )

    def shifts(self, times, added=None):
        """{time: what the denoiser takes in its place} for a run over `times`: an MMDiT's weights that make it are a third of all; a UNet's are few, and
        worth it on a GPU alone, where every product has to be started. Nothing where they cannot be made beforehand, or would be large: many pictures
        share a reading of the weights anyway."""
        if not memory.whole(self.net) or not hasattr(self.net, "shifts"):
            return {}
        if self.device.type != "cuda" and isinstance(self.net, UNet2DConditionModel):
            return {}
        times = sorted({float(t) for t in times})
        # SDXL's `added` is a tuple of vectors, an MMDiT's the pooled text
        rows = 1 if added is None else len(added[0] if isinstance(added, tuple) else added)
        if not 0 < len(times) * rows * sum(self.net.shift_widths()) * self.dtype.itemsize <= MOST_SHIFTS:
            return {}
        made = self.net.shifts(torch.tensor(times).to(self.device), added)
        return dict(zip(times, made.split(len(made) // len(times)), strict=True))

    def replayed(self, rows):
        """The denoiser for batches of `rows`, recorded and replayed as a CUDA graph, or None: see `replays`."""
        if not self.replays or (self.replays == "auto" and (self.device.type != "cuda" or rows > LAUNCH_BOUND)):
            return None
        if hasattr(self.net, "resident"):  # weights that come and go have no place that could be recorded
            return None
        places = tuple(t.data_ptr() for t in (*self.net.parameters(), *self.net.buffers()))
        state = (
            places,
            derived.version(self.net),
            computed_by(),
            *(getattr(self.net, n, None) for n in ("freeu", "guidance")),
        )
        if state not in self.recorded:  # what was recorded before reads other weights
            self.recorded.clear()
            self.recorded[state] = cudagraph.Replayed(self.net)
        return self.recorded[state]

    def ready(self, module, pack):
        """Prepare a module for a CPU, if that is where it stays and it is not compiled."""
        stays = (
            module is not None
            and self.device.type == "cpu"
            and memory.whole(module)
            and not hasattr(module, "resident")
        )
        if stays and module._compiled_call_impl is None:
            onednn.prepare(module, pack)
