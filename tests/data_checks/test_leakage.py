"""Seeded copies are found, disjoint text is left alone, and one pass is many passes merged."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from corpus import KINDS, documentation, sources

from perplexity.data_checks import Text, check_data
from perplexity.data_checks import index as index_module
from perplexity.data_checks.index import NGRAM, Index, scan_batch
from perplexity.data_checks.leakage import leaks, scan_texts, without_leaks
from perplexity.data_checks.words import grams, hashes, words


def signals(check):
    return {finding.signal: finding for finding in check.findings}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.15])
@pytest.mark.parametrize("kind", KINDS)
def test_seeded_leaks(kind, share):
    if kind == "inside" and share == 0.0:
        pytest.skip("nothing is seeded, as with the others")
    generator = random.Random(f"{kind}{share}")
    valid = documentation()
    chosen = set(generator.sample(range(len(valid)), round(share * len(valid))))
    train = [*sources()[:150], *(KINDS[kind](valid[place], generator) for place in sorted(chosen))]
    generator.shuffle(train)
    check = check_data(train, valid)
    found = {leak.document for leak in check.leaked}
    recall = len(found & chosen) / max(1, len(chosen))
    assert recall >= (0.95 if kind == "changed" else 0.98) or not chosen
    # Some paragraphs of the documentation are copies of each other: those of a seeded one are leaked as well.
    near = {leak.document for leak in check_data([valid[place] for place in chosen], valid).leaked}
    assert found <= near | chosen
    assert check.exact_duplicates + check.near_duplicates == len(found)
    if kind in ("exact", "respaced"):
        assert sum(leak.kind == "exact" for leak in check.leaked if leak.document in chosen) == len(chosen)
    finding = signals(check).get("leakage")
    assert (
        (finding is None)
        if not chosen
        else finding.severity == ("danger" if len(found) >= 0.01 * len(valid) else "warning")
    )
    for leak in check.leaked:
        if leak.document in chosen and leak.passage:
            shown = leak.passage.removesuffix(" …")
            assert shown in b" ".join(words(train[int(leak.train_id)])).decode()


def test_no_false_report_on_disjoint_text():
    check = check_data(sources(), documentation())
    assert check.leaked == [] and check.ngram_overlap < 1e-3
    assert "leakage" not in signals(check)
    assert "shared-passages" not in signals(check) or signals(check)["shared-passages"].severity == "info"
    # Whole topics, the debugger's among them: a fifth of it is in pdb's source, and told as passages.
    from pydoc_data import topics

    check = check_data(sources(), list(topics.topics.values()))
    assert check.leaked == [] and signals(check)["shared-passages"].numbers["documents"] == 1


def test_leaked_tokens_are_of_the_leaked_documents():
    valid = [
        "one two three four five six seven eight nine ten",
        "a b c d e f g h i j k l m n o p q r s t u v w x y z 1 2 3 4",
    ]
    check = check_data([valid[1].upper()], valid)
    assert check.leaked_fraction == 0.5 and check.leaked_token_fraction == 30 / 40
    assert (check.documents, check.words) == (dict(train=1, valid=2), dict(train=30, valid=40))
    assert check.ngram_overlap == 1.0  # of those that have an n-gram


def test_short_documents_leak_as_a_whole_only():
    """A heading or a phrase is in every text: only a document that is the same counts."""
    long = "see the table below and then " * 10
    assert check_data([long], ["See the table below."]).leaked == []
    assert check_data([long, "see the TABLE, below"], ["See the table below."]).exact_duplicates == 1
    assert check_data(["..."], ["???"]).leaked == []  # no words are no copies of no words


@pytest.mark.parametrize(
    ("valid", "train"),
    [
        ("Na\u00efve caf\u00e9s \u2014 and \u201cquotes\u201d everywhere", "nai\u0308ve cafe\u0301s and quotes\u00a0everywhere"),
        ("\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u3002", "\u4eca\u5929\u5929\u6c14\u5f88\u597d \u6211\u4eec"),
        ("\uff21\uff22\uff23 full width \uff11\uff12\uff13", "abc FULL width 123"),
        ("\u041f\u0440\u0438\u0432\u0435\u0442, \u041c\u0418\u0420!", "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440"),
    ],
)  # fmt: skip
def test_any_script(valid, train):
    assert check_data([train], [valid]).exact_duplicates == 1
    assert check_data([train + " x"], [valid]).exact_duplicates == 0


def test_a_changed_copy_in_a_script_without_spaces():
    text = "".join(chr(0x4E00 + n * 37 % 5000) for n in range(200))
    other = "".join(letter if n % 10 else chr(0x4E00 + n) for n, letter in enumerate(text))
    (leak,) = check_data([other], [text]).leaked
    assert leak.kind == "near" and leak.similarity > 0.3


def test_ngrams_are_those_of_the_words():
    generator = np.random.default_rng(0)
    sequence = hashes([bytes([65 + letter]) for letter in generator.integers(0, 3, 400)])
    for size in (1, 2, 4, NGRAM):
        found = grams(sequence, size)
        windows = {}
        assert len(found) == 400 - size + 1
        for place, gram in enumerate(found.tolist()):
            assert windows.setdefault(tuple(sequence[place : place + size].tolist()), gram) == gram
        assert len(set(windows.values())) == len(windows)
    assert len(grams(sequence[:12], NGRAM)) == 0


def test_no_ngram_spans_two_documents():
    text = " ".join(f"word{number}" for number in range(26))
    first, second = text.split(" word13 ")
    assert check_data([first, "word13 " + second], [text]).ngram_overlap < 0.2
    assert check_data([text], [text]).ngram_overlap == 1.0


def test_shards_merge_to_the_whole_in_any_order(monkeypatch):
    valid = [Text(str(number), text) for number, text in enumerate(documentation()[:300])]
    generator = random.Random(3)
    train = [Text(f"s{number}", text) for number, text in enumerate(sources()[:40])]
    train += [
        Text(f"c{place}", KINDS[kind](valid[place].text, generator)) for kind in KINDS for place in range(0, 300, 17)
    ]
    index = Index(valid)
    whole = scan_batch(index, train)
    shards = [scan_batch(index, train[start::7]) for start in range(7)]
    for order in (shards, shards[::-1]):
        merged = index.scan()
        for shard in order:
            merged.merge(scan_batch(index, []).merge(shard))
        assert leaks(index, merged) == leaks(index, whole) and (merged.seen == whole.seen).all()
        assert (merged.documents, merged.words, merged.lengths) == (whole.documents, whole.words, whole.lengths)


def test_workers_and_resumption_find_the_same(tmp_path, monkeypatch):
    from perplexity.data_checks import leakage

    monkeypatch.setattr(leakage, "BATCH", 20_000)
    monkeypatch.setattr(leakage, "SAVE_EVERY", 0.0)
    valid = documentation()[:200]
    train = [*sources()[:60], *valid[::9]]
    alone = check_data(train, valid).to_json()
    assert check_data(train, valid, workers=3).to_json() == alone

    def interrupted():
        yield from train[:40]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_data(interrupted(), valid, journal=tmp_path)
    scanned = []
    real = leakage.scan_batch
    monkeypatch.setattr(leakage, "scan_batch", lambda index, texts: scanned.append(len(texts)) or real(index, texts))
    assert check_data(train, valid, journal=tmp_path).to_json() == alone
    assert 0 < sum(scanned) < len(train)
    with pytest.raises(ValueError, match="journal: .* is of another check"):
        check_data(train, valid[:-1], journal=tmp_path)


def test_the_tables_stay_in_their_limit():
    """Of more n-grams than fit a part is kept, chosen by hash: shares are estimates, and copies still found."""
    valid = documentation()
    train = [*sources()[:40], *valid[::3]]
    exact_check = check_data(train, valid)
    check = check_data(train, valid, memory_limit=200_000)
    assert check.settings["ngrams_kept"] in (1 / 16, 1 / 32, 1 / 64)
    index = Index([Text(str(number), text) for number, text in enumerate(valid)], 200_000)
    assert sum(len(table.grams) for table in index.tables.values()) * index_module.BYTES_A_GRAM <= 200_000
    assert check.exact_duplicates == exact_check.exact_duplicates
    assert abs(check.ngram_overlap - exact_check.ngram_overlap) < 0.1
    assert any("shares are estimates" in note for note in check.notes)


def test_repeated_validation_documents():
    text = documentation()[0]
    check = check_data(["nothing of it"], [text, text.upper(), documentation()[1]])
    assert signals(check)["repeated-validation"].numbers["documents"] == 1


def test_boilerplate_of_every_document_names_none():
    """A licence in all of them is no copy of any, but counts in the share of n-grams that training has."""
    licence = " ".join(f"term{number}" for number in range(40))
    valid = [f"{licence} {' '.join(f'own{number}x{word}' for word in range(200))}" for number in range(150)]
    check = check_data([licence], valid)
    assert check.leaked == [] and 0.1 < check.ngram_overlap < 0.2


def test_what_would_leak_is_dropped_from_training():
    valid = documentation()[:50]
    index = Index([Text(str(number), text) for number, text in enumerate(valid)])
    kept = "a paragraph of its own that stands in no validation text and has to stay"
    train = [
        Text("whole", valid[3].lower()),
        Text("part", f"{kept}\n\n{valid[7]}\n\n{kept} too"),
        Text("clean", sources()[0]),
    ]
    left = list(without_leaks(train, index))
    assert [text.id for text in left] == ["part", "clean"]
    assert re.split(r"\n\s*\n", left[0].text.strip()) == [kept, f"{kept} too"]
    assert not leaks(index, scan_texts(index, left))


def test_a_shard_runs_under_an_engine(tmp_path):
    """datatrove's local executor, in processes of its own; run again it does nothing that is done."""
    pytest.importorskip("datatrove")
    code = f"""
import sys
sys.path[:0] = {[path for path in sys.path if path]!r}
from corpus import documentation
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from perplexity.data_checks.engines import LeakageScan, merged
from perplexity.data_checks.index import Index, Text
from perplexity.data_checks.leakage import leaks
if __name__ == "__main__":
    index = Index([Text(str(number), text) for number, text in enumerate(documentation()[:100])])
    steps = [JsonlReader("train"), LeakageScan(index, "scans")]
    for _ in range(2):
        LocalPipelineExecutor(steps, tasks=3, workers=2, logging_dir="log").run()
    scan = merged("scans", index)
    print(scan.documents, [leak.document for leak in leaks(index, scan)])
"""
    (tmp_path / "train").mkdir()
    for shard in range(3):
        rows = [*sources()[shard:12:3], documentation()[7 * shard]]
        content = "".join(json.dumps({"text": text, "id": f"{shard}.{row}"}) + "\n" for row, text in enumerate(rows))
        (tmp_path / "train" / f"{shard}.jsonl").write_text(content)
    (tmp_path / "job.py").write_text(code)
    done = subprocess.run([sys.executable, "job.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "15 [0, 7, 14]"
