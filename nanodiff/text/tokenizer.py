"""Tokenizers: CLIP's byte pairs, T5's pieces, a language model's.

CLIP's comes from `tokenizer.json` or from `vocab.json` + `merges.txt` (old folders have only these). Rules (Radford et al. 2021; openai/CLIP simple_tokenizer.py): NFC, runs of whitespace to one space, lower case,
split into words by a fixed pattern, bytes of each word, then merges in rank order; the last piece of a word
carries `</w>`. A text is [start, pieces…, end], cut to the model's length with the end kept, then padded.

Explained in the book (docs/book): chapter 9.
"""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nanodiff.config import ASSETS, JSON_SIZE_LIMIT, UserError, nearest, printable, read_fields, read_json, short, typed
from nanodiff.files import write_bytes, write_json

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = ASSETS / "clip" / "merges.txt"
NO_LIMIT = 1 << 20  # tokens; a larger model_max_length (transformers writes 1e30) means that there is no limit
# how a learned word stands in a vocabulary
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": False}
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class CLIPTokenizer:
    """tok(["a cat"]) -> ids [[49406, 320, 2368, 49407, pad…]], each `length` long (77).

    words: {learned word: its token ids}, in the order of the first id; ids: {the backend's id of such a word: token ids}.
    """

    def __init__(self, backend, pad, length=77):
        self.backend, self.length, self.words, self.ids = backend, length, {}, {}
        self.bos, self.eos, self.pad = (backend.token_to_id(t) for t in (START, END, pad))
        for token, i in ((START, self.bos), (END, self.eos), (pad, self.pad)):
            if i is None:
                raise UserError(f"tokenizer: the special token {token!r} is not in the vocabulary")
        if self.pad != self.eos:  # SD 2 and SDXL pad with `!`, and a `!` in a prompt becomes padding, in diffusers too
            backend.add_special_tokens([AddedToken(pad, normalized=False, special=True)])

    @classmethod
    def load(cls, folder, longest=77):
        """From a Hub `tokenizer/` folder. The pad token of special_tokens_map.json wins over tokenizer_config.json:
        in SD 2.1 the two differ, and the model was trained with the former (`!`). longest: tokens that the text encoder takes,
        which are the limit where the folder names none (model_max_length missing, null, or larger than any model, 1e30)."""
        folder = Path(folder)
        settings = {}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).exists():
                settings |= read_fields(
                    folder / name, {"pad_token": str | dict | None, "model_max_length": float | None}
                )
        pad, length = settings.get("pad_token") or END, settings.get("model_max_length")
        pad = typed(pad.get("content"), str, f"{folder}: pad_token: content") if isinstance(pad, dict) else pad
        if length is not None and not length >= 3:
            raise UserError(f"{folder}/tokenizer_config.json: model_max_length = {length:g} leaves no room for a word")
        if (folder / "vocab.json").exists():
            backend = _from_merges(folder)
        elif (folder / "tokenizer.json").exists():
            backend = _from_json(folder / "tokenizer.json")
        else:
            raise UserError(f"{folder}: no tokenizer (vocab.json and merges.txt, or tokenizer.json)")
        self = cls(backend, pad, longest if length is None or length > NO_LIMIT else int(length))
        self._learn_listed(folder)
        return self

    def _learn_listed(self, folder):
        """The learned words that a folder lists beside its vocabulary (see _listed_words): one token each. WORD with WORD_1, WORD_2, …
        is one word of several vectors, as diffusers keeps it, and stands for all of them."""
        listed, vocabulary = _listed_words(folder), self.backend.get_vocab(with_added_tokens=False)
        names = {i: token for token, i in vocabulary.items()}
        for word, i in listed.items():
            if vocabulary.get(word, names.get(i) and -1) not in (i, None):
                raise UserError(
                    f"{folder}: the added token {printable(word)} has id {i}, which the vocabulary contradicts"
                )
        learned = {word: i for word, i in listed.items() if word not in vocabulary and word not in (START, END)}
        for word, i in sorted(learned.items(), key=lambda pair: pair[1]):
            more = itertools.takewhile(lambda w: w in learned, (f"{word}_{k}" for k in itertools.count(1)))
            self._add(word, [i, *(learned[w] for w in more)])

    def save(self, folder):
        """Write vocab.json, merges.txt and the two settings files of a Hub `tokenizer/` folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        model = json.loads(self.backend.to_str())["model"]
        merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
        vocab = model["vocab"] | {START: self.bos, END: self.eos}
        write_json(folder / "vocab.json", dict(sorted(vocab.items(), key=lambda kv: kv[1])))
        write_bytes(folder / "merges.txt", ("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)).encode())
        special = {
            "bos_token": START,
            "eos_token": END,
            "unk_token": END,
            "pad_token": self.backend.id_to_token(self.pad),
        }
        write_json(folder / "special_tokens_map.json", special)
        for older in (
            "tokenizer.json",
            "added_tokens.json",
        ):
            # of another tokenizer that was here, which a reader would take, too
            (folder / older).unlink(missing_ok=True)
        kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length, "do_lower_case": True}
        if self.words:
            write_json(folder / "added_tokens.json", {word: ids[0] for word, ids in self.words.items()})
            kind["added_tokens_decoder"] = {str(ids[0]): {"content": word} | PLAIN for word, ids in self.words.items()}
        write_json(folder / "tokenizer_config.json", special | kind)

    def pieces(self, text):
        """Ids of a text without start, end, cut or padding; a learned word stands for all its ids."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [i for piece in ids for i in self.ids.get(piece, (piece,))] if self.ids else ids

    def add_word(self, word, ids):
        """Let `word` stand for the token ids of a learned word (textual inversion); those after the first are WORD_1, WORD_2, …
        too, the names by which diffusers keeps them."""
        ids = list(ids)
        for k, name in enumerate(self.check_word(word, len(ids))):
            self._add(name, ids[k:] if k == 0 else ids[k : k + 1])

    def check_word(self, word, n):
        """The names of a learned word of n vectors. Raises UserError for one that is there."""
        names = [word, *(f"{word}_{k}" for k in range(1, n))]
        if taken := [name for name in names if self.backend.token_to_id(name) is not None]:
            raise UserError(f"learned word {printable(taken[0])}: the tokenizer already has this word")
        return names

    def _add(self, word, ids):
        if self.backend.token_to_id(word) is None:
            self.backend.add_tokens([AddedToken(word, **PLAIN)])
        self.words[word] = self.ids[self.backend.token_to_id(word)] = ids

    @property
    def size(self):
        """Token ids that the text encoder must have embeddings for."""
        known = self.backend.get_vocab(with_added_tokens=False).values()
        return 1 + max(*known, self.bos, self.eos, *(i for ids in self.words.values() for i in ids))

    def __call__(self, texts, length=None):
        """texts: list of str -> list of lists of `length` ids. What is cut off: see overflow()."""
        length = length or self.length
        rows = [[self.bos, *self.pieces(t)[: length - 2], self.eos] for t in texts]
        return [row + [self.pad] * (length - len(row)) for row in rows]

    def overflow(self, text, length=None):
        """The part of `text` that does not fit, decoded ("" when all of it fits)."""
        return self.decode(self.pieces(text)[(length or self.length) - 2 :])

    def decode(self, ids):
        names = {ids[0]: word for word, ids in self.words.items()}
        tokens = [names.get(i) or self.backend.id_to_token(i) for i in ids if i not in (self.bos, self.eos)]
        table = {c: b for b, c in _byte_characters().items()}
        text = "".join(t or "" for t in tokens).replace("</w>", " ").strip()
        return b"".join(b" " if c == " " else bytes([table[c]]) if c in table else c.encode() for c in text).decode(
            "utf-8", errors="replace"
        )


