"""Text from a causal language model: greedy, by chance, or by beams; in batches, each row as if it were alone.

    rows = generate(net, [[1, 403, 407], [1, 12]], 40, eos=net.cfg.eos_token_id)                    # the likeliest token each time
    rows = generate(net, prompts, 40, Chance(temperature=0.8, top_p=0.95), seeds=[7, 8])
    rows = generate(net, prompts, 40, beams=4)

A row is drawn from a generator of its own, on the CPU, so it does not depend on the batch but for rounding. Prompts of different lengths
are padded on the left; a row that has ended waits for the others. What changes the distribution is applied in the order of the
reference library: repetition penalty, temperature, top-k, top-p, min-p.

Explained in the book (docs/book): chapter 15.
"""

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanodiff.config import UserError
from nanodiff.models.llm import Cache

COLDEST = 1e-4  # of temperatures above 0: logits divided by it are still numbers


@dataclass
class Chance:
    """How the next token is drawn. temperature 0: the likeliest one. Raises UserError for values that make no sense."""

    temperature: float = 1.0
    top_k: int = 0  # only the so many likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together have this share (Holtzman et al. 2020, arXiv 1904.09751)
    min_p: float = 0.0  # only those with at least this share of the likeliest's (Nguyen et al. 2024, arXiv 2407.01082)
    # logits of tokens that were there divide by it, negative ones multiply (arXiv 1909.05858 §4.1)
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, low, high in (
            ("temperature", 0, 100),
            ("top_k", 0, 1 << 24),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 1e-3, 1e3),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"`{name}` {value:g} must be between {low:g} and {high:g}")
        if 0 < self.temperature < COLDEST:
            raise UserError(
                f"`temperature` {self.temperature:g} must be 0 (the likeliest token) or at least {COLDEST:g}"
            )


GREEDY = Chance(temperature=0.0)


def adjusted(logits, chance, before=None):
    """Logits [B, V] as `chance` asks, -inf for what cannot come. before: ids that each row has had, [[…], …]."""
    logits = logits.float()
    if chance.repetition_penalty != 1.0 and before is not None:
        logits = logits.clone()
        for row, ids in zip(logits, before, strict=True):
            some = torch.tensor(sorted(set(ids)), dtype=torch.long, device=row.device)
            row[some] = torch.where(
                row[some] > 0, row[some] / chance.repetition_penalty, row[some] * chance.repetition_penalty
            )
    if chance.temperature == 0:
        return logits
    logits = logits / chance.temperature
    if 0 < chance.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(chance.top_k).values[..., -1:], -torch.inf)
    if chance.top_p < 1:
        ranked, order = logits.sort(descending=False)
        gone = ranked.softmax(-1).cumsum(-1) <= 1 - chance.top_p
        gone[..., -1] = False  # one always stays
        logits = logits.masked_fill(gone.scatter(-1, order, gone), -torch.inf)
    if chance.min_p > 0:
        shares = logits.softmax(-1)
        logits = logits.masked_fill(shares < chance.min_p * shares.max(-1, keepdim=True).values, -torch.inf)
    return logits


def padded(rows, pad):
    """(ids [B, L], mask [B, L] or None when nothing is padded) of lists of ids, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[False] * (longest - len(r)) + [True] * len(r) for r in rows])
    return ids, None if mask.all() else mask


class Written(NamedTuple):
    """What generate() gives for each prompt."""

    ids: list  # of the new tokens, without the end token
    ended: bool  # by an end token or `until`, not by the limit
    score: float  # sum of the tokens' log-probabilities, the end's included


@torch.inference_mode()
def generate(
    net,
    prompts,
    new_tokens,
    chance=GREEDY,
    eos=(),
    seeds=None,
    beams=1,
    length_penalty=1.0,
    on_step=None,
    embeds=None,
    until=None,
):
    """[Written] for prompts, lists of ids. eos: ids that end a text. seeds: one a prompt, for `chance`. on_step(i, seconds) is called
    after each token of the batch. beams: see beam(). embeds [B, L, D]: what is read in place of the prompts' embeddings (a picture's
    tokens among them); the prompts, of L ids each, then count for lengths and repetitions alone. until(ids): has a row said enough? (Not with beams.)
    Raises UserError for an empty prompt, ids beyond the vocabulary, and a text that is longer than the model's positions."""
    check(net, prompts, new_tokens)
    if beams > 1:
        if chance.temperature:
            raise UserError("`beams` takes the likeliest texts; give `temperature` 0")
        given = [None] * len(prompts) if embeds is None else embeds[:, None]
        return [
            beam(net, p, new_tokens, beams, tuple(eos), length_penalty, e, chance)
            for p, e in zip(prompts, given, strict=True)
        ]
    device, eos = net.output.device, set(eos)
    generators = [torch.Generator().manual_seed(int(s)) for s in (seeds if seeds is not None else range(len(prompts)))]
    ids, mask = padded(prompts, net.cfg.pad_token_id or 0)
    cache = Cache(net.cfg, ids.shape[1] + new_tokens)
    x, mask = ids.to(device), mask if mask is None else mask.to(device)
    out, scores, done = [[] for _ in prompts], [0.0] * len(prompts), [False] * len(prompts)
    for i in range(new_tokens):
        start = time.perf_counter()
        states = net(x, mask, cache) if i or embeds is None else net(None, mask, cache, embeds)
        logits = net.logits(states[:, -1]).float().cpu()
        before = [list(p) + o for p, o in zip(prompts, out, strict=True)]
        asked = adjusted(logits, chance, before)
        shares = asked.log_softmax(-1)
        if chance.temperature == 0:
            chosen = asked.argmax(-1).tolist()
        else:
            chosen = [
                torch.multinomial(row.exp(), 1, generator=g).item() for row, g in zip(shares, generators, strict=True)
            ]
        for row, token in enumerate(chosen):
            if done[row]:
                continue
            scores[row] += shares[row, token].item()
            if token in eos:
                done[row] = True
            else:
                out[row].append(token)
                done[row] = bool(until and until(out[row]))
        if on_step:
            on_step(i, time.perf_counter() - start)
        if all(done):
            break
        x, mask = torch.tensor(chosen, device=device)[:, None], None
    return [Written(*row) for row in zip(out, done, scores, strict=True)]


