"""The rules of the ledger on made figures, the claims against the article's list, and the ledger against its records."""
import json
import math
import re

import pytest
import torch

from nbutils import verdicts
from nbutils.experiment import get_task
from nbutils.records import Interval, mean_interval
from nbutils.verdicts import CLAIMS, LEAST, VERDICTS, Claim, Finding, absence, agreement, difference, gap_agreement, share, share_interval

HALF = 4.302652730 * 1 / math.sqrt(3)                      # of three values with standard deviation 1: 2.484


# --- rules ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("published, better, verdict", [
    (10.0, "lower", "held"), (10 + 0.99 * HALF, "lower", "held"), (10 - 0.99 * HALF, "lower", "held"),
    (10 - 1.01 * HALF, "lower", "failed"), (10 + 1.01 * HALF, "lower", "held"),          # ours is better
    (10 - 1.01 * HALF, "higher", "held"), (10 + 1.01 * HALF, "higher", "failed")])
def test_agreement(published, better, verdict):
    found = agreement([9.0, 10.0, 11.0], published, better=better)
    assert (found.verdict, found.n) == (verdict, 3)
    assert found.figure == "10.00 ± 2.48 %"


@pytest.mark.parametrize("rule", [lambda n: agreement([1.0] * n, 1.0), lambda n: share([True] * n, 0.5),
                                  lambda n: difference(Interval(-1.0, 0.1, n)), lambda n: gap_agreement(Interval(-1.0, 0.1, n), -1.0),
                                  lambda n: absence({"a": Interval(1.0, 0.1, n)})],
                         ids=["agreement", "share", "difference", "gap_agreement", "absence"])
def test_fewer_than_three_say_nothing(rule):
    assert LEAST == 3
    assert [rule(n).verdict for n in (1, 2)] == ["not run"] * 2 and rule(3).verdict == "held"
    assert rule(2).n == 2 and "2" in rule(2).figure


def test_nothing_at_all_says_nothing():
    for found in (agreement([], 1.0), share([], 0.5), difference(None), gap_agreement(None, 1.0), absence({}), absence({"a": None})):
        assert found == Finding("", 0, "not run")


@pytest.mark.parametrize("mean, verdict", [(-1.0, "held"), (1.0, "failed"), (-0.4, "weaker"), (0.4, "weaker")])
def test_difference(mean, verdict):
    found = difference(Interval(mean, 0.5, 5), scale=100)
    assert found.verdict == verdict and found.figure == f"{100 * mean:+.2f} ± 50.00 points"


@pytest.mark.parametrize("mean, half, published, verdict", [
    (0.02, 0.27, 0.65, "failed"), (0.5, 0.2, 0.65, "held"), (0.3, 0.2, 0.65, "weaker"), (-0.3, 0.2, 0.65, "failed"),
    (0.1, 0.2, 0.25, "held"), (1.2, 0.2, 0.65, "weaker")])
def test_published_gap(mean, half, published, verdict):
    assert gap_agreement(Interval(mean / 100, half / 100, 5), published, scale=100).verdict == verdict


