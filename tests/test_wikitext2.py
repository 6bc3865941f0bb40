"""WikiText-2: words to numbers, streams, rows, scores; and the real corpus where it is at hand."""
import dataclasses
import math

import pytest
import torch

from nbutils import experiment, wikitext2
from nbutils.cache_pointer import perplexity
from nbutils.core import seed_everything
from nbutils.experiment import get_task, run
from nbutils.files import ChecksumError, data_home
from nbutils.optimizer import NonFiniteError
from nbutils.schedule import values
from nbutils.wikitext2 import (
    ROWS,
    Corpus,
    Streams,
    Vocabulary,
    Wikitext2Config,
    build,
    corpus_of,
    help_topics,
    load_wikitext2,
    make_model,
    make_optimizer,
    sample,
    score,
)

task = get_task("wikitext2")
REAL = data_home() / "wikitext-2" / "train.txt"


@pytest.fixture(scope="module")
def topics():
    return help_topics()


@pytest.fixture
def small(monkeypatch, topics):
    """Files of a tiny corpus with checksums of their own, where WikiText-2's would lie."""
    import hashlib

    def write(root, **texts):
        folder = root / "wikitext-2"
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"train": " the cat \n\n the hat <unk> \n", "valid": " the hat \n", "test": " the cat \n"} | texts
        for split, text in texts.items():
            (folder / f"{split}.txt").write_text(text, encoding="utf-8")
        sums = {split: hashlib.sha256(text.encode()).hexdigest() for split, text in texts.items()}
        monkeypatch.setattr(wikitext2, "WIKITEXT2_SHA256", sums)
        return folder

    return write


# --- words ---------------------------------------------------------------------------------------
def test_tokens_are_split_and_each_line_ends(small, tmp_path):
    small(tmp_path)
    corpus = load_wikitext2(tmp_path, download_missing=False)
    assert corpus.vocabulary.words == ["<pad>", "the", "cat", "<eos>", "hat", "<unk>"]
    assert corpus.train.tolist() == [1, 2, 3, 3, 1, 4, 5, 3] and corpus.train.dtype == torch.int64
    assert corpus.valid.tolist() == [1, 4, 3] and corpus.test.tolist() == [1, 2, 3]
    again = load_wikitext2(tmp_path, download_missing=False)                      # from the decoded copy
    assert torch.equal(again.train, corpus.train) and again.vocabulary.words == corpus.vocabulary.words


def test_strange_separators_are_no_line_ends():
    """Only a newline ends a line: str.splitlines would end one at U+2028 or a form feed too."""
    words = Vocabulary(["a", "b", "<eos>"])
    assert words.encode("a\u2028b\x0ca\n").tolist() == [1, 2, 1, 3]


def test_decode_is_the_way_back():
    words = Vocabulary(["a", "b", "<eos>"])
    assert words.decode(words.encode("a b\n\nb a\n")) == "a b\n\nb a\n"


@pytest.mark.parametrize("text, message", [
    ("the cat\nthe bat\n", "my.txt, line 2: 'bat' is not in the vocabulary of 4 words"),
    ("", "my.txt is empty"),
])
def test_other_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(["the", "cat", "<eos>"]).encode(text, "my.txt")


def test_a_damaged_file_is_named_with_its_checksum(small, tmp_path):
    folder = small(tmp_path)
    (folder / "valid.txt").write_text("the hat")
    with pytest.raises(ChecksumError, match=r"valid\.txt is damaged.*\n.*expected sha256"):
        load_wikitext2(tmp_path, download_missing=False)
    assert (folder / "valid.txt").exists()


def test_a_missing_file_is_named(small, tmp_path):
    (small(tmp_path) / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.txt is missing: run `nbutils data wikitext2`"):
        load_wikitext2(tmp_path, download_missing=False)


def test_a_split_with_words_of_its_own_is_refused(small, tmp_path):
    small(tmp_path, valid="the hat\nthe dog\n")
    with pytest.raises(ValueError, match=r"valid\.txt, line 2: 'dog' is not"):
        load_wikitext2(tmp_path, download_missing=False)


def test_missing_files_are_fetched_and_checked(small, tmp_path, monkeypatch):
    folder = small(tmp_path / "server")
    monkeypatch.setattr(wikitext2, "WIKITEXT2_URL", f"file://{folder}/{{split}}.txt")
    corpus = load_wikitext2(tmp_path / "home")
    assert len(corpus.train) == 8 and (tmp_path / "home/wikitext-2/train.txt").exists()


def test_cut_makes_rare_words_unknown(topics):
    words = Vocabulary("a b c <unk> <eos>".split())
    corpus = Corpus(words.encode("a a a b b c\na a b b"), words.encode("a b c"), words.encode("c a c"), words)
    cut = corpus.cut(1.0)
    assert cut.vocabulary.words == ["<pad>", "<unk>", "a", "b"]                   # <eos> is too rare here
    assert cut.vocabulary.decode(cut.train) == "a a a b b <unk> <unk> a a b b <unk>"
    assert cut.vocabulary.decode(cut.valid) == "a b <unk> <unk>"
    half = corpus.cut(0.5, at_least=1)
    assert len(half.train) == 6 and half.vocabulary.words == ["<pad>", "<unk>", "a", "b", "c"]
    for share in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="share is"):
            topics.cut(share)
    with pytest.raises(ValueError, match="nothing is left of a text"):
        topics.cut(1e-5)