class LabelTokenizer:
    """tok(["cat"]) -> ids [[3]]: the place of a class label in the list, from 1; "" is 0, no label."""

    length = 1

    def __init__(self, labels):
        self.labels = tuple(labels)

    @classmethod
    def load(cls, folder):
        labels = read_json(Path(folder) / "labels.json").get("labels")
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise UserError(f"{folder}/labels.json: no list of labels")
        return cls(labels)

    def save(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "labels.json", {"labels": list(self.labels)})

    def __call__(self, texts):
        for text in texts:
            if text and text not in self.labels:
                known = f"; it knows {', '.join(map(printable, self.labels[:8]))}" if self.labels else "; it knows none"
                raise UserError(f"{printable(text)!r} is no label of this model{known}{nearest(text, self.labels)}")
        return [[self.labels.index(text) + 1 if text else 0] for text in texts]


class T5Tokenizer:
    """tok(["a cat"], 256) -> ids [[3, 9, 1712, 1, 0, 0…]]: pieces of a unigram model, the end token, padding."""

    def __init__(self, backend, length=512):
        self.backend, self.length = backend, length
        self.eos, self.pad = (backend.token_to_id(t) for t in ("</s>", "<pad>"))
        if self.eos is None or self.pad is None:
            raise UserError("tokenizer_3: has no </s> or no <pad>, so it is not T5's")

    @classmethod
    def load(cls, folder):
        """From a Hub `tokenizer_3/` folder, which must hold tokenizer.json."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").exists():
            found = (
                "only spiece.model, which cannot be read" if (folder / "spiece.model").exists() else "no tokenizer.json"
            )
            raise UserError(f"{folder}: {found}; T5's tokenizer is read from tokenizer.json")
        return cls(_from_json(folder / "tokenizer.json"))

    def save(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "tokenizer.json", self.backend.to_str(pretty=True).encode())
        special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        write_json(folder / "special_tokens_map.json", special)
        kind = {"tokenizer_class": "T5TokenizerFast", "model_max_length": self.length, "extra_ids": 0}
        write_json(folder / "tokenizer_config.json", special | kind)

    def pieces(self, text):
        """Ids of a text without end, cut or padding."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def __call__(self, texts, length=None):
        """texts: list of str -> list of lists of `length` ids."""
        length = length or self.length
        rows = [[*self.pieces(t)[: length - 1], self.eos] for t in texts]
        return [row + [self.pad] * (length - len(row)) for row in rows]

    def overflow(self, text, length=None):
        """The part of `text` that does not fit, decoded ("" when all of it fits)."""
        return self.decode(self.pieces(text)[(length or self.length) - 1 :])

    def decode(self, ids):
        return self.backend.decode(ids)