@pytest.mark.parametrize("k, n, low, high", [(0, 3, 0.0, 0.7076), (1, 5, 0.0051, 0.7164), (5, 5, 0.4782, 1.0), (7, 20, 0.1539, 0.5922)])
def test_clopper_pearson(k, n, low, high):
    assert share_interval(k, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("k, n", [(-1, 3), (4, 3), (0, 0)])
def test_impossible_shares_are_refused(k, n):
    with pytest.raises(ValueError, match="give 0 <= k <= n"):
        share_interval(k, n)


@pytest.mark.parametrize("k, n, claimed, verdict", [(5, 5, 1.0, "held"), (1, 5, 0.5, "held"), (0, 3, 0.05, "held"), (1, 20, 0.5, "failed"),
                                                    (19, 20, 0.5, "held"), (4, 5, 1.0, "failed")])
def test_share(k, n, claimed, verdict):
    assert share([True] * k + [False] * (n - k), claimed).verdict == verdict


def test_a_share_that_is_said_to_be_rare_fails_if_it_is_not():
    """'Once in twenty' is no praise: twenty of twenty does not keep it."""
    assert share([True] * 20, 0.05).verdict == "held"
    assert share([True] * 20, 0.05, or_more=False).verdict == "failed"
    assert share([False] * 3, 0.05, or_more=False).verdict == share([True] + [False] * 19, 0.05, or_more=False).verdict == "held"


@pytest.mark.parametrize("claimed", [94, -0.1, math.nan])
def test_a_claimed_share_that_is_none_is_refused(claimed):
    with pytest.raises(ValueError, match=f"claimed is {claimed}: give a share"):
        share([True] * 3, claimed)


def test_never_falls_with_one_counter_example():
    still = {str(i): Interval(0.0, 0.1, 5) for i in range(9)}
    assert absence(still).verdict == "held"
    assert absence(still | {"helps": Interval(-1.0, 0.1, 5)}).verdict == "failed"
    assert "helps" in absence(still | {"helps": Interval(-1.0, 0.1, 5)}).figure
    assert absence(still | {"harms": Interval(1.0, 0.1, 5)}).verdict == "held"
    assert absence(still | {"two": Interval(-9.0, 0.1, 2)}).verdict == "held"            # two pairs say nothing


def test_never_is_widened_for_the_number_of_comparisons():
    edge = {"a": Interval(-1.0, 0.9, 5)}                                                  # alone its sign is known
    assert absence(edge).verdict == "failed"
    assert absence(edge | {str(i): Interval(0.0, 0.1, 5) for i in range(9)}).verdict == "held"


def test_false_alarms_of_never_are_rare():
    """Of 400 worlds in which nothing ever helps, with eight comparisons each, about one in forty is judged wrongly (one side)."""
    draws = torch.randn(400, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alarms = sum(absence({str(i): mean_interval(v) for i, v in enumerate(world)}).verdict == "failed" for world in draws.tolist())
    assert 2 <= alarms <= 20


def test_a_verdict_is_one_of_four():
    assert VERDICTS == ("held", "weaker", "failed", "not run")
    with pytest.raises(ValueError, match="give one of"):
        Finding("", 1, "undecided")


# --- computed claims can fail ----------------------------------------------------------------------
def test_computed_claims_hold():
    for claim in CLAIMS:
        if not claim.size:
            assert claim.judge().verdict == "held", claim.name


@pytest.mark.parametrize("judge, name, wrong", [
    ("_sgd_same", "SGD", lambda p, l2=0.0, weight_decay=0.0, **h: torch.optim.SGD(p, weight_decay=l2 + 1.001 * weight_decay, **h)),
    ("_adam_differs", "Adam", lambda p, l2=0.0, **h: verdicts.AdamW(p, weight_decay=l2, **h)),
    ("_adam_differs", "AdamW", lambda p, weight_decay=0.0, **h: verdicts.Adam(p, l2=weight_decay, **h)),
    ("_momentum_differs", "SGD", lambda p, l2=0.0, weight_decay=0.0, **h: torch.optim.SGD(p, weight_decay=l2 + weight_decay, **h))],
    ids=["sgd", "adam-l2-as-decay", "adamw-as-l2", "momentum-l2-alone"])
def test_computed_claims_fail_with_another_optimizer(monkeypatch, judge, name, wrong):
    monkeypatch.setattr(verdicts, name, wrong)
    assert getattr(verdicts, judge)().verdict == "failed"


def test_proof_fails_if_amsgrad_does(monkeypatch):
    monkeypatch.setattr(verdicts, "counterexample", lambda variant, steps, **more: {"x": [1.0]})
    assert verdicts._amsgrad_proof().verdict == "failed"


# --- claims and ledger -----------------------------------------------------------------------------
ARTICLE = ("sgd-same momentum-differs adam-differs adamw-30 adam-l2-30 adamw-18-tta adam-18-tta sgd-30 super-convergence beta2 "
           "beta1-cycle wd-scale wd-not-always amsgrad-noise adam-vs-sgd cars-60 lm-90 amsgrad-proof").split()


def test_every_claim_of_the_article_has_a_line():
    names = [claim.name for claim in CLAIMS]
    assert set(ARTICLE) <= set(names) and len(set(names)) == len(names)
    assert all(re.search(r"[.)]$", claim.says) for claim in CLAIMS)


@pytest.fixture
def figures(monkeypatch):
    """Give the ledger made figures: {(task, size, row): values of every metric}."""
    def give(made):
        monkeypatch.setattr(verdicts, "_values", lambda task, row, metric, size="full", scale=100.0:
                            [scale * v for v in made.get((task, size, row), [])])
        monkeypatch.setattr(verdicts, "_gap", lambda task, row, other, metric, size="full":
                            mean_interval([a - b for a, b in zip(made[task, size, row], made[task, size, other])])
                            if {(task, size, row), (task, size, other)} <= set(made) else None)
        return {claim.name: claim.judge() for claim in CLAIMS if claim.size and "no rows" not in claim.judge().figure}
    return give


def test_the_rare_share_of_the_article_can_fail(figures):
    assert figures({("cifar10", "full", "adam-l2-18"): [0.05] * 9})["adam-18-tta"].verdict == "failed"
    assert figures({("cifar10", "full", "adam-l2-18"): [0.07] * 9})["adam-18-tta"].verdict == "held"


def test_decay_is_held_against_l2_and_against_none(figures):
    """At the article's size whole pictures count, and not the crops alone."""
    rows = {"adamw": [0.10, 0.11, 0.12, 0.10], "adam-l2": [0.15, 0.16, 0.17, 0.151], "wd0": [0.10, 0.112, 0.119, 0.10]}
    found = figures({("cars", "full", row): values for row, values in rows.items()})
    assert found["wd-not-always"].verdict == "failed" and "whole cars" in found["wd-not-always"].figure
    assert found["wd-or-none"].verdict == "held" and found["wd-not-always-laptop"].verdict == "not run"


@pytest.mark.parametrize("l2, decay, verdict", [("1e-6", "3e-1", "held"), ("1e-6", "1e-1", "weaker"), ("1e-4", "3e-1", "weaker"),
                                                ("1e-5", "3e-2", "failed")])
def test_the_grids_judge_the_best_coefficients(figures, l2, decay, verdict):
    cells = [c for c in get_task("cifar10").configs if c.size == "full" and c.row.startswith("grid-")]
    best = {f"grid-adam-l2-{l2}-lr-3e-3", f"grid-adamw-wd-{decay}-lr-1e-3"}
    made = {("cifar10", "full", c.row): [0.07 if c.row in best else 0.08] for c in cells}
    assert len(made) == 12 and figures(made)["wd-scale"] == Finding(f"best L2 {float(l2):g}, best decay {float(decay):g}", 12, verdict)
    made.pop(("cifar10", "full", "grid-adamw-wd-3e-2-lr-1e-3"))
    assert figures(made)["wd-scale"] == Finding("the grid of weight_decay is not complete", 11, "not run")


def test_a_line_without_rows_says_so():
    found = {claim.name: claim.judge() for claim in CLAIMS}
    assert {name for name, f in found.items() if f.figure == "no rows yet"} == {"super-convergence", "beta2", "beta1-cycle", "adam-vs-sgd"}


def test_links_lead_to_rows_or_chapters():
    from pathlib import Path

    chapters = {p.stem for p in (Path(__file__).resolve().parent.parent / "nbs").glob("*.ipynb")}
    for claim in CLAIMS:
        task, _, rest = claim.link.partition("-")
        if task in ("cifar10", "cars", "wikitext2"):
            size, _, row = rest.partition("-")
            assert get_task(task).config(row, size) and size == claim.size
        else:
            assert claim.link in chapters, claim.link


def test_without_records_nothing_is_judged(monkeypatch, tmp_path):
    monkeypatch.setenv("NBUTILS_RECORDS", str(tmp_path))
    for claim, found in verdicts.ledger():
        assert found.verdict == ("not run" if claim.size else "held"), claim.name


@pytest.fixture
def made(monkeypatch, tmp_path):
    """A folder of records of AdamW with made errors."""
    monkeypatch.setenv("NBUTILS_RECORDS", str(tmp_path))
    real = next(iter(sorted((verdicts_records()).glob("cifar10/full/adamw-30/*.json"))))

    def write(errors):
        for seed, error in enumerate(errors):
            record = json.loads(real.read_text())
            record |= {"seed": seed}
            record["metrics"]["error"] = error / 100
            path = tmp_path / "cifar10" / "full" / "adamw-30" / f"{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record))
        return {claim.name: found for claim, found in verdicts.ledger()}
    return write


def verdicts_records():
    from pathlib import Path

    return Path(__file__).resolve().parent.parent / "book" / "records"


def test_ledger_follows_its_records(made):
    good = made([5.6, 5.7, 5.8, 5.9, 5.5])
    assert good["adamw-30"].verdict == good["adamw-30-mean"].verdict == "held"
    assert good["adamw-30-mean"].figure == "5.70 ± 0.20 %"
    bad = made([6.6, 6.7, 6.8, 6.9, 6.5])
    assert bad["adamw-30"].verdict == bad["adamw-30-mean"].verdict == "failed"
    assert bad["adamw-30"].figure.startswith("0 of 5")


def test_table_and_tally(made):
    made([5.6, 5.7, 5.8])
    lines = verdicts.ledger()
    table, counts = verdicts.ledger_table(lines), verdicts.tally(lines)
    assert len(table.rows) == len(CLAIMS) == sum(counts.values()) and list(counts) == list(VERDICTS)
    row = next(row for row in table.rows if row[0].text.startswith("The mean error of AdamW is 5.66"))
    assert [c.text for c in row[1:]] == ["full", "5.70 ± 0.25 %", "3", "held"]
    assert row[2].link == "../book/runs.html#cifar10-full-adamw-30"
    assert table.rows[0][2].link == "01-sgd.html"
    unseen = next(row for row in table.rows if row[0].text.startswith("90 % on Stanford Cars"))
    assert (unseen[2].text, unseen[2].link, unseen[4].text) == ("–", "", "not run")     # no link on a dash
    assert isinstance(lines[0][0], Claim)


# --- what the lines say ------------------------------------------------------------------------
def test_never_says_in_what_its_difference_is():
    """A difference without a unit was read as points where it was per cent of the error."""
    gaps = {"cropped cars": Interval(-0.0234, 0.0064, 3)}
    assert absence(gaps).figure == "1 comparison, the lowest -2.34 ± 0.64 % (cropped cars)"
    assert absence(gaps, unit="points").figure.endswith("0.64 points (cropped cars)")


def test_computed_lines_state_their_settings():
    found = {claim.name: claim.judge().figure for claim in CLAIMS if not claim.size}
    assert "after 50 steps at lr 0.1, coefficient 0.03, momentum 0.9" in found["momentum-differs"]
    assert found["amsgrad-proof"].startswith("after 50,000 steps ")


def test_a_change_in_per_cent_counts_rows_of_different_levels_alike(monkeypatch):
    """exp(mean of the logarithms' differences) - 1, over the seeds that both rows of a pair have."""
    class Run:
        def __init__(self, row, seed, value):
            self.row, self.seed, self.metrics = row, seed, {"test": value}

    runs = [Run("a", s, v) for s, v in enumerate((100.0, 110.0, 90.0))]
    runs += [Run("a-amsgrad", s, v * 1.03) for s, v in enumerate((100.0, 110.0))]
    runs += [Run("b", 0, 20.0), Run("b-amsgrad", 0, 20.0 * 1.03)]
    monkeypatch.setattr(verdicts, "_records", lambda task, size: runs)
    pairs = [("a-amsgrad", "a"), ("b-amsgrad", "b")]
    found = verdicts._log_change("wikitext2", pairs, "test", "laptop")
    assert found.n == 3 and found.mean == pytest.approx(3.0) and found.half == pytest.approx(0, abs=1e-9)
    runs[-1].metrics["test"] = 20.0 * 1.03**4
    found = verdicts._log_change("wikitext2", pairs, "test", "laptop")
    logs = [math.log(1.03)] * 2 + [4 * math.log(1.03)]
    assert found.mean == pytest.approx(100 * math.expm1(math.fsum(logs) / 3))
    low, high = (100 * math.expm1(mean_interval(logs).mean + s * mean_interval(logs).half) for s in (-1, 1))
    assert found.half == pytest.approx((high - low) / 2)
    assert verdicts._log_change("wikitext2", [("c-amsgrad", "c")], "test", "laptop") is None
