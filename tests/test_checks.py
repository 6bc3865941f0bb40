"""Lies in records: each is caught, and named, and a sound record counts."""
import copy
import json
import math

import pytest
from sound_records import sound, write

from nbutils.checks import check_record
from nbutils.command import main
from nbutils.experiment import SIZES, TASKS, get_task
from nbutils.records import config_hash, read_record


def every_cell():
    return [(name, c.row, c.size) for name in TASKS for c in get_task(name).configs]


def test_every_row_can_have_a_sound_record(tmp_path):
    """A check that a true run of some row would fail is no check; smoke rows are run for true in test_shards."""
    cells = every_cell()
    assert {name for name, *_ in cells} == set(TASKS) and {size for *_, size in cells} == set(SIZES)
    for name, row, size in cells:
        path = write(tmp_path, sound(name, row, size, 3))
        verdict = check_record(path, tmp_path)
        assert verdict.counts and str(verdict) == f"{path}: this record counts for {name} {row} ({size}), seed 3"
        assert read_record(path) == verdict.record


def edited(change):
    fields = copy.deepcopy(sound(seed=7))
    change(fields)
    return fields


def set_in(*path, to):
    def change(fields):
        for key in path[:-1]:
            fields = fields[key]
        fields[path[-1]] = to
    return change


def rehash(fields):
    fields["config_hash"] = config_hash(fields["config"])


def settings_changed_with_their_hash(fields):
    fields["config"]["lr"] = 0.01
    rehash(fields)


LIES = {
    "a better error": (set_in("metrics", "error", to=0.02), "metrics.error is 0.02, and after the last epoch it was 0.05"),
    "an error in per cent": (set_in("metrics", "error", to=5.66), "metrics.error is 5.66, not a number from 0.0 to 1.0"),
    "a better loss": (set_in("metrics", "loss", to=0.01), "metrics.loss is 0.01, and after the last epoch"),
    "an error as text": (set_in("metrics", "error", to="0.05"), "metrics.error is '0.05', not a finite number"),
    "a figure less": (lambda f: f["metrics"].pop("loss"), "metrics.loss is missing, and its row measures it"),
    "a NaN": (set_in("metrics", "loss", to=math.nan), "metrics.loss is nan, not a finite number"),
    "an infinity in the history": (set_in("history", 3, "loss", to=math.inf), "history[3].loss is inf"),
    "settings without their hash": (set_in("config", "lr", to=0.01), "the settings hash to"),
    "settings with their hash": (settings_changed_with_their_hash, "the learning rate of the curve peaks at 0.003, that of the settings at 0.01"),
    "a truncated history": (lambda f: f["history"].pop(), "the history has 29 epochs, and the settings ask for 30"),
    "an epoch twice": (lambda f: f["history"].insert(4, f["history"].pop(3)), "history[3].epoch is 5, not 4"),
    "an epoch without its loss": (lambda f: f["history"][2].pop("loss"), "the field history[2].loss is missing"),
    "text in the history": (set_in("history", 2, "loss", to="low"), "history[2].loss is 'low', not a finite number"),
    "no history": (set_in("history", to=[]), "the history has 0 epochs"),
    "an epoch in no time": (set_in("history", 0, "seconds", to=0.0), "history[0] took no time"),
    "fewer seconds": (set_in("seconds", to=12.0), "seconds is 12.0, and the epochs took 330.0"),
    "an uneven curve": (lambda f: f["curve"]["lr"].pop(), "curve does not have step, loss, lr and momentum at the same steps"),
    "a curve that goes back": (lambda f: f["curve"]["step"].reverse(), "curve.step does not rise from 0"),
    "another momentum": (set_in("curve", "momentum", 0, to=0.99), "the momentum of the curve goes from 0.85 to 0.99"),
    "a better loss in the middle": (set_in("history", 3, "loss", to=0.05), "history[3].loss is 0.05, and its steps had 0.4 to 0.667"),
    "a valid loss beyond any": (set_in("history", 3, "valid_loss", to=1e300), "history[3].valid_loss is 1e+300, not a number from 0.0 to"),
    "an accuracy of seven": (set_in("history", 3, "accuracy", to=7), "history[3].accuracy is 7, not a number from 0.0 to 1.0"),
    "a rate that the curve did not have": (set_in("history", 3, "lr", to=5), "history[3].lr is 5, and the curve is between"),
    "a momentum below zero": (set_in("history", 3, "momentum", to=-3), "history[3].momentum is -3, not a number from 0.0"),
    "a momentum that the curve did not have": (set_in("history", 3, "momentum", to=0.95), "history[3].momentum is 0.95, and the curve is between"),
    "a loss of the curve": (set_in("curve", "loss", 5, to=-1.0), "curve.loss[5] is -1.0, not a number from 0.0"),
    "a column more": (set_in("history", 3, "f1", to=0.5), "the field history[3].f1 is unknown"),
    "a figure more": (set_in("metrics", "f1", to=0.5), "the field metrics.f1 is unknown"),
    "another row": (set_in("row", to="sgd-30"), "row is 'sgd-30', but its settings say 'adamw-30'"),
    "a row that leaves the folder": (lambda f: (f.update(row="../../x"), f["config"].update(row="../../x"), rehash(f)), "row is '../../x', not a name of letters, digits"),
    "another size": (set_in("size", to="colab"), "size is 'colab', but its settings say 'full'"),
    "an unknown task": (lambda f: (f.update(task="cifar11"), f["config"].update(task="cifar11"), rehash(f)), "unknown task 'cifar11'"),
    "a seed that is a truth value": (set_in("seed", to=True), "seed is True, not a whole number from 0 to "),
    "a negative seed": (set_in("seed", to=-1), "seed is -1, not a whole number from 0 to "),
    "a field less": (lambda f: f.pop("device"), "the field device is missing"),
    "a field more": (set_in("note", to="trust me"), "the field note is unknown"),
    "an empty device": (set_in("device", to=" "), "device is ' ', not a line of at most 100 letters"),
    "versions without torch": (lambda f: f["versions"].pop("torch"), "the field versions.torch is missing"),
    "a precision that does not exist": (set_in("precision", to="fp8"), "precision is 'fp8'"),
    "a commit that is none": (set_in("commit", to="main"), "commit is 'main', not 40 hexadecimal digits"),
    "a code hash that is none": (set_in("code_hash", to="?"), "code_hash is '?'"),
    "a start to come": (set_in("started", to="2999-01-01T00:00:00+00:00"), "started is 2999-01-01T00:00:00+00:00, which is still to come"),
    "a start without a zone": (set_in("started", to="2026-11-26T10:00:00"), "not a time with its zone"),
    "a day that there is not": (set_in("started", to="2026-02-30T10:00:00+00:00"), "and there is no such time"),
    "a start that is no time": (set_in("started", to="yesterday"), "not a time with its zone"),
}