def check(net, prompts, new_tokens):
    """Raise UserError for what generate() cannot read."""
    if not prompts or not all(len(p) for p in prompts):
        raise UserError("a prompt is empty: a language model needs at least one token, such as the beginning of text")
    size, longest = net.cfg.vocab_size, max(map(len, prompts))
    if strange := [t for p in prompts for t in p if not 0 <= t < size]:
        raise UserError(
            f"token {strange[0]} is beyond the model's vocabulary of {size}: the tokenizer is another model's"
        )
    if longest + new_tokens > net.cfg.max_position_embeddings:
        raise UserError(
            f"{longest} tokens and {new_tokens} new ones are more than the {net.cfg.max_position_embeddings} that the model reads"
        )


@torch.inference_mode()
def beam(net, prompt, new_tokens, beams, eos=(), length_penalty=1.0, embeds=None, chance=GREEDY):
    """The likeliest text that a search over `beams` texts at a time finds: Written of the largest sum of log-probabilities divided by
    (new tokens, the end included) ** length_penalty (Wu et al. 2016, arXiv 1609.08144 eq. 14, as the reference library has it). Of `chance`
    the repetition penalty counts, on the log-probabilities. Each step looks at max(2, 1 + end tokens) · beams continuations, so that
    `beams` of them go on whatever ends."""
    device = net.output.device
    cache = Cache(net.cfg, len(prompt) + new_tokens)
    start = torch.tensor([list(prompt)], device=device)
    states = (net(start, None, cache) if embeds is None else net(None, None, cache, embeds))[:, -1]
    cache.select([0] * beams)
    alive, ended = [([], 0.0)], []

    def weighed(states):
        shares = net.logits(states).float().cpu().log_softmax(-1)
        return adjusted(shares[: len(alive)], chance, [[*prompt, *ids] for ids, _ in alive])

    shares = weighed(states)
    worth = lambda score, n: score / n**length_penalty  # noqa: E731
    for i in range(new_tokens):
        sums = torch.tensor([s for _, s in alive])[:, None] + shares
        best = sums.flatten().topk(min(max(2, 1 + len(eos)) * beams, sums.numel()))
        nexts = []
        for rank, (value, at) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            row, token = divmod(at, sums.shape[1])
            if token in eos:
                if rank < beams:  # one that is not among the best beams does not count
                    ended.append(Written(alive[row][0], True, value))
            else:
                nexts.append((row, token, value))
            if len(nexts) == beams:
                break
        rows = [row for row, _, _ in nexts]
        alive = [([*alive[row][0], token], value) for row, token, value in nexts]
        ended = sorted(ended, key=lambda w: -worth(w.score, len(w.ids) + 1))[:beams]
        if not alive or (
            len(ended) == beams and worth(ended[-1].score, len(ended[-1].ids) + 1) >= worth(alive[0][1], i + 1)
        ):
            break
        if i + 1 < new_tokens:
            cache.select([*rows, *[0] * (beams - len(rows))])
            x = torch.tensor([[ids[-1]] for ids, _ in alive] + [[0]] * (beams - len(alive)), device=device)
            shares = weighed(net(x, None, cache)[:, -1])
    every = ended + [Written(ids, False, score) for ids, score in alive]
    return max(every, key=lambda w: worth(w.score, len(w.ids) + w.ended))


GEMMA_TURN = "<start_of_turn>{role}\n{text}<end_of_turn>\n"


def chat(messages, reply=True):
    """Gemma 3's chat form of [{"role": "user" | "assistant" | "system", "content": text}], which begins with <bos> already. A system message
    stands before the first user's text. reply: ask for the model's answer. Raises UserError unless user and assistant take turns."""
    first, rest = "", list(messages)
    if rest and rest[0]["role"] == "system":
        first, rest = rest[0]["content"].strip() + "\n\n", rest[1:]
    out = "<bos>"
    for i, message in enumerate(rest):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise UserError(f"chat: message {i + 1} is the {message['role']}'s, but user and assistant take turns")
        role = {"user": "user", "assistant": "model"}[message["role"]]
        out += GEMMA_TURN.format(role=role, text=(first if i == 0 else "") + message["content"].strip())
    return out + ("<start_of_turn>model\n" if reply else "")
