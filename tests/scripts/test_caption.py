"""caption.py complete: a language model goes on with a text."""

import json
import shutil

import pytest
from util import ROOT, TINY, golden, in_process

import caption

STORIES = ROOT.parent / "shared" / "data" / "stories260k"


def script(folder, **more):
    options = {
        "model": TINY / "llama",
        "prompt": "Fruit Salad",
        "max-new-tokens": 6,
        "temperature": 0,
        "output-dir": folder / "out",
    } | more
    argv = [a for k, v in options.items() if v is not None for a in ([f"--{k}"] if v is True else [f"--{k}", v])]
    return in_process(caption, "caption.py", "complete", *argv)


def results(folder):
    return json.loads((folder / "out" / "run.json").read_text())["results"]


@pytest.mark.parametrize("name", ("llama", "gemma3"))
def test_greedy_golden(tmp_path, name):
    tensors, facts = golden(f"{name}.greedy")
    prompt = facts["args"]["texts"][1]
    code, out, err = script(tmp_path, model=TINY / name, prompt=prompt, **{"max-new-tokens": 20})
    assert code == 0, err
    found, want = results(tmp_path), tensors["output_ids.1"][0].tolist()
    n = tensors["prompt_ids.1"].shape[1]
    assert found["prompt_ids"] == want[:n]
    ends = json.loads((TINY / name / "config.json").read_text())["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    stop = next((i for i, t in enumerate(want[n:]) if t in ends), 20)
    assert found["ids"] == want[n:][:stop] and found["ended"] == (stop < 20)
    assert out.rstrip("\n") == facts["continuation_text"][1].rstrip("\n") or stop < 20, "the continuation alone"
    assert "tokens/s" in err and found["tokens_per_s"] > 0


def test_chat_golden(tmp_path):
    tensors, facts = golden("gemma3.chat")
    new = tensors["output_ids"].shape[1] - tensors["input_ids"].shape[1]
    code, _, err = script(
        tmp_path,
        model=TINY / "gemma3",
        prompt=facts["args"]["messages"][0]["content"],
        chat=True,
        **{"max-new-tokens": new},
    )
    assert code == 0, err
    found = results(tmp_path)
    assert found["prompt_ids"] == tensors["input_ids"][0].tolist()
    assert found["prompt_ids"] + found["ids"] == tensors["output_ids"][0].tolist()


def test_chance_is_seeded(tmp_path):
    texts = []
    for seed in (1, 1, 2):
        assert script(tmp_path, temperature=1.0, seed=seed, **{"top-p": 0.9})[0] == 0
        texts.append(results(tmp_path)["ids"])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.skipif(not STORIES.exists(), reason="the trained LLaMA is not in the clone")
def test_a_story(tmp_path):
    code, out, err = script(tmp_path, model=STORIES, prompt="Once upon a time", **{"max-new-tokens": 40})
    assert code == 0 and out.startswith(", there was a little girl"), (out, err)


def other(folder, name, **more):
    """A copy of a tiny model whose config says something else."""
    target = folder / "model"
    shutil.copytree(TINY / name, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return target


def test_mistakes_end_with_one_line(tmp_path):
    for more, said in (
        ({"model": None}, "--model is required"),
        ({"prompt": ""}, "--prompt is required"),
        ({"model": tmp_path / "absent"}, "absent"),
        ({"model": TINY / "sd15" / "unet"}, "model_type None is not supported"),
        ({"max-new-tokens": 0}, "must be at least 1"),
        ({"max-new-tokens": 4000}, "more than the 2048 that the model reads"),
        ({"temperature": -1}, "--temperature -1 must be between"),
        ({"temperature": 1, "beams": 2}, "--beams takes the likeliest texts"),
        ({"model": other(tmp_path, "llama", vocab_size=300)}, "has ids up to 501, the model's vocabulary has 300"),
    ):
        code, _, err = script(tmp_path, **more)
        assert code == 2 and said in err and "Traceback" not in err, (said, err)
    (tmp_path / "model" / "tokenizer.json").unlink()
    code, _, err = script(tmp_path, model=tmp_path / "model")
    assert code == 2 and "no tokenizer.json" in err


def test_quantized(tmp_path):
    code, _, err = script(tmp_path, quantize="int8")
    assert code == 0 and "quantized to int8: the weights are 0." in err, err
    code, _, err = script(tmp_path, quantize="int4")
    assert code == 2 and "--quantize int4: a layer of 48 x" in err and "take int8" in err


@pytest.fixture
def gemma(tmp_path):
    """The tiny Gemma as its released files are: a token of its tokenizer is another model's, and what ends a reply stands in generation_config.json."""
    folder = shutil.copytree(TINY / "gemma3", tmp_path / "gemma")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    raw = json.loads((folder / "tokenizer.json").read_text())
    picture = {
        "id": size,
        "content": "<picture>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    raw["added_tokens"].append(picture)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


def test_a_tokenizer_with_another_models_token(tmp_path, gemma):
    code, _, err = script(tmp_path, model=gemma)
    assert code == 0, err
    code, _, err = script(tmp_path, model=gemma, prompt="a <picture> of soup")
    assert code == 2 and "the model has no embedding for '<picture>'" in err


def test_what_ends_a_reply_is_in_generation_config(tmp_path, gemma):
    assert script(tmp_path, model=gemma, **{"max-new-tokens": 8})[0] == 0
    whole = results(tmp_path)["ids"]
    end = next(i for i, token in enumerate(whole) if i and token not in whole[:i])
    (gemma / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, whole[end]]}))
    assert script(tmp_path, model=gemma, **{"max-new-tokens": 8})[0] == 0
    assert results(tmp_path)["ids"] == whole[:end] and results(tmp_path)["ended"]


def test_too_cold(tmp_path):
    code, _, err = script(tmp_path, temperature="1e-40")
    assert code == 2 and "--temperature 1e-40 must be 0 (the likeliest token) or at least 0.0001" in err
    assert script(tmp_path, temperature="1e-4")[0] == 0