@pytest.mark.parametrize("name", LIES)
def test_lie(name, tmp_path):
    change, said = LIES[name]
    path = write(tmp_path, edited(change), name="sent.json")
    verdict = check_record(path)
    assert not verdict.counts and any(said in p for p in verdict.problems), verdict
    assert str(verdict).endswith("Send the file as the run wrote it, or run the cell again.")


@pytest.mark.parametrize("text, said", [
    ("{", "not JSON"), ("[]", "it is [], where named fields are expected"), ("null", "it is None, where named fields"), ("{}", "the field task is missing"), ('{"seed": 1, "seed": 2}', "a name stands twice")])
def test_no_record(text, said, tmp_path):
    path = tmp_path / "7.json"
    path.write_text(text)
    assert any(said in p for p in check_record(path).problems)
    path.write_bytes(b"\xff\xfe")
    assert "not JSON" in check_record(path).problems[0]
    assert "cannot be read: No such file" in check_record(tmp_path / "8.json").problems[0]


def test_perplexity_that_its_history_denies(tmp_path):
    fields = sound("wikitext2", "lstm-adam", "laptop")
    fields["metrics"]["valid"] *= 0.8
    (problem,) = check_record(write(tmp_path, fields)).problems
    assert problem.startswith("metrics.valid is ") and "after the last epoch it was" in problem
    for name, to in (("valid_2018", 2.0), ("test_2018", 2.0), ("valid_cache", 0.5)):
        fields = sound("wikitext2", "lstm-adam", "laptop")
        fields["metrics"][name] = to
        (problem,) = check_record(write(tmp_path, fields)).problems
        assert problem.startswith(f"metrics.{name} is {to:g}, ")


def test_stale_is_no_lie(tmp_path):
    """Another recipe, other settings, a row that is gone: sound, listed, and counts in no table."""
    def stale(**changes):
        fields = sound(**changes.pop("of", {}))
        for key, value in changes.items():
            fields["config"][key] = value
        fields["row"] = fields["config"]["row"]
        rehash(fields)
        return fields

    for fields, why in ((sound(recipe=get_task("cifar10").recipe + 1), "recipe"), (stale(tail=0.5), "its row has other settings now"),
                        (stale(row="adamw-31"), "the task has no such row now")):
        verdict = check_record(write(tmp_path, fields), tmp_path)
        assert not verdict.problems and not verdict.counts and why in verdict.stale
        assert "which does not count" in str(verdict) and "run the cell again" in str(verdict)


