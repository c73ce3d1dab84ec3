"""Seeded copies are found, disjoint text is left alone, and one pass is many passes merged."""

import json
import os
import random
import re
import select
import sqlite3
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from corpus import KINDS, documentation, sources, topics
from processes import HANG, linux_only, run

from perplexity.data_checks import Text, check_data
from perplexity.data_checks import index as index_module
from perplexity.data_checks.index import NGRAM, Index, Scan, groups, scan_batch
from perplexity.data_checks.leakage import leaks, scan_texts, without_leaks, without_quotations
from perplexity.journal import _checksum
from perplexity.text.words import grams, hashes, words


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
    # Some paragraphs of the documentation are copies of each other: those of a seeded one are
    # leaked as well.
    near = {leak.document for leak in check_data([valid[place] for place in chosen], valid).leaked}
    assert found <= near | chosen
    assert check.exact_duplicates + check.near_duplicates == len(found)
    if kind in ("exact", "respaced"):
        assert sum(leak.kind == "exact" for leak in check.leaked if leak.document in chosen) == len(
            chosen
        )
    finding = signals(check).get("leakage")
    danger = min(check.leaked_fraction, check.leaked_token_fraction) >= 0.01
    assert (
        (finding is None) if not chosen else finding.severity == ("danger" if danger else "warning")
    )
    for leak in check.leaked:
        if leak.document in chosen and leak.passage:
            shown = leak.passage.removesuffix(" …")
            assert shown in b" ".join(words(train[int(leak.train_id)])).decode()


def test_no_false_report_on_disjoint_text():
    check = check_data(sources(), documentation())
    assert check.leaked == [] and check.ngram_overlap < 1e-3
    assert "leakage" not in signals(check)
    assert (
        "shared-passages" not in signals(check)
        or signals(check)["shared-passages"].severity == "info"
    )
    # Whole topics, the debugger's among them: a fifth of it is in pdb's source, and told as
    # passages.
    from pydoc_data import topics as whole

    check = check_data(sources(), list(whole.topics.values()))
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


def test_a_mark_is_part_of_its_word():
    # Devanagari with vowel signs, and Thai
    assert len(words("\u0939\u093f\u0928\u094d\u0926\u0940 \u0e01")) == 2
    assert len(words("\u0e20\u0e32\u0e29\u0e32")) == 4  # written without spaces


def test_a_changed_copy_inside_a_longer_document():
    """A stretch as long as the document is compared, not the whole of a text that has other things
    in it.
    """
    generator = random.Random(1)
    valid = [text for text in documentation() if len(text.split()) >= 40]
    train = [KINDS["inside"](KINDS["changed"](text, generator), generator) for text in valid[::5]]
    found = {leak.document for leak in check_data(train, valid).leaked}
    assert len(found & set(range(0, len(valid), 5))) >= 0.95 * len(valid[::5])


@pytest.mark.parametrize(("length", "recall"), [(20, 0.9), (30, 0.95), (60, 0.99), (200, 1.0)])
def test_recall_of_changed_copies_by_length(length, recall):
    generator = random.Random(length)
    texts = [
        " ".join(generator.choices(sources()[0].split(), k=length)) + f" {number}"
        for number in range(200)
    ]
    train = [KINDS["changed"](text, generator) for text in texts]
    assert len(check_data(train, texts).leaked) >= recall * len(texts)


def test_paragraphs_of_two_text_files_that_are_disjoint():
    """Headings and phrases are in every text: what is told of them is no danger."""
    train = [part for text in sources() for part in text.split("\n\n")]
    valid = [part for text in topics() for part in text.split("\n\n")]
    check = check_data(train, valid)
    assert check.leaked_fraction < 0.005 and check.leaked_token_fraction < 0.002
    assert check.worst() != "danger"


def test_short_documents_leak_as_a_whole_only():
    """A heading or a phrase is in every text: only a document that is the same counts."""
    long = "see the table below and then " * 10
    assert check_data([long], ["See the table below."]).leaked == []
    assert (
        check_data([long, "see the TABLE, below"], ["See the table below."]).exact_duplicates == 1
    )
    emoji = check_data(["...", "\U0001f389"], ["???", "\U0001f600", "--", "is equivalent to"])
    # no words are no copies of no words
    assert emoji.leaked == [] and "repeated-validation" not in signals(emoji)
    assert (
        check_data(
            ["an example is equivalent to this", "is equivalent to"], ["is equivalent to"]
        ).leaked
        == []
    )


