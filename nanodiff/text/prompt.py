"""From a prompt to what a text encoder gives: long prompts in chunks, (weights:1.2), learned words.

All three are off unless asked for, because with them a picture is no longer the one that diffusers makes from the same
prompt. The weight syntax and the chunk rule are those of AUTOMATIC1111's web UI (its modules prompt_parser and
sd_hijack_clip), which most prompts that people exchange were written for; `weighted` "comfyui" is ComfyUI's (its sd1_clip).
What else a prompt may hold there: syntax.py.

Explained in the book (docs/book): chapter 9.
"""

import contextlib
import re
import sys
from pathlib import Path

import torch

from nanodiff.config import UserError, printable
from nanodiff.text.syntax import check_depth
from nanodiff.weights import as_weights, is_pickle, load_pickle, load_weights

BACKTRACK = 20  # a chunk ends at its last comma when that is one of so many last tokens, unless the next one is a comma (the web UI's rule)
SHORT_PART = 8  # tokens of a part of one weight from which ComfyUI divides it between chunks
ROUND, SQUARE = 1.1, 1 / 1.1
TOKENS = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|\bBREAK\b|[^\\()\[\]:B]+|.", re.DOTALL)


def weighted_parts(prompt):
    """[(text, weight)] of a prompt: (x) is 1.1, [x] 1/1.1, (x:1.3) 1.3, nested ones multiply; \\( is a bracket.

    The word BREAK gives ("BREAK", None): a new chunk begins. An unclosed bracket counts to the end of the prompt.
    """
    parts, open_round, open_square = [], [], []

    def multiply(start, factor):
        for part in parts[start:]:
            if part[1] is not None:
                part[1] *= factor

    for token in TOKENS.findall(prompt):
        if token.startswith("\\"):  # alone it is nothing
            parts.append([token[1:], 1.0])
        elif token == "(":
            open_round.append(len(parts))
        elif token == "[":
            open_square.append(len(parts))
        elif token.startswith(":") and len(token) > 1 and open_round:
            multiply(open_round.pop(), float(token[1:-1]))
        elif token == ")" and open_round:
            multiply(open_round.pop(), ROUND)
        elif token == "]" and open_square:
            multiply(open_square.pop(), SQUARE)
        elif token == "BREAK":
            parts.append(["BREAK", None])
        else:
            parts.append([token, 1.0])
    for starts, factor in ((open_round, ROUND), (open_square, SQUARE)):
        for start in starts:
            multiply(start, factor)
    joined = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight and weight is not None:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined


def comfyui_parts(prompt, weight=1.0):
    """[(text, weight)] by ComfyUI's rule: (x) is 1.1 times what is around it, (x:1.3) is 1.3 whatever is around it, \\( is a bracket, and
    [x] means nothing."""
    hidden = prompt.replace("\\(", "\0\1").replace("\\)", "\0\2")
    parts = []
    for item in _bracketed(hidden):
        if not (item.startswith("(") and item.endswith(")") and len(item) > 1):
            parts.append((item.replace("\0\1", "(").replace("\0\2", ")"), weight))
            continue
        inner, own = item[1:-1], weight * ROUND
        text, colon, number = inner.rpartition(":")
        if text and colon and re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)\s*", number):
            inner, own = text, float(number)
        parts += comfyui_parts(inner, own)
    return parts


def _bracketed(text):
    """The parts of a text that are in round brackets, with them, and those between, in order. Counted as ComfyUI counts: behind a bracket that closes nothing
    (a smiley) the next one opens none."""
    found, part, depth = [], "", 0
    for c in text:
        if c == "(" and depth == 0:
            found, part = [*found, part], ""
        depth += (c == "(") - (c == ")")
        part += c
        if c == ")" and depth == 0:
            found, part = [*found, part], ""
    return [p for p in (*found, part) if p]


def parts_of(text, weighted):
    """[(text, weight)] of a prompt. weighted: False (all of it, at 1), True (the web UI's rule) or "comfyui"."""
    if weighted == "comfyui":
        check_depth(text)
        return comfyui_parts(text)
    return weighted_parts(text) if weighted else [(text, 1.0)]