class TextTokenizer:
    """A language model's: text to ids without cut or padding, and back. begin: the id that stands before a text, or None; size: of the model's
    vocabulary, which may lack tokens that were added for other models of a family (Gemma 3's pictures), or None for whatever there is."""

    def __init__(self, backend, begin=None, size=None):
        self.backend, self.begin, self.size = backend, begin, size
        # are words written with a space behind them? (see learned())
        self.spaced = backend.token_to_id("a</w>") is not None

    @classmethod
    def load(cls, folder, cfg):
        """From a Hub folder's tokenizer.json; cfg: the model's, which says the beginning. Raises UserError for a tokenizer with ids that the
        model has no embedding for."""
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise UserError(f"{folder}: no tokenizer.json, from which the tokenizer is read")
        backend = _from_json(path)
        largest = max(backend.get_vocab(with_added_tokens=False).values(), default=0)
        if largest >= cfg.vocab_size:
            raise UserError(
                f"{path}: has ids up to {largest}, the model's vocabulary has {cfg.vocab_size}: it is another model's"
            )
        return cls(backend, cfg.bos_token_id, cfg.vocab_size)

    def save(self, folder):
        """Write tokenizer.json into a folder."""
        write_bytes(Path(folder) / "tokenizer.json", self.backend.to_str().encode())

    def ids(self, text, begin=True):
        """Ids of a text; begin: with the beginning before it, unless the text has it already. Raises UserError for a token that the model has no
        embedding for."""
        found = self.backend.encode(text, add_special_tokens=False).ids
        if self.size and max(found, default=0) >= self.size:
            token = self.backend.id_to_token(max(found))
            raise UserError(
                f"{short(text)}: the model has no embedding for {printable(token)!r}, which is a token of its own"
            )
        return [self.begin, *found] if begin and self.begin is not None and found[:1] != [self.begin] else found

    def decode(self, ids):
        """Text of ids, without special tokens."""
        text = self.backend.decode(list(ids), skip_special_tokens=True)
        return text.removesuffix(" ") if self.spaced else text

    @classmethod
    def learned(cls, texts, vocab_size):
        """One whose byte-pair vocabulary is learned from `texts` (see train_bpe), for a model trained from scratch: (tokenizer, end token)."""
        made = train_bpe(texts, vocab_size, length=1 << 20)
        made.backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
        made.backend.post_processor = None
        return cls(made.backend, made.bos), made.eos

    def rest(self, prompt, ids):
        """Text of `ids` where it goes on from `prompt`'s: a first word's space, which decoding it alone would lose, is kept."""
        before, whole = self.decode(prompt), self.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)


def _byte_characters():
    """GPT-2's printable stand-in for every byte: {byte: character}."""
    keep = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in keep]
    return {b: chr(b) for b in keep} | {b: chr(256 + i) for i, b in enumerate(others)}


def _from_json(path):
    if path.stat().st_size > JSON_SIZE_LIMIT:
        raise UserError(f"{path}: {path.stat().st_size >> 20} MB is too large for a tokenizer")
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises bare Exception
        raise UserError(f"{path}: not a tokenizer file: {e}") from None
    backend.no_truncation()  # of the last call before transformers >= 5 wrote the file: no part of the tokenizer, set anew at each call there
    backend.no_padding()
    return backend


