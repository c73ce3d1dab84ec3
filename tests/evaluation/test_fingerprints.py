"""What a model's fingerprint is a hash of, its cache, and how result files name their model."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TEXTS, build_model, build_tokenizer

from perplexity import compare, evaluate, fingerprints, models
from perplexity.errors import InputError
from perplexity.evaluation.model_comparison import compare_models
from perplexity.evaluation.results import read_result
from perplexity.json_files import SCHEMA_VERSION, to_json
from perplexity.models import fingerprint_cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A saved model whose files are old enough to be cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint_cache, "SETTLED", -1.0)
    tokenizer = build_tokenizer(bos=True)
    build_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def fingerprint(folder, **options):
    model, _ = models.load(folder, device="cpu", unchanged=True, **options)
    return models.fingerprint(models.as_language_model(model))


def rewrite_in_place(folder):
    """Another weight of the same size, and the time set back as rsync -t does."""
    path = folder / "model.safetensors"
    before = path.stat()
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "new", {"format": "pt"})
    path.write_bytes((folder / "new").read_bytes())
    (folder / "new").unlink()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def test_a_cached_fingerprint_is_the_models(folder, monkeypatch):
    first = fingerprint(folder)
    calls = []
    digest = models.language_model.tensors_digest
    monkeypatch.setattr(
        models.language_model, "tensors_digest", lambda named: calls.append(1) or digest(named)
    )
    assert fingerprint(folder) == first and not calls
    model, _ = models.load(folder, device="cpu")  # nobody promised that it stays as it was read
    assert models.fingerprint(models.as_language_model(model)) == first and len(calls) == 1
    assert fingerprint(folder, dtype="bfloat16") != first and len(calls) == 2
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    assert fingerprint(copy) == first and len(calls) == 3
    rewrite_in_place(folder)
    assert fingerprint(folder) != first and len(calls) == 4
    # A damaged entry, and a folder that cannot be used, are no hindrance.
    for entry in (folder.parent / "cache").rglob("*"):
        if entry.is_file():
            entry.write_bytes(b"\xff\x00")
    assert fingerprint(copy) == first and len(calls) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert fingerprint(copy) == first and len(calls) == 6


def test_files_that_changed_a_moment_ago_are_not_cached(folder, monkeypatch):
    """Two changes within one tick of the clock look the same."""
    monkeypatch.setattr(fingerprint_cache, "SETTLED", 3600.0)
    assert fingerprint_cache.files_key(folder, "auto") is None
    monkeypatch.setattr(fingerprint_cache, "SETTLED", -1.0)
    assert fingerprint_cache.files_key(folder, "auto") is not None


def test_tensors_of_every_kind_are_hashed():
    digest = lambda **named: fingerprints.tensors_digest(named.items())  # noqa: E731
    values = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    different = [
        digest(a=values),
        digest(b=values),
        digest(a=values.reshape(4, 3)),
        digest(a=values.to(torch.int32)),
        digest(a=values.bfloat16()),
        digest(a=values.to("meta")),
        digest(a=values > 3),
        digest(a=torch.zeros(0)),
        digest(a=torch.tensor(3.0)),
        digest(a=values.to(torch.float8_e4m3fn)),
        digest(a=torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)),
    ]
    assert len(set(different)) == len(different)
    # The order of the memory is no property of the values; nor is how they are cut over threads.
    assert digest(a=values.T.contiguous().T) == different[0]
    assert digest(a=values, b=values) == digest(a=values, b=values.clone())


def test_tensors_that_live_for_a_moment_are_not_mixed_up():
    """Taken for tied weights by their address, the second of two that were made on the way had the
    first one's hash.
    """

    def made(*values):
        return ((str(place), torch.full((64,), value)) for place, value in enumerate(values))

    assert fingerprints.tensors_digest(made(1.0, 2.0)) != fingerprints.tensors_digest(
        made(1.0, 3.0)
    )


def test_pieces_and_threads_do_not_change_the_hash(monkeypatch):
    monkeypatch.setattr(fingerprints, "PIECE", 64)
    values = torch.arange(1000, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = set()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.add(fingerprints.tensors_digest([("a", values)]))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
    for place in (0, 15, 16, 999):
        changed = values.clone()
        changed[place] += 1
        assert fingerprints.tensors_digest([("a", changed)]) not in found


def test_adapters_that_are_off_are_another_model():
    import peft

    settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(build_model(300), settings)
    on = models.fingerprint(models.as_language_model(wrapped))
    with wrapped.disable_adapter():
        off = models.fingerprint(models.as_language_model(wrapped))
    assert on != off and on == models.fingerprint(models.as_language_model(wrapped))


def test_a_tensor_is_read_once(monkeypatch):
    """Every byte is hashed once, tied weights too: the cost is SHA-256's of the weights."""
    hashed, digest = [], fingerprints._piece_digest
    monkeypatch.setattr(
        fingerprints, "_piece_digest", lambda part: hashed.append(part.nbytes) or digest(part)
    )
    values = torch.zeros(3 << 20, dtype=torch.bfloat16)
    fingerprints.tensors_digest([("a", values), ("tied", values)])
    assert sum(hashed) == values.nbytes