@pytest.mark.parametrize(
    ("valid", "train"),
    [
        (
            "Na\u00efve caf\u00e9s \u2014 and \u201cquotes\u201d everywhere",
            "nai\u0308ve cafe\u0301s and quotes\u00a0everywhere",
        ),
        (
            "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u3002",
            "\u4eca\u5929\u5929\u6c14\u5f88\u597d \u6211\u4eec",
        ),
        ("\uff21\uff22\uff23 full width \uff11\uff12\uff13", "abc FULL width 123"),
        ("ПРИВЕТ, мир и друг!", "привет мир и друг"),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 a b c",
            "\u0939\u093f\u0928\u094d\u0926\u0940 A B C",
        ),
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
        Text(f"c{place}", KINDS[kind](valid[place].text, generator))
        for kind in KINDS
        for place in range(0, 300, 17)
    ]
    index = Index(valid)
    whole = scan_batch(index, train)
    shards = [scan_batch(index, train[start::7]) for start in range(7)]
    for order in (shards, shards[::-1]):
        merged = index.scan()
        for shard in order:
            merged.merge(scan_batch(index, []).merge(shard))
        assert leaks(index, merged) == leaks(index, whole) and (merged.seen == whole.seen).all()
        assert (merged.documents, merged.words, merged.lengths) == (
            whole.documents,
            whole.words,
            whole.lengths,
        )


def test_workers_and_resumption_find_the_same(tmp_path, monkeypatch):
    from perplexity.data_checks import leakage

    monkeypatch.setattr(leakage, "groups", partial(groups, characters=20_000))
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
    monkeypatch.setattr(
        leakage, "scan_batch", lambda index, texts: scanned.append(len(texts)) or real(index, texts)
    )
    assert check_data(train, valid, journal=tmp_path).to_json() == alone
    assert 0 < sum(scanned) < len(train)
    for other in (valid[:-1], valid[::-1]):
        with pytest.raises(ValueError, match="journal: .* is of another run, with validation"):
            check_data(train, other, journal=tmp_path)


def test_a_damaged_journal_is_scanned_again(tmp_path, monkeypatch):
    """A flipped bit in stored values passed in 9 of 13 tries: now its row is scanned again, and
    that row alone.
    """
    from perplexity.data_checks import leakage

    monkeypatch.setattr(leakage, "groups", partial(groups, characters=3_000))
    monkeypatch.setattr(leakage, "SAVE_EVERY", 0.0)
    valid = documentation()[:60]
    train = [*documentation()[60:80], KINDS["changed"](valid[0], random.Random(0)), *valid[::9]]
    alone = check_data(train, valid, journal=tmp_path).to_json()
    path, scanned = tmp_path / "scan0.sqlite", []
    real = leakage.scan_batch
    monkeypatch.setattr(
        leakage, "scan_batch", lambda index, texts: scanned.append(len(texts)) or real(index, texts)
    )
    with closing(sqlite3.connect(path)) as journal:
        rows = journal.execute("SELECT rowid, key, scored FROM batches").fetchall()
    assert len(rows) >= 3
    assert check_data(train, valid, journal=tmp_path).to_json() == alone and not scanned
    for number in range(40):
        rowid, *held = rows[number % len(rows)]
        column = number % 2
        damaged = bytearray(held[column])
        damaged[number * 7 % len(damaged)] ^= 1 << number % 8
        with closing(sqlite3.connect(path, isolation_level=None)) as journal:
            change = f"UPDATE batches SET {('key', 'scored')[column]} = ? WHERE rowid = ?"
            journal.execute(change, (bytes(damaged), rowid))
        assert check_data(train, valid, journal=tmp_path).to_json() == alone, number
        assert len(scanned) == 1, number
        scanned.clear()
        with closing(sqlite3.connect(path, isolation_level=None)) as journal:
            journal.execute("DELETE FROM batches")
            put = "INSERT INTO batches (rowid, key, scored, checksum) VALUES (?, ?, ?, ?)"
            for rowid, key, scored in rows:
                journal.execute(put, (rowid, key, scored, _checksum(key, scored)))


