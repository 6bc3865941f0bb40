"""The tasks' full rows on a GPU that is not there (fake_gpu.py): devices, dtypes, and no wait within a step."""
import contextlib
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from nbutils import cars, cifar10, kernel, wikitext2
from nbutils.amsgrad import AdamW
from nbutils.cache_pointer import add_cache, evaluate_tokens
from nbutils.data import Images
from nbutils.experiment import get_task
from nbutils.learner import Callback

if sys.platform != "linux" or not torch.backends.cuda.is_built() or torch.cuda.is_available():
    pytest.skip("needs torch's CUDA build on Linux, and no GPU", allow_module_level=True)

from fake_gpu import FakeGPU  # noqa: E402

H200, T4 = (9, 0), (7, 5)
ROWS = [("cifar10", "adamw-30"), ("cars", "crops-adamw"), ("wikitext2", "lstm-adam"), ("wikitext2", "qrnn-adamw")]


# --- the fake ----------------------------------------------------------------------------------------
FAULTS = {
    "two devices": lambda x: x + torch.ones(3), "a product of two dtypes": lambda x: x.half() @ x,
    "an index elsewhere": lambda x: torch.embedding(torch.ones(4, 2), x.long()),
    "an LSTM with a state in float32": lambda x: torch.lstm(x.half()[None], 2 * (x[None],), [
        t.half() for t in (x[0].expand(12, 3), x[0].expand(12, 3), x.new_ones(12), x.new_ones(12))], True, 1, 0.0, True, False, False),
    "a convolution of two dtypes": lambda x: F.conv2d(x.half().view(1, 1, 3, 3), x.view(1, 1, 3, 3)), "a mask": lambda x: x[x > 0],
    "a kernel on the host's memory": lambda x: kernel._load((), (), 16, 0)[0][1,](torch.ones(3)),
    "a captured step": lambda x: mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True)(one_step)(x),
}
WAITS = {
    "item": lambda x: x.sum().item(), "if": lambda x: bool(x[0, 0] > 0), "float": lambda x: float(x[0, 0]),
    "tolist": lambda x: x.tolist(), "equal": lambda x: torch.equal(x, x), "nonzero": lambda x: x.nonzero(),
    "write by a mask": lambda x: x.index_put_((x > 0,), x.sum()),
    "repeats": lambda x: torch.repeat_interleave(x.long()[0]), "to the host": lambda x: x.cpu(),
    "copy_ to the host": lambda x: torch.empty(3, 3).copy_(x), "from the host": lambda x: torch.ones(3).to(x.device),
    "not page-locked": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "page-locked, blocking": lambda x: torch.ones(3).pin_memory().to(x.device), "synchronize": lambda x: torch.cuda.synchronize(),
}
GOES_ON = {
    "page-locked": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "copy_": lambda x: x[0].copy_(torch.ones(3).pin_memory(), non_blocking=True), "dtype": lambda x: x.half().to(x.dtype),
    "numbers": lambda x: x.mul_(2).masked_fill_(x > 0, 1.0), "repeats": lambda x: torch.repeat_interleave(x.long()[0], output_size=5),
    "index": lambda x: x[x.long()[0], 1], "a step": lambda x: one_step(x), "a step in float64": lambda x: one_step(x.double()),
}


def one_step(x):
    p = torch.nn.Parameter(x)
    p.grad = torch.ones_like(x)
    AdamW([p], engine="kernel").step()


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_gpu_refuses_is_refused(fault):
    with FakeGPU(H200), pytest.raises((RuntimeError, ValueError)):
        FAULTS[fault](torch.ones(3, 3, device="cuda"))


@pytest.mark.parametrize("case", WAITS)
def test_waits_are_noted_with_their_place(case):
    with FakeGPU(H200) as gpu:
        WAITS[case](torch.ones(3, 3, device="cuda"))
    (_, place), = gpu.waits.elements()
    assert place == f"test_fake_gpu.py:{WAITS[case].__code__.co_firstlineno}"