def chunks(tokenizer, prompt, long=False, weighted=False):
    """[(ids, weights)] of a prompt, each `tokenizer.length` long with start, end and padding; weights are 1 there.

    Not long: one chunk, the rest cut off. Long: as many as it takes.
    """
    room, comma = tokenizer.length - 2, tokenizer.pieces(",")[-1]
    rows, row, at_comma = [], [], 0
    for text, weight in parts_of(prompt, weighted):
        if weight is None:  # BREAK
            rows, row, at_comma = [*rows, row], [], 0
            continue
        # ComfyUI keeps short parts whole, and knows no rule of commas
        pieces, comfyui = tokenizer.pieces(text), weighted == "comfyui"
        whole = comfyui and len(pieces) < SHORT_PART
        for i, piece in enumerate(pieces):
            if len(row) == room or (whole and i == 0 and len(row) + len(pieces) > room):
                near = at_comma and room - at_comma < BACKTRACK and piece != comma and not comfyui
                keep = at_comma if near else len(row)
                rows, row, at_comma = [*rows, row[:keep]], row[keep:], 0
            row.append((piece, weight))
            at_comma = len(row) if piece == comma else at_comma
    rows = [*rows, row] if row or not rows else rows
    if not long:
        rows = [[piece for row in rows for piece in row][:room]]
    filled = []
    for row in rows:
        ids, weights = [i for i, _ in row], [w for _, w in row]
        rest = room - len(row)
        filled.append(
            ([tokenizer.bos, *ids, tokenizer.eos] + [tokenizer.pad] * rest, [1.0, *weights, 1.0] + [1.0] * rest)
        )
    return filled


def weigh(states, weights, empty=None):
    """Scale each token's vector by its weight and bring the mean back to what it was: states [S, D], weights [S]. With the states of the
    `empty` prompt [S, D], ComfyUI's rule: each token's way from there times its weight."""
    weights = torch.tensor(weights, device=states.device)
    if bool((weights == 1).all()):
        return states
    if empty is not None:
        return torch.where(weights[:, None] == 1, states, empty + (states - empty) * weights[:, None].to(states.dtype))
    scaled = states.float() * weights[:, None]
    return (scaled * (states.float().mean() / scaled.mean())).to(states.dtype)


def encode_clip(tokenizer, model, texts, pick, long=False, weighted=False):
    """texts -> ([B, S·n, D], pooled [B, P]): n chunks each, as many as the longest text has.

    pick(states): what of the encoder's list of hidden states is wanted. The pooled vector is the first chunk's.
    """
    rows = [chunks(tokenizer, text, long, weighted) for text in texts]
    n = max(map(len, rows))
    empty = chunks(tokenizer, "")
    rows = [row + empty * (n - len(row)) for row in rows]
    device = model.text_model.embeddings.token_embedding.weight.device
    states, pooled = model(torch.tensor([ids for row in rows for ids, _ in row], device=device))
    states = pick(states)
    if weighted:
        weights = [w for row in rows for _, w in row]
        blank = None
        if weighted == "comfyui":
            blank = pick(model(torch.tensor([ids for ids, _ in empty], device=device))[0])[0]
        states = torch.stack([weigh(s, w, blank) for s, w in zip(states, weights, strict=True)])
    return states.reshape(len(texts), -1, states.shape[-1]), pooled[::n]


def encode_t5(tokenizer, model, texts, length, weighted=False):
    """texts -> [B, length, D]."""
    rows = []
    for text in texts:
        parts = [p for p in parts_of(text, weighted) if p[1] is not None]
        pieces = [(i, w) for part, w in parts for i in tokenizer.pieces(part)][: length - 1]
        rest = length - len(pieces) - 1
        ids = [i for i, _ in pieces] + [tokenizer.eos] + [tokenizer.pad] * rest
        rows.append((ids, [w for _, w in pieces] + [1.0] * (rest + 1)))
    device, blank = model.shared.weight.device, None
    states = model(torch.tensor([ids for ids, _ in rows], device=device))
    if weighted == "comfyui":
        blank = model(torch.tensor([[tokenizer.eos] + [tokenizer.pad] * (length - 1)], device=device))[0]
    if weighted:
        states = torch.stack([weigh(s, w, blank) for s, (_, w) in zip(states, rows, strict=True)])
    return states