def test_a_damaged_identity_gives_no_row_of_another_check(tmp_path):
    """The journal cannot tell the two apart then; the keys of its rows can."""
    valid = documentation()[:20]
    train = [KINDS["changed"](valid[0], random.Random(0))]
    check_data(train, valid, journal=tmp_path)
    with sqlite3.connect(tmp_path / "scan0.sqlite") as journal:
        journal.execute("UPDATE agreed SET value = '{}' WHERE name = 'identity'")
    again = check_data(train, valid, near=0.99, journal=tmp_path)
    assert again.to_json() == check_data(train, valid, near=0.99).to_json()


def test_a_journal_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "identity.json").write_text("{}")
    with pytest.raises(ValueError, match=r"journal: expected format 2, .*; give it an empty"):
        check_data(["a"], ["b"], journal=tmp_path)


def test_a_damaged_scan_is_refused():
    text = check_index().scan().to_json()
    for place in range(len(text)):
        with pytest.raises(ValueError):
            Scan.from_json(text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :])


def check_index():
    return Index(
        [Text("v", "one two three four five six seven eight nine ten eleven twelve thirteen")]
    )


def test_the_tables_stay_in_their_limit():
    """Of more n-grams than fit a part is kept, chosen by hash: shares are estimates, and copies
    still found.
    """
    valid = documentation()
    train = [*sources()[:40], *valid[::3]]
    exact_check = check_data(train, valid)
    check = check_data(train, valid, memory_limit=200_000)
    assert check.settings["ngrams_kept"] in (1 / 16, 1 / 32, 1 / 64, 1 / 128)
    index = Index([Text(str(number), text) for number, text in enumerate(valid)], 200_000)
    assert (
        sum(len(table.grams) for table in index.tables.values()) * index_module.BYTES_A_GRAM
        <= 200_000
    )
    assert check.exact_duplicates == exact_check.exact_duplicates
    assert abs(check.ngram_overlap - exact_check.ngram_overlap) < 0.1
    assert any("shares are estimates" in note for note in check.notes)
    # Few n-grams a document are no evidence: what is not found is said, and nothing is made up.
    assert {leak.document for leak in check.leaked} <= {
        leak.document for leak in exact_check.leaked
    }


def test_one_endless_repetition_takes_no_room_of_others():
    valid = [*documentation()[:50], "0 " * 100_000]
    assert check_data(["nothing"], valid, memory_limit=8 << 20).settings["ngrams_kept"] == 1


def test_repeated_validation_documents():
    text = documentation()[0]
    check = check_data(["nothing of it"], [text, text.upper(), documentation()[1]])
    assert signals(check)["repeated-validation"].numbers["documents"] == 1


def test_boilerplate_of_every_document_names_none():
    """A licence in all of them is no copy of any, but counts in the share of n-grams that training
    has.
    """
    licence = " ".join(f"term{number}" for number in range(40))
    valid = [
        f"{licence} {' '.join(f'own{number}x{word}' for word in range(200))}"
        for number in range(150)
    ]
    check = check_data([licence], valid)
    assert check.leaked == [] and 0.1 < check.ngram_overlap < 0.2


def test_a_document_in_pieces_is_dropped_from_training():
    """Its thirds in three others: none has half of it, all of them do."""
    generator = random.Random(2)
    text = [f"w{generator.randrange(10**6)}" for _ in range(120)]
    own = [" ".join(f"o{generator.randrange(10**6)}" for _ in range(80)) for _ in range(3)]
    train = [
        Text(str(third), f"{own[third]}\n\n{' '.join(text[40 * third : 40 * third + 40])}")
        for third in range(3)
    ]
    index = Index([Text("v", " ".join(text))])
    assert [leak.kind for leak in leaks(index, scan_texts(index, train))] == ["contained"]
    left = list(without_leaks(lambda: train, index))
    assert [part.text.strip() for part in left] == own and not leaks(index, scan_texts(index, left))