@pytest.mark.parametrize("case", GOES_ON)
def test_what_is_only_queued_is_no_wait(case):
    with FakeGPU(H200) as gpu:
        GOES_ON[case](torch.ones(3, 3, device="cuda"))
    assert not gpu.waits


# --- the rows ----------------------------------------------------------------------------------------
def pictures(n, side, classes):
    return Images(torch.zeros(n, 3, side, side, dtype=torch.uint8), torch.arange(n) % classes, tuple(map(str, range(classes))))


def corpus(config):
    text = torch.arange(21_500) % 33_278
    return wikitext2.Corpus(text, text[:7500], text[:7500], wikitext2.Vocabulary(f"w{i}" for i in range(33_278)))


def small_data(folder):
    """Pictures and texts of the real sizes, but few of them, in the place of each task's data."""
    from torchvision.models.resnet import Bottleneck, ResNet

    (folder / "cars-224").mkdir()
    yield wikitext2, "corpus_of", corpus
    yield cars, "data_home", lambda: folder
    yield cars, "load_folder", lambda folder, side: (pictures(464, side, 196), pictures(233, side, 196))
    yield cars, "_read_weights", lambda name: ResNet(Bottleneck, (3, 4, 6, 3)).state_dict()
    yield cifar10, "load_cifar10", lambda device: tuple(pictures(n, 32, 10).to(device) for n in (464, 700))


class Watch(Callback):
    """Sorts waits into those within steps and those between them."""

    def __init__(self, gpu):
        self.gpu, self.steps, self.within, self.between = gpu, 0, {}, {}

    def before_batch(self, learner):
        self.between |= self.gpu.waits
        self.gpu.waits.clear()

    def after_step(self, learner):
        self.steps += 1
        self.within |= self.gpu.waits
        self.gpu.waits.clear()


@pytest.mark.parametrize("card, precision", [(H200, "bf16"), (T4, "fp16")], ids=["H200", "T4"])
@pytest.mark.parametrize("name, row", ROWS)
def test_full_row_from_build_to_score(name, row, card, precision, tmp_path):
    task = get_task(name)
    config = replace(task.config(row, "full"), epochs=2, **({"head_epochs": 1} if name == "cars" else {}))
    with FakeGPU(card) as gpu, contextlib.ExitStack() as patches:
        for owner, attribute, value in small_data(tmp_path):
            patches.enter_context(mock.patch.object(owner, attribute, value))
        learner, watch = task.build(config, 0, torch.device("cuda")), Watch(gpu)
        learner.callbacks.append(watch)
        gpu.waits.clear()
        learner.fit(2)
        metrics = task.score(learner, config)
    assert learner.precision == precision
    assert {what for what, _ in watch.within} == ({"item"} if precision == "fp16" else set()), watch.within
    assert len(watch.within) <= 1                               # torch's GradScaler asks whether to skip a step
    assert len(watch.between) <= 3, watch.between               # the losses, the weights, the evaluation
    assert set(metrics) >= set(list(task.columns)[:1]) and all(p.is_cuda for p in learner.model.parameters())
    assert gpu.launches["nbutils.kernel"] >= watch.steps >= 4
    assert ("nbutils.qrnn" in gpu.launches) == row.startswith("qrnn")


def test_an_exact_score_waits_as_often_for_a_long_text_as_for_a_short_one():
    waits = []
    for n in (500, 5000):                                       # of one block and chunk, and of several
        with FakeGPU(H200) as gpu, mock.patch("nbutils.cache_pointer._SCORES", 10**6):
            model = wikitext2.awd_lstm(60, 8, 12, 2).to("cuda")
            tokens = (torch.arange(n) % 60).to("cuda")
            gpu.waits.clear()
            add_cache(evaluate_tokens(model, tokens, chunk=600), theta=0.6, lam=0.1, window=100)
        waits.append(gpu.waits)
    assert waits[0] == waits[1] and 0 < sum(waits[0].values()) < 10