# --- streams -------------------------------------------------------------------------------------
def test_297_batches_of_about_70():
    streams = Streams(torch.zeros(2_088_628, dtype=torch.int64), 100)
    assert len(streams) == 297
    every = []
    for epoch in range(20):
        streams.set_epoch(epoch)
        lengths = streams.lengths()
        assert len(lengths) == 297 and lengths[0] == 95 and min(lengths) >= 5 and sum(lengths) <= 20_885
        every += lengths[1:]
    lengths = torch.tensor(every).double()
    assert lengths.mean() == pytest.approx(0.95 * 69.5 + 0.05 * 34.5, abs=0.5)     # int() cuts half a word off
    near = lengths[(lengths - 70).abs() < 17]
    assert len(near) / len(lengths) == pytest.approx(0.95, abs=0.01) and near.std() == pytest.approx(5, abs=0.3)


def test_pieces_follow_one_another_and_targets_are_one_later():
    text = torch.arange(6000)
    streams = Streams(text, 4, 20, seed=3)
    read = [x for x, _ in streams]
    for (x, y), (x1, _) in zip(streams, list(streams)[1:]):
        assert torch.equal(y[:-1], x[1:]) and torch.equal(y[-1], x1[0])
    whole = torch.cat(read)
    assert torch.equal(whole, text.view(4, 1500).t()[: len(whole)])


def test_lengths_depend_on_seed_and_epoch_alone():
    def lengths(seed, epoch):
        streams = Streams(torch.zeros(6000, dtype=torch.int64), 4, 20, seed=seed)
        streams.set_epoch(epoch)
        torch.rand(3)
        return streams.lengths()

    assert lengths(0, 0) == lengths(0, 0) != lengths(0, 1) and lengths(0, 1) != lengths(1, 1)


def test_fixed_pieces_read_every_word_once():
    streams = Streams(torch.arange(103), 2, 20, vary=False)
    targets = torch.cat([y for _, y in streams])
    assert len(streams) == len(list(streams)) == 3 and targets.shape == (50, 2)
    assert targets[:, 0].tolist() == list(range(1, 51))


@pytest.mark.parametrize("tokens, streams, steps", [(400, 4, 70), (400, 0, 70), (400, 4, 0), (1, 1, 1)])
def test_too_little_text_is_refused(tokens, streams, steps):
    with pytest.raises(ValueError, match="take fewer streams or shorter pieces|need 10 or more; or give vary=False"):
        Streams(torch.zeros(tokens, dtype=torch.int64), streams, steps)


def test_short_pieces_do_not_vary():
    """At least 5 words a piece would overrun any text where pieces are as short as that."""
    with pytest.raises(ValueError, match="steps is 8: pieces of varied length need 10 or more"):
        Streams(torch.zeros(20_000, dtype=torch.int64), 2, 8)
    assert len(Streams(torch.zeros(20_000, dtype=torch.int64), 2, 10).lengths()) == 999
    assert len(Streams(torch.zeros(200, dtype=torch.int64), 2, 8, vary=False)) == 13


def test_the_published_decay_changes_no_weight_in_float32():
    """1 - 6e-9 is 1 in float32: the article's AdamW is Adam without decay, bit for bit."""
    config = task.config("lstm-adamw", "full")
    paths = []
    for decay in (config.weight_decay, 0.0):
        seed_everything(0)
        p = torch.nn.Parameter(torch.randn(1000))
        optimizer = make_optimizer(dataclasses.replace(config, weight_decay=decay), [p])
        for _ in range(20):
            p.grad = torch.randn(1000)
            optimizer.step()
        paths.append(p.detach())
    assert torch.equal(*paths)


def test_the_timescale_rows_keep_to_the_same_part_of_the_run():
    decay = {size: task.config("qrnn-adamw-timescale", size).weight_decay for size in ("full", "colab", "laptop")}
    assert decay == {"full": 0.08, "colab": pytest.approx(0.48), "laptop": pytest.approx(1.8)}
    assert task.config("lstm-adamw", "colab").weight_decay == 1.2e-6


