"""The table of tests/mutants.py is that of this tree and of docs/testing.md."""

import mutants
import pytest

ALL = [mutant for one in mutants.MUTANTS.values() for mutant in one]


@pytest.mark.parametrize("mutant", ALL, ids=[mutant.what for mutant in ALL])
def test_what_it_changes_occurs_once(mutant):
    assert mutants.changed(mutant, mutants.ROOT) != (mutants.ROOT / mutant.file).read_text()


def test_its_test_is_there():
    for mutant in ALL:
        file, _, test = mutant.tests.partition("::")
        assert f"def {test}" in (mutants.ROOT / file).read_text(), mutant


def test_one_that_does_not_occur_once_is_an_error(tmp_path):
    for text, count in (("nothing", 0), ("old old", 2)):
        (tmp_path / "file").write_text(text)
        with pytest.raises(ValueError, match=f"a change: 'old' occurs {count} times in file, not once"):
            mutants.changed(mutants.Mutant("a change", "file", "old", "new", ""), tmp_path)


@pytest.mark.parametrize(
    "status, verdict",
    [(0, "SURVIVED"), (1, "red"), (-11, "red"), (None, "red"), (2, "pytest ended with 2"), (5, "pytest ended with 5")],
)
def test_tests_that_did_not_run_are_not_red(monkeypatch, status, verdict):
    monkeypatch.setattr(mutants, "pytest", lambda way, tests, mutant: (status, "output"))
    assert mutants.judge(mutants.UNIT, ALL[0])[0] == verdict


def test_the_page_has_the_table():
    page = (mutants.ROOT / "docs/testing.md").read_text()
    assert mutants.markdown() in page, "python -c 'import mutants; print(mutants.markdown())' in tests/"