@pytest.fixture(scope="module")
def results():
    """Evaluations of two models, and of the first again, as JSON."""
    tokenizer = build_tokenizer(bos=True)
    first, second = build_model(len(tokenizer)), build_model(len(tokenizer))
    with torch.no_grad():
        second.lm_head.weight[0, 0] += 1
    return [
        json.loads(evaluate(model, tokenizer, TEXTS).to_json()) for model in (first, second, first)
    ]


def test_a_result_names_its_model(results, folder):
    model = results[0]["model"]
    assert (model["name"], model["architecture"], model["dtype"]) == (
        None,
        "LlamaForCausalLM",
        "float32",
    )
    assert model["parameters"] == sum(
        p.numel() for p in build_model(len(build_tokenizer(bos=True))).parameters()
    )
    assert (
        model["fingerprint"] != results[1]["model"]["fingerprint"] and model == results[2]["model"]
    )
    loaded, tokenizer = models.load(folder, device="cpu")
    found = evaluate(loaded, tokenizer, TEXTS).model
    assert found == model | {"name": str(folder)}


def test_one_model_beside_itself_is_noted(results):
    note = f"A and B are the same model (fingerprint {results[0]['model']['fingerprint']})"
    assert note in compare(results[0], results[2]).notes
    assert not any("same model" in n for n in compare(results[0], results[1]).notes)
    assert compare(results[0], results[1]).to_dict()["model_b"] == results[1]["model"]
    model, tokenizer = build_model(300), build_tokenizer(bos=True)
    found = compare_models(model, model, tokenizer, TEXTS[:1])
    assert any("same model" in n for n in found.notes) and found.model_a == found.model_b


def test_versions_of_the_json(results, tmp_path):
    assert {result["schema_version"] for result in results} == {SCHEMA_VERSION} == {2}
    path = tmp_path / "result.json"
    path.write_text(to_json(results[0] | {"schema_version": 3}))
    with pytest.raises(
        InputError, match="result.json: expected schema_version 2 at most, got 3: a newer"
    ):
        read_result(path)
    path.write_text(to_json(results[0] | {"schema_version": "two"}))
    with pytest.raises(InputError, match="expected a whole number for schema_version, got 'two'"):
        read_result(path)
    old = [
        {k: v for k, v in result.items() if k not in ("schema_version", "model")}
        for result in results[:2]
    ]
    assert compare(*old).difference == compare(*results[:2]).difference
    # The bytes of version 1 are of text that was not scored, too.
    with pytest.raises(
        InputError, match="bytes: expected both results of one schema_version, got 1 and 2"
    ):
        compare(old[0], results[1], measure="bits-per-byte")
    assert any("schema_version 1" in note for note in compare(*old, measure="bits-per-byte").notes)