# --- rows ----------------------------------------------------------------------------------------
def test_rows_and_published_figures():
    assert list(ROWS)[:4] == ["lstm-adam", "lstm-adam-amsgrad", "lstm-adamw", "lstm-adamw-amsgrad"]
    assert len(ROWS) == 11 and list(ROWS)[-1] == "lstm-adam-ar-dropped", "a new row comes last: `nbutils todo` keeps their order"
    assert set(task.published) == {row for row in ROWS if not row.endswith(("timescale", "dropped"))}
    assert task.published["lstm-adamw-amsgrad"] == {"valid": "72.7", "test": "69", "valid_cache": "57", "test_cache": "54.7"}
    for size in ("smoke", "laptop", "colab", "full"):
        assert task.rows(size) == list(ROWS)


def test_the_row_that_asks_where_ar_acts_differs_in_nothing_else():
    for size in ("full", "colab", "laptop", "smoke"):
        row, other = task.config("lstm-adam-ar-dropped", size), task.config("lstm-adam", size)
        assert (row.on, other.on) == ("dropped", "raw")
        assert dataclasses.replace(row, row="lstm-adam", on="raw") == other
    assert [build(config, 0, "cpu").loss_fn.on for config in (row, other)] == ["dropped", "raw"]


def test_the_full_rows_are_the_recipe():
    lstm, qrnn = task.config("lstm-adam", "full"), task.config("qrnn-adamw-amsgrad", "full")
    assert (lstm.l2, lstm.weight_decay, lstm.alpha, lstm.beta, lstm.on) == (1.2e-6, 0, 3, 1.5, "raw")
    assert (qrnn.l2, qrnn.weight_decay, qrnn.alpha, qrnn.beta, qrnn.amsgrad) == (0, 1e-6, 2, 1, True)
    for config in (lstm, qrnn):
        assert (config.epochs, config.streams, config.steps, config.lr, config.clip_norm) == (90, 100, 70, 5e-3, 0.12)
        assert config.momentum == (0.8, 0.7) and config.beta2 == 0.99 and config.share == config.dropout == 1


@pytest.mark.parametrize("row, parameters", [("lstm-adam", 33_556_479), ("qrnn-adam", 33_355_029)])
def test_the_full_models(row, parameters):
    with torch.device("meta"):
        model = make_model(task.config(row, "full"), 33_279)
    assert sum(p.numel() for p in model.parameters()) == parameters
    want = {"lstm-adam": (0.6, 0.4, 0.5, 0.1, 0.2), "qrnn-adam": (0.4, 0.4, 0.1, 0.1, 0.2)}[row]
    layer = model.layers[0]
    assert (model.input_dropout.p, model.output_dropout.p, layer.weight_drop, model.look_up.p, model.hidden_dropout.p) == want
    assert all(other.weight_drop == layer.weight_drop for other in model.layers)


@pytest.mark.parametrize("row", ROWS)
def test_optimizers_are_what_the_row_says(row):
    config = task.config(row, "full")
    optimizer = make_optimizer(config, [torch.nn.Parameter(torch.ones(2))])
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__ == {"adam": "Adam", "adamw": "AdamW"}[config.optimizer]
    assert bool(group.get("l2")) == (config.optimizer == "adam") and group["betas"] == (0.8, 0.99)
    assert group["amsgrad"] == row.endswith("amsgrad")


def test_the_schedule_of_ninety_epochs():
    learner = build(dataclasses.replace(task.config("lstm-adam", "smoke"), epochs=2), 0, "cpu")
    assert set(learner.schedules) == {"lr", "momentum"} and learner.clip_norm == 0.12
    full = wikitext2.one_cycle_held(5e-3, momentum=(0.8, 0.7), steps=90 * 297)
    rates = values(full["lr"], 90 * 297)
    assert sum(rates) == pytest.approx(92.9986, abs=5e-5) and rates[-1] == pytest.approx(5.5944e-10, abs=5e-15)


@pytest.mark.parametrize("settings, message", [
    ({"model": "ltsm"}, "unknown model 'ltsm'. Did you mean lstm"), ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
    ({"precision": "fp8"}, "unknown precision 'fp8'"), ({"weight_decay": 0.1}, "weight_decay is 0.1, but the optimizer adam"),
    ({"optimizer": "adamw", "l2": 0.1}, "l2 is 0.1, but the optimizer adamw"), ({"size": "tiny"}, "unknown size 'tiny'"),
])
def test_configs_refuse(settings, message):
    with pytest.raises(ValueError, match=message):
        Wikitext2Config(**{"size": "full", "row": "x"} | settings)