def test_its_place_among_others(tmp_path):
    here = tmp_path / "records"
    own = write(here, sound(seed=0))
    assert check_record(own, here).counts
    sent = write(tmp_path, sound(seed=0), name="0.json")
    assert check_record(sent, here).counts                                             # the very same: nothing to object to
    other = sound(seed=0)
    other["history"][0]["loss"] = 1.75                                                 # its steps had 1 to 2
    write(tmp_path, other, name="0.json")
    (problem,) = check_record(sent, here).problems
    assert problem == f"there is another record at {own}: take a seed that is free"
    write(tmp_path, sound(seed=0, **{"started": "2026-11-27T10:00:00+00:00"}) | {"seed": 1}, name="1.json")
    (problem,) = check_record(tmp_path / "1.json", here).problems
    assert problem == "its history is that of seed 0 to the last digit: one is a copy"
    wrong = write(here, sound(seed=2), name="cifar10/full/adam-l2-30/2.json")
    (problem,) = check_record(wrong, here).problems
    assert problem == "it lies in another cell's place: its own is cifar10/full/adamw-30/2.json"
    (here / "cifar10/full/adamw-30/5.json").write_text("damaged")                      # not this record's fault
    assert check_record(own, here).counts


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NBUTILS_RECORDS", str(tmp_path / "records"))
    good = write(tmp_path, sound(seed=7), name="7.json")
    bad = write(tmp_path, edited(set_in("metrics", "error", to=0.01)), name="bad.json")
    assert main(["check", str(good)]) == 0
    assert capsys.readouterr().out == f"{good}: this record counts for cifar10 adamw-30 (full), seed 7\n"
    assert main(["check", str(good), str(bad), str(tmp_path / "none.json")]) == 1
    out = capsys.readouterr().out
    assert "seed 7\n" in out and f"{bad}: not accepted for cifar10 adamw-30 (full), seed 7:\n  metrics.error is 0.01" in out
    assert "none.json: not accepted:\n  it cannot be read" in out
    old = json.loads(good.read_text()) | {"recipe": 999}
    assert main(["check", str(write(tmp_path, old, name="old.json"))]) == 1
    assert "does not count: it was made by recipe 999" in capsys.readouterr().out


# --- a stranger's file may hold anything ------------------------------------------------------------
ODD = (None, "x", -1, 0, 1e300, 10**400, [], {}, [1], {"a": 1}, True, [None], ["x"], [[]])


def places(value, where=()):
    """The ways to all values of a nested record, of long lists the first two."""
    yield where
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, v in inner:
        yield from places(v, (*where, key))


@pytest.mark.parametrize("cell", [("cifar10", "adamw-30", "laptop"), ("cars", "crops-adamw", "laptop"), ("wikitext2", "lstm-adam", "laptop")],
                         ids=lambda cell: cell[0])
def test_any_value_in_any_place_ends_in_a_sentence(cell, tmp_path):
    """With a hash that fits, so that the settings themselves are what is odd."""
    told, whole = 0, json.loads(write(tmp_path, sound(*cell, 3)).read_text())
    for where in list(places(whole))[1:]:
        for odd in ODD:
            fields = copy.deepcopy(whole)
            set_in(*where, to=odd)(fields)
            if where[0] == "config" and isinstance(fields["config"], dict):
                rehash(fields)
            path = tmp_path / "sent.json"
            path.write_text(json.dumps(fields))
            verdict = check_record(path, tmp_path)
            assert str(path) in str(verdict)
            told += not verdict.counts
    assert told > 500


@pytest.mark.parametrize("where, to, said", [
    (("config", "lr"), "0.003", "the settings' lr is '0.003', not a finite number"),
    (("config", "momentum"), 0.9, "the settings' momentum is 0.9, where a list is expected"),
    (("curve", "lr", 1), None, "curve.lr[1] is None, not a finite number"),
    (("metrics", "loss"), 10**400, "metrics.loss is a number of 401 digits, not a finite number")],
    ids=["rate", "momentum", "curve", "digits"])
def test_what_is_no_number_is_named(where, to, said, tmp_path):
    fields = edited(set_in(*where, to=to))
    rehash(fields)
    assert said in str(check_record(write(tmp_path, fields)))


def test_divisors_of_rates_are_looked_at(tmp_path):
    for to, said in (([], " has 0 entries"), ([0, 3, 1], "[0] is 0, not a number from"), (9, " is 9, where a list is expected"),
                     (["9", 3, 1], "[0] is '9', not a number")):
        fields = copy.deepcopy(sound("cars", "crops-adamw", "laptop", 3))
        fields["config"]["divide"] = to
        rehash(fields)
        assert f"the settings' divide{said}" in str(check_record(write(tmp_path, fields)))


def test_a_file_nested_too_deep_is_no_record(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000)
    assert "it is not JSON" in str(check_record(path))