_counted = []  # of counting_cuts(): the texts that were cut within it


@contextlib.contextmanager
def counting_cuts():
    """Inside, a list of (text, what it is over) of those that are cut, in place of a line for each."""
    _counted.append([])
    try:
        yield _counted[-1]
    finally:
        _counted.pop()


def warn_cut(tokenizer, text, room, what, weighted=False):
    """One line when a text has more than `room` tokens (brackets and weights are none)."""
    parts = [p for p, w in parts_of(text, weighted) if w is not None]
    pieces = [i for part in parts for i in tokenizer.pieces(part)]
    if not (cut := tokenizer.decode(pieces[room:])):
        return
    if _counted:
        _counted[-1].append((text, what))
    else:
        print(f"warning: the prompt is over {what}; cut off: {printable(cut)!r}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------
# Learned words (Gal et al. 2022, "textual inversion", arXiv 2208.01618)


def load_embedding(path, allow_pickle=False):
    """(name, {"clip_l" or "clip_g" or "": vectors [n, D]}) of a textual-inversion file.

    Forms: {word: vector} (diffusers), `emb_params` (AUTOMATIC1111 safetensors), `clip_l` + `clip_g` (SDXL), and as a
    pickle `string_to_param: {"*": vectors}`. Raises UserError.
    """
    path = Path(path)
    if is_pickle(path):
        if not allow_pickle:
            raise UserError(f"{path}: reading a pickle can run code; if you trust it, add `allow_pickle`")
        state = as_weights(load_pickle(path, inside="string_to_param"), path)
    else:
        state = load_weights(path)
    state = {k: v[None] if v.dim() == 1 else v for k, v in state.items()}
    if any(v.dim() != 2 or not v.is_floating_point() or not torch.isfinite(v).all() for v in state.values()):
        raise UserError(f"{path}: not a learned word (expected finite vectors [n, width])")
    if set(state) <= {"clip_l", "clip_g"} and state:
        return path.stem, state
    if len(state) != 1:
        raise UserError(
            f"{path}: not a learned word: it has {len(state)} tensors ({', '.join(map(printable, [*state][:3]))})"
        )
    ((name, vectors),) = state.items()
    return path.stem if name in ("emb_params", "*") else name, {"": vectors}


def check_embedding(tokenizer, model, name, vectors):
    """Raise UserError for a word that add_embedding() cannot teach."""
    table = model.text_model.embeddings.token_embedding
    if not name.strip() or not len(vectors):
        raise UserError(f"learned word {printable(name)!r}: {'has no name' if not name.strip() else 'has no vectors'}")
    if vectors.shape[1] != table.weight.shape[1]:
        raise UserError(
            f"learned word {printable(name)}: vectors of width {vectors.shape[1]}, the text encoder has {table.weight.shape[1]}"
        )
    tokenizer.check_word(name, len(vectors))


def add_embedding(tokenizer, model, name, vectors):
    """Teach a tokenizer and its CLIP text encoder the word `name` of n vectors [n, D]. Raises UserError, and then nothing has changed."""
    check_embedding(tokenizer, model, name, vectors)
    table = model.text_model.embeddings.token_embedding
    first = table.weight.shape[0]
    tokenizer.add_word(name, range(first, first + len(vectors)))
    # in the same parameter, which may be one that memory.Resident moves
    table.weight.data = torch.cat([table.weight.data, vectors.to(table.weight)])
    table.num_embeddings = len(table.weight)
    if model.cfg.eos_token_id == 2:  # "the largest id", which is no longer the end token
        model.cfg.eos_token_id = tokenizer.eos
    model.cfg.vocab_size = len(table.weight)