# --- runs ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", ["lstm-adamw-amsgrad", "qrnn-adam"])
def test_a_run_ends_in_a_record_and_repeats_itself(row, tmp_path, monkeypatch):
    config = dataclasses.replace(task.config(row, "smoke"), epochs=1)
    monkeypatch.setitem(experiment._REGISTERED, "wikitext2", dataclasses.replace(task, configs=(config,)))
    first, second = (run(config, 0, device="cpu", records=tmp_path / name, runs=tmp_path / "runs", progress="silent")
                     for name in "ab")
    assert first.metrics == second.metrics and first.history[0]["loss"] == second.history[0]["loss"]
    assert set(first.metrics) == {"valid", "test", "valid_cache", "test_cache"}     # no whole chunk of 2,000 here
    assert all(1 < value < 2000 for value in first.metrics.values())


def test_the_score_is_exact_and_counts_as_2018_too(topics, monkeypatch):
    config = task.config("lstm-adam", "smoke")
    longer = Corpus(topics.train, topics.train[:4500], topics.test, topics.vocabulary)
    monkeypatch.setattr(wikitext2, "help_topics", lambda: longer)
    seed_everything(0)
    learner = build(config, 0, "cpu")
    got, model = score(learner, config), learner.model.model.eval()
    with torch.no_grad():
        logits = model(longer.valid[:-1, None]).logits[:, 0]
    logp = logits.log_softmax(1).gather(1, longer.valid[1:, None])[:, 0]
    assert got["valid"] == pytest.approx(perplexity(logp), rel=1e-5)
    assert got["valid_2018"] == pytest.approx(perplexity(logp[:4000]), rel=1e-5) and "test_2018" not in got


def test_an_exploding_run_names_step_and_rate_and_keeps_its_history():
    config = dataclasses.replace(task.config("lstm-adam", "smoke"), lr=1e30, epochs=2)
    learner = build(config, 0, "cpu")
    with pytest.raises(NonFiniteError, match=r"step \d+.*lr \d"):
        learner.fit(2)
    assert len(learner.trace["loss"]) > 0


def test_smoke_needs_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("NBUTILS_DATA", str(tmp_path / "nothing"))
    assert len(corpus_of(task.config("qrnn-adam", "smoke")).train) == 16_000


# --- samples -------------------------------------------------------------------------------------
def test_samples(topics):
    config = task.config("lstm-adam", "smoke")
    seed_everything(0)
    model = make_model(config, len(topics.vocabulary)).train()
    said = sample(model, topics.vocabulary, "the", 12, seed=1)
    assert said == sample(model, topics.vocabulary, "the", 12, seed=1) != sample(model, topics.vocabulary, "the", 12, seed=2)
    assert said.startswith("the") and model.training
    with torch.no_grad():                                                          # nearly no temperature: the likeliest word
        likeliest = int(model.eval()(topics.vocabulary.encode("the")[:1, None]).logits[-1, 0].argmax())
    assert sample(model, topics.vocabulary, "the", 1, temperature=1e-4) == f"the {topics.vocabulary.words[likeliest]}"
    for wrong, message in (({"prompt": "zyzzyva"}, "prompt, line 1: 'zyzzyva'"), ({"temperature": 0.0}, "temperature is 0.0"), ({"prompt": " "}, "the prompt has no word"),
                           ({"vocabulary": Vocabulary(["the", "<eos>"])}, "the model has .* words and the vocabulary 3")):
        arguments = {"vocabulary": topics.vocabulary, "prompt": "the"} | wrong
        with pytest.raises(ValueError, match=message):
            sample(model, arguments.pop("vocabulary"), arguments.pop("prompt"), **arguments)


# --- the real corpus -----------------------------------------------------------------------------
@pytest.mark.skipif(not REAL.exists(), reason="WikiText-2 is not at hand; `nbutils data wikitext2` fetches it")
def test_the_real_corpus():
    corpus = load_wikitext2(download_missing=False)
    assert [len(t) for t in (corpus.train, corpus.valid, corpus.test)] == [2_088_628, 217_646, 245_569]
    assert len(corpus.vocabulary) == 33_279 and corpus.train.unique().tolist() == list(range(1, 33_279))
    eos = corpus.vocabulary.words.index("<eos>")
    assert [int((t == eos).sum()) for t in (corpus.train, corpus.valid, corpus.test)] == [36_718, 3_760, 4_358]
    cut = corpus.cut(0.1)
    assert len(cut.train) == 208_862 and len(cut.vocabulary) == 7_470
    assert (cut.valid == cut.vocabulary.words.index("<unk>")).double().mean() == pytest.approx(0.163, abs=0.001)
    assert len(Streams(cut.train, 20, 35)) == 297
