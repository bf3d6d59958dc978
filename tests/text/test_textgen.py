"""Texts: greedy as recorded, by chance from the right distribution, by beams as an exhaustive search finds them."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer
from util import TINY, golden

from nanodiff import weights
from nanodiff.config import UserError
from nanodiff.models import llm
from nanodiff.text import textgen
from nanodiff.text.textgen import Chance


@pytest.fixture(scope="module", params=("llama", "gemma3"))
def model(request):
    return request.param, weights.load(llm.CausalLM, TINY / request.param, torch.float32)


def test_greedy_golden(model):
    """One by one and in a batch with padding: the recorded tokens."""
    name, net = model
    tensors, _ = golden(f"{name}.greedy")
    prompts = [tensors[f"prompt_ids.{i}"][0].tolist() for i in range(2)]
    want = [tensors[f"output_ids.{i}"][0].tolist() for i in range(2)]
    both = textgen.generate(net, prompts, 20)
    for i, (prompt, out) in enumerate(zip(prompts, want, strict=True)):
        (alone,) = textgen.generate(net, [prompt], 20)
        assert prompt + alone.ids == out == prompt + both[i].ids and not alone.ended
        assert textgen.generate(net, [prompt], 20, beams=1)[0].ids == alone.ids


def test_gemmas_chat():
    tensors, facts = golden("gemma3.chat")
    net = weights.load(llm.CausalLM, TINY / "gemma3", torch.float32)
    text = textgen.chat(facts["args"]["messages"])
    assert text == facts["args"]["rendered"] if "rendered" in facts["args"] else facts["rendered"]
    ids = Tokenizer.from_file(str(TINY / "gemma3" / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert ids == tensors["input_ids"][0].tolist()
    (written,) = textgen.generate(net, [ids], tensors["output_ids"].shape[1] - len(ids))
    assert ids + written.ids == tensors["output_ids"][0].tolist()


def test_chat_takes_turns():
    said = [
        {"role": "system", "content": " be short "},
        {"role": "user", "content": "hi "},
        {"role": "assistant", "content": "yes"},
    ]
    text = textgen.chat([*said, {"role": "user", "content": "bye"}])
    assert text == ("<bos><start_of_turn>user\nbe short\n\nhi<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n"
                    "<start_of_turn>user\nbye<end_of_turn>\n<start_of_turn>model\n")  # fmt: skip
    with pytest.raises(UserError, match="message 2 is the user's"):
        textgen.chat([said[1], said[1]])


def test_rows_end_by_themselves(model):
    """The end token stops its row, not the others; it is not part of the text."""
    name, net = model
    tensors, _ = golden(f"{name}.greedy")
    prompts = [tensors[f"prompt_ids.{i}"][0].tolist() for i in range(2)]
    free = [w.ids for w in textgen.generate(net, prompts, 20)]
    end = next(t for t in free[0][3:] if t not in free[1])
    first, second = textgen.generate(net, prompts, 20, eos=[end])
    assert first.ended and first.ids == free[0][: free[0].index(end)] and not second.ended and second.ids == free[1]
    steps = []
    textgen.generate(net, prompts[:1], 20, eos=[end], on_step=lambda i, s: steps.append(s))
    assert len(steps) == free[0].index(end) + 1, "nothing is computed after the last row's end"


def test_chance_does_not_depend_on_the_batch(model):
    name, net = model
    tensors, _ = golden(f"{name}.greedy")
    prompts = [tensors[f"prompt_ids.{i}"][0].tolist() for i in range(2)]
    chance = Chance(temperature=0.9, top_p=0.95)
    both = textgen.generate(net, prompts, 12, chance, seeds=[5, 6])
    again = textgen.generate(net, prompts[1:], 12, chance, seeds=[6])
    assert both[1].ids == again[0].ids != textgen.generate(net, prompts[1:], 12, chance, seeds=[7])[0].ids


LOGITS = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 5.0, 0.0, 0.0]])


@pytest.mark.parametrize("chance, kept", [
    (Chance(), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
    (Chance(top_k=2), [[0, 1], [0, 1, 2, 3, 4]]),  # equal logits stay together
    (Chance(top_p=0.8), [[0, 1], [2]]),  # 0.64 alone, 0.87 together
    (Chance(top_p=0.0), [[0], [2]]),
    (Chance(min_p=0.2), [[0, 1], [2]]),  # e^-1 = 0.37, e^-2 = 0.14
    (Chance(temperature=0.5, min_p=0.2), [[0], [2]]),  # e^-2
])  # fmt: skip
def test_what_may_come(chance, kept):
    got = textgen.adjusted(LOGITS, chance)
    assert [torch.isfinite(row).nonzero().flatten().tolist() for row in got] == kept
    finite = torch.isfinite(got)
    assert torch.allclose(got[finite], (LOGITS / chance.temperature)[finite])


def test_repetition_costs():
    got = textgen.adjusted(LOGITS, Chance(repetition_penalty=2.0), [[0, 4, 0], []])
    assert torch.equal(got, torch.tensor([[1.5, 2.0, 1.0, 0.0, -2.0], [0.0, 0.0, 5.0, 0.0, 0.0]]))
    assert torch.equal(LOGITS[0, 0], torch.tensor(3.0)), "the logits themselves stay"


def test_beams_find_the_best_text():
    """As many beams as there are texts: the search is exhaustive, so its answer must be the best of all, ended or not."""
    table = 2 * torch.randn(5, 5, generator=torch.Generator().manual_seed(3))

    class Net:
        cfg, output = llm.Config(vocab_size=5, num_hidden_layers=0, max_position_embeddings=50), table

        def __call__(self, ids, mask=None, cache=None):
            return ids[..., None]

        def logits(self, last):
            return table[last[:, 0]]

    shares = table.log_softmax(-1)
    for length_penalty, n in itertools.product((0.0, 1.0, 2.0), (1, 2, 3)):
        best = None
        for length in range(n + 1):
            for text in itertools.product((0, 1, 2, 3), repeat=length):
                full = [2, *text, 4] if length < n else [2, *text]
                score = sum(shares[a, b].item() for a, b in itertools.pairwise(full))
                worth = score / (len(full) - 1) ** length_penalty
                best = max(best or (-1e9, ()), (worth, text))
        found = textgen.beam(Net(), [2], n, 256, eos=(4,), length_penalty=length_penalty)
        assert tuple(found.ids) == best[1], (length_penalty, n)


def test_more_beams_are_not_worse(model):
    name, net = model
    prompt = golden(f"{name}.greedy")[0]["prompt_ids.1"][0].tolist()
    scores = [textgen.generate(net, [prompt], 8, beams=b)[0].score for b in (1, 3)]
    assert scores[1] >= scores[0] - 1e-4


def test_mistakes_are_named(model):
    _, net = model
    for prompts, n, words in (([[1], []], 4, "a prompt is empty"), ([[9999]], 4, "token 9999 is beyond the model's vocabulary"),
                              ([[1] * 2040], 9, "2040 tokens and 9 new ones are more than the 2048")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            textgen.generate(net, prompts, n)
    with pytest.raises(UserError, match="`beams` takes the likeliest"):
        textgen.generate(net, [[1]], 4, Chance(), beams=2)
    for more in ({"temperature": -1}, {"top_p": 1.5}, {"min_p": -0.1}, {"top_k": -1}, {"repetition_penalty": 0}):
        with pytest.raises(UserError, match="must be between"):
            Chance(**more)