@linux_only
def test_workers_end_with_whoever_started_them(tmp_path):
    code = f"""
import sys, time
sys.path[:0] = {[path for path in sys.path if path]!r}
from perplexity.data_checks import check_data
def texts():
    for number in range(10**9):
        yield "some words " * 50_000
        print(number, flush=True)
check_data(texts(), ["v a l i d"], workers=2)
"""
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(6):
        job.stdout.readline()
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(children) >= 2
    # A descriptor of a process can be read once the process has ended, reaped or not.
    ends = [os.pidfd_open(int(child)) for child in children]
    job.kill()
    job.wait()
    try:
        assert all(select.select([end], [], [], HANG)[0] for end in ends)
    finally:
        for end in ends:
            os.close(end)


def test_what_would_leak_is_dropped_from_training():
    valid = documentation()[:50]
    index = Index([Text(str(number), text) for number, text in enumerate(valid)])
    kept = "a paragraph of its own that stands in no validation text and has to stay"
    train = [
        Text("whole", valid[3].lower()),
        Text("part", f"{kept}\n\n{valid[7]}\n\n{kept} too"),
        Text("clean", sources()[0]),
    ]
    left = list(without_leaks(lambda: train, index))
    assert [text.id for text in left] == ["part", "clean"]
    assert re.split(r"\n\s*\n", left[0].text.strip()) == [kept, f"{kept} too"]
    assert not leaks(index, scan_texts(index, left))


def test_a_shard_runs_under_an_engine(tmp_path):
    """datatrove's local executor, in processes of its own; run again it does nothing that is
    done.
    """
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
        content = "".join(
            json.dumps({"text": text, "id": f"{shard}.{row}"}) + "\n"
            for row, text in enumerate(rows)
        )
        (tmp_path / "train" / f"{shard}.jsonl").write_text(content)
    (tmp_path / "job.py").write_text(code)
    done = run(sys.executable, "job.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "15 [0, 7, 14]"


DISGUISES = {
    "a tag on every line": lambda text: "\n".join(
        f'<p class="x">{line}</p><br/>' for line in text.split("\n")
    ),
    "a tag on every word": lambda text: " ".join(
        f"<span>{word}</span>" for word in text.split(" ")
    ),
    "a comment on every line": lambda text: "\n".join(
        f"<!-- {i} -->{t}" for i, t in enumerate(text.split("\n"))
    ),
    "a Cyrillic a": lambda text: text.replace("a", "\u0430"),
    "Cyrillic letters": lambda text: text.translate(
        str.maketrans("aeopcxy", "\u0430\u0435\u043e\u0440\u0441\u0445\u0443")
    ),
    "a Greek o": lambda text: text.replace("o", "\u03bf"),
    "bold letters": lambda text: "".join(
        chr(ord(c) + 0x1D3B9) if "a" <= c <= "z" else c for c in text
    ),
    "zero-width spaces": "\u200b".join,
}


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
def test_a_disguise_does_not_hide_a_copy(disguise):
    letters = random.Random(0)
    names = [
        "".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=letters.randint(3, 9)))
        for _ in range(2000)
    ]
    texts = [
        "\n".join(" ".join(letters.choices(names, k=10)) for _ in range(20)) for _ in range(10)
    ]
    leaked = check_data(map(disguise, texts[:5]), texts).leaked
    assert [leak.document for leak in leaked] == [0, 1, 2, 3, 4]


WORDS = [f"w{number}" for number in range(40)]
QUOTED = " ".join(WORDS[:13])


@pytest.mark.parametrize(
    ("paragraphs", "kept"),
    {
        "inside": (["own words", f"as is said: {QUOTED}!", "more of them"], [0, 2]),
        "in another form": ([QUOTED.upper().replace(" ", ",\n"), "own words"], [1]),
        "a word less": ([" ".join(WORDS[:12]), "own words"], [0, 1]),
        "over two paragraphs": ([" ".join(WORDS[:9]), " ".join(WORDS[9:20])], [0]),
        "once one between is dropped": ([" ".join(WORDS[:9]), QUOTED, " ".join(WORDS[9:20])], [0]),
        "nothing else": ([QUOTED], []),
    }.values(),
)
def test_no_ngram_of_validation_is_quoted(paragraphs, kept):
    index = Index([Text("v", " ".join(WORDS))])
    left = list(without_quotations([Text("t", "\n\n".join(paragraphs))], index))
    assert len(left) == bool(kept)
    parts = [part for text in left for part in re.split(r"\n\s*\n", text.text) if part.strip()]
    assert parts == [paragraphs[place] for place in kept]
    assert not scan_texts(index, left).seen.any()