def _listed_words(folder):
    """{token: id} of a folder's tokens beside its vocabulary, from the three places where they are kept: added_tokens.json (old),
    tokenizer_config.json's added_tokens_decoder, and tokenizer.json's added_tokens. Raises UserError where these disagree."""
    listed = {}
    old, config, whole = (folder / n for n in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"))
    if old.exists():
        listed[old] = list(read_json(old).items())
    if config.exists():
        decoder = read_fields(config, {"added_tokens_decoder": dict | None}).get("added_tokens_decoder") or {}
        listed[config] = [(v.get("content") if isinstance(v, dict) else v, k) for k, v in decoder.items()]
    if whole.exists():
        added = read_fields(whole, {"added_tokens": list | None}).get("added_tokens") or []
        listed[whole] = [(v.get("content"), v.get("id")) if isinstance(v, dict) else (None, None) for v in added]
    words = {}
    for path, pairs in listed.items():
        for word, i in pairs:
            i = int(i) if isinstance(i, str) and i.isascii() and i.isdigit() else i
            if (
                not isinstance(word, str)
                or not word
                or not isinstance(i, int)
                or isinstance(i, bool)
                or not 0 <= i < 1 << 24
            ):
                raise UserError(
                    f"{path}: the added token {printable(repr(word)[:60])} has the id {printable(repr(i)[:60])}"
                )
            if words.setdefault(word, i) != i:
                raise UserError(
                    f"{path}: the added token {printable(word)} has id {i}, elsewhere in the folder {words[word]}"
                )
    ids = Counter(words.values())
    if twice := [word for word, i in words.items() if ids[i] > 1]:
        raise UserError(
            f"{folder}: the added tokens {', '.join(map(printable, twice[:3]))} have one id, {words[twice[0]]}"
        )
    return words


def _read_merges(path):
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: {e}") from None
    lines = lines[1:] if lines and lines[0].startswith("#version") else lines
    return [tuple(line.split()) for line in lines if line.strip()]


def clip_from_merges(pad, length):
    """OpenAI's CLIP tokenizer from its merges alone, for checkpoints that bring none: the vocabulary is the bytes, the
    bytes that end a word, the merges in their order, and the two special tokens."""
    merges, letters = _read_merges(CLIP_MERGES), list(_byte_characters().values())
    pieces = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), START, END]
    return CLIPTokenizer(_bpe({piece: i for i, piece in enumerate(pieces)}, merges), pad, length)


def _from_merges(folder):
    vocab, merges = read_json(folder / "vocab.json"), _read_merges(folder / "merges.txt")
    made = {"".join(m) for m in merges}
    lacking = [t for t in vocab if t not in made and len(t.removesuffix("</w>")) > 1 and not re.fullmatch("<.*>", t)]
    if len(lacking) > max(10, len(vocab) // 500):  # some are learned words
        raise UserError(
            f"{folder}: vocab.json and merges.txt do not belong together: no merge makes {len(lacking)} of the vocabulary's tokens, such as "
            f"{printable(lacking[0])!r}"
        )
    try:
        return _bpe(vocab, merges)
    except Exception as e:  # a merge of pieces outside the vocabulary
        raise UserError(f"{folder}: vocab.json and merges.txt do not belong together: {e}") from None


def clip_backend(model):
    """A `tokenizers` pipeline with CLIP's normalisation and word pattern around a BPE model."""
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (START, END)])
    bos, eos = backend.token_to_id(START), backend.token_to_id(END)
    if bos is not None and eos is not None:
        backend.post_processor = processors.RobertaProcessing(
            (END, eos), (START, bos), trim_offsets=False, add_prefix_space=False
        )
    return backend


def train_bpe(texts, vocab_size, length):
    """A CLIPTokenizer whose byte-pair vocabulary is learned from `texts` (Sennrich et al. 2016, arXiv 1508.07909 Alg. 1).

    Written out because the trainer of `tokenizers` breaks ties by hash order: two runs would not give one model.
    Here the most frequent pair wins, the alphabetically first among equals. vocab_size counts the 512 byte pieces and
    the two special tokens.
    """
    alphabet = list(_byte_characters().values())
    backend = _bpe({c: i for i, c in enumerate(alphabet)}, [])
    counts = Counter()
    for text in texts:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
            counts[word] += 1
    words = [([*w[:-1], w[-1] + "</w>"], n) for w, n in sorted(counts.items())]
    pieces = dict.fromkeys([*alphabet, *(a + "</w>" for a in alphabet)])
    merges = []
    while len(pieces) < vocab_size - 2:
        pairs = Counter()
        for parts, n in words:
            for pair in itertools.pairwise(parts):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        pieces["".join(best)] = None
        words = [(_merge(parts, best), n) for parts, n in words]
    vocab = {piece: i for i, piece in enumerate([*pieces, START, END])}
    return CLIPTokenizer(_bpe(vocab, merges), END, length)


def _merge(parts, pair):
    if pair[0] not in parts:
        return parts
    out = []
    for piece in parts:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def _bpe(vocab, merges):
    return clip_backend(
        models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END)
    )
