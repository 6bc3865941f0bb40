"""The contenders of the benchmark. bench.py starts this file once for each, as a process of its own.

A contender is a loop and a feed, such as `fastai+loader`. All do the same work: the same net with
the same initial weights, AdamW with the same rates at each step, the same images an epoch, cropped
and mirrored by the same rule, batches of the same size, weights and images in channels_last, and
after each epoch the mean loss and the accuracy over the same test images. The feeds:

- `batches`: nbutils' Batches, which shuffle, crop, mirror and normalize whole batches on the device;
- `loader`: torchvision's CIFAR10 object and transforms, an image at a time, through a DataLoader
  (fastai wraps the object in its own DataLoaders).

Each loop is written as its own documentation teaches and keeps its defaults, but for bars, loggers,
checkpoints and sanity checks, which are off. All of a loop's epochs are one call of its `fit`. Before
each, the process says that it is ready and waits for its turn; a process that waits computes nothing.
"""
import contextlib
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from nbutils.amsgrad import AdamW
from nbutils.cifar10 import plain_net
from nbutils.core import seed_everything
from nbutils.data import CIFAR10_MEAN, CIFAR10_STD, Batches, Images, load_cifar10, pad_crop_flip
from nbutils.learner import PRECISIONS, Callback, Learner, best_precision
from nbutils.schedule import one_cycle
from nbutils.wide_resnet import wide_resnet_22

NETS = {"plain-6": plain_net, "wide-resnet-22": wide_resnet_22}
BETA2 = 0.99
MB = 2**20


# --- the parent's side of a turn -------------------------------------------------------------------
class Turns:
    """Wait for the turn, read the clock around it, report: one line of JSON each way."""

    def __init__(self, device, replies):
        self.device, self.replies, self.helpers = device, replies, (0, 0.0)

    def say(self, **facts):
        print(json.dumps(facts), file=self.replies, flush=True)

    def clock(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self):
        """Before an epoch: wait for the word."""
        self.say(ready=True)
        if sys.stdin.readline().strip() != "go":
            raise SystemExit("the benchmark has ended")
        self.start = self.clock()

    def trained(self):
        """Between training and evaluation."""
        self.middle = self.clock()

    def end(self, loss, accuracy):
        """After the evaluation, with what it found."""
        end = self.clock()
        self.look_at_helpers()
        facts = {"peak_mb": peak(), "helpers": self.helpers[0], "helpers_mb": self.helpers[1]}
        if self.device.type == "cuda":
            facts["gpu_mb"] = torch.cuda.max_memory_allocated() / MB
            facts["gpu_reserved_mb"] = torch.cuda.max_memory_reserved() / MB
        self.say(train=self.middle - self.start, total=end - self.start, loss=float(loss),
                 accuracy=float(accuracy), threads=torch.get_num_threads(), **facts)

    def look_at_helpers(self):
        """Note how many processes a loader has now, and what only they hold; the most seen counts."""
        children, held = multiprocessing.active_children(), 0.0
        for child in children:
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
                held += sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
        self.helpers = max(self.helpers, (len(children), held))


def peak():
    """Peak of this process' resident memory in MB."""
    # On Linux ru_maxrss begins with what the parent held when it forked, so /proc comes first.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


# --- the work --------------------------------------------------------------------------------------
class Work:
    """What all contenders share, built from the settings that bench.py sends."""

    def __init__(self, settings):
        self.set = SimpleNamespace(**settings)
        self.device, self.half = torch.device(self.set.device), PRECISIONS[self.set.precision]
        self.compile = self.device.type == "cuda"
        self.epochs = self.set.warmup + self.set.rounds
        self.schedules = one_cycle(self.set.lr, div=10, tail=0.075, steps=self.epochs * self.set.steps)

    def model(self):
        seed_everything(0)
        return NETS[self.set.net]().to(self.device, memory_format=torch.channels_last)

    def optimizer(self, params, ours=False):
        """AdamW: torch's for all on a GPU and for the peers, nbutils' for our Learner on the CPU."""
        options = {"lr": self.set.lr, "betas": (0.95, BETA2), "weight_decay": self.set.weight_decay}
        if ours and self.device.type == "cpu":
            return AdamW(params, **options)
        return torch.optim.AdamW(params, **options, fused=self.device.type == "cuda" or None)

    def set_rates(self, optimizer, step):
        """The rates of a step, counted from 0, by hand."""
        progress = step / (self.epochs * self.set.steps)
        for group in optimizer.param_groups:
            group["lr"] = self.schedules["lr"](progress)
            group["betas"] = (self.schedules["momentum"](progress), BETA2)

    def autocast(self):
        return torch.autocast(self.device.type, self.half) if self.half else contextlib.nullcontext()

    def images(self):
        saved, classes = torch.load(self.set.file, weights_only=True, mmap=True), tuple(map(str, range(10)))
        sizes = {"train": self.set.images, "test": self.set.test_images}
        return [Images(saved[f"{name}_x"][:n].clone(), saved[f"{name}_y"][:n].clone(), classes, name)
                for name, n in sizes.items()]

    def feed(self, kind, workers=None):
        """Two sized iterables of (x, y): training and test images."""
        if kind == "batches":
            options = {"mean": CIFAR10_MEAN, "std": CIFAR10_STD, "channels_last": True}
            train, test = (part.to(self.device) for part in self.images())
            crop = partial(pad_crop_flip, offsets=9)              # all places, as torchvision's crop
            return (Batches(train, self.set.batch_size, shuffle=True, augment=crop, seed=0, **options),
                    Batches(test, self.set.batch_size, **options))
        workers = self.set.loader_workers if workers is None else workers
        options = {"num_workers": workers, "persistent_workers": workers > 0,
                   "pin_memory": self.device.type == "cuda"}
        return tuple(torch.utils.data.DataLoader(part, self.set.batch_size, shuffle=train, **options)
                     for part, train in zip(self.datasets(), (True, False)))

    def datasets(self):
        """torchvision's CIFAR10 objects with its transforms, over images that are in memory already."""
        from torchvision import transforms as T
        from torchvision.datasets import CIFAR10

        def over(images, steps):
            found = CIFAR10.__new__(CIFAR10)                       # its __init__ would read files
            found.data, found.targets = images.x.permute(0, 2, 3, 1).contiguous().numpy(), images.y.tolist()
            found.transform, found.target_transform = T.Compose(steps), None
            return found

        plain = [T.ToTensor(), T.Normalize(CIFAR10_MEAN, CIFAR10_STD)]
        crop = [T.RandomCrop(32, padding=4, padding_mode="symmetric"), T.RandomHorizontalFlip()]
        train, test = self.images()
        return over(train, crop + plain), over(test, plain)


# --- the loops -------------------------------------------------------------------------------------
def run_plain(work, feed, turns):
    """A loop as a careful person writes it: nothing waits for the device inside an epoch."""
    (train, test), device = work.feed(feed), work.device
    model = work.model()
    optimizer = work.optimizer(model.parameters())
    scaler = torch.amp.GradScaler(device.type, enabled=work.set.precision == "fp16")
    forward = torch.compile(model) if work.compile else model
    place = {"device": device, "non_blocking": True}
    step = 0
    for _ in range(work.epochs):
        turns.begin()
        model.train()
        losses = []
        for x, y in train:
            work.set_rates(optimizer, step)
            x, y = x.to(**place, memory_format=torch.channels_last), y.to(**place)
            with work.autocast():
                outputs = forward(x)
            loss = F.cross_entropy(outputs.float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            step += 1
        torch.stack(losses).mean().item()
        turns.trained()
        model.eval()
        sums, n = torch.zeros(2, device=device), 0
        with torch.no_grad():
            for x, y in test:
                x, y = x.to(**place, memory_format=torch.channels_last), y.to(**place)
                with work.autocast():
                    outputs = forward(x)
                outputs = outputs.float()
                sums += torch.stack([F.cross_entropy(outputs, y, reduction="sum"),
                                     (outputs.argmax(1) == y).sum()])
                n += len(y)
        turns.end(*(sums / n).tolist())


def run_learner(work, feed, turns):
    """Our Learner, as chapter 11 builds it."""
    class Stop(Callback):
        def before_fit(self, learner):
            turns.begin()

        def after_epoch(self, learner):
            turns.end(learner.history[-1]["valid_loss"], learner.history[-1]["accuracy"])
            if learner.epoch < learner.epochs:
                turns.begin()

    class Announced:
        """The test batches; their first use tells that training is over."""

        def __init__(self, batches):
            self.batches = batches

        def __len__(self):
            return len(self.batches)

        def __iter__(self):
            turns.trained()
            return iter(self.batches)

    train, test = work.feed(feed)
    model = work.model()
    Learner(model, train, Announced(test), work.optimizer(model.parameters(), ours=True),
            schedules=work.schedules, callbacks=[Stop()], device=work.device, precision=work.set.precision,
            channels_last=True, compile=work.compile, progress="silent").fit(work.epochs)


def run_fastai(work, feed, turns):
    """fastai's Learner with torch's AdamW in its wrapper."""
    from fastai.callback.core import Callback as FastaiCallback
    from fastai.callback.fp16 import AMPMode, MixedPrecision
    from fastai.callback.progress import ProgressCallback
    from fastai.callback.schedule import ParamScheduler
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner as FastaiLearner
    from fastai.metrics import accuracy
    from fastai.optimizer import OptimWrapper
    from fastai.torch_core import default_device

    torch.set_num_threads(work.set.threads)                        # in case an import changed it

    default_device(work.device.type == "cuda")

    class First(FastaiCallback):
        order = -1000

        def before_epoch(self):
            turns.begin()

        def after_batch(self):
            if self.epoch < work.set.warmup:                       # its helpers do not outlive an epoch
                turns.look_at_helpers()

        def before_validate(self):
            turns.trained()

    class Last(FastaiCallback):
        order = 1000

        def after_epoch(self):
            turns.end(*self.learn.final_record[1:3])

    class OnCPU(MixedPrecision):
        """fastai 2.8 writes 'cuda' into its autocast; the same with this device's."""

        def before_fit(self):
            super().before_fit()
            self.autocast = work.autocast()

    if feed == "batches":
        loaders = DataLoaders(*work.feed(feed))
    else:
        loaders = DataLoaders.from_dsets(
            *work.datasets(), bs=work.set.batch_size, num_workers=work.set.loader_workers, device=work.device,
            persistent_workers=work.set.loader_workers > 0, pin_memory=work.device.type == "cuda")
    model = work.model()

    learner = FastaiLearner(loaders, torch.compile(model) if work.compile else model, F.cross_entropy,
                            opt_func=lambda params, lr: OptimWrapper(opt=work.optimizer(list(params))),
                            metrics=accuracy, wd_bn_bias=True, cbs=[First(), Last()])
    learner.remove_cb(ProgressCallback)
    if work.half:
        mode = AMPMode(work.set.precision)
        learner.add_cb(MixedPrecision(mode) if work.device.type == "cuda" else OnCPU(mode))
    rates = {"lr": work.schedules["lr"], "mom": work.schedules["momentum"]}
    with learner.no_logging():
        learner.fit(work.epochs, lr=work.set.lr, wd=work.set.weight_decay,
                    cbs=ParamScheduler({name: _clipped(f) for name, f in rates.items()}))


def _clipped(schedule):
    """fastai adds its progress up, and the sum can pass 1 by a rounding error."""
    return lambda progress: schedule(min(float(progress), 1.0))


def run_lightning(work, feed, turns):
    """Lightning's Trainer; losses and accuracy go through `self.log`."""
    import lightning as L

    torch.set_num_threads(work.set.threads)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            model = work.model()
            self.net = torch.compile(model) if work.compile else model

        def configure_optimizers(self):
            return work.optimizer(self.parameters())

        def on_train_batch_start(self, batch, batch_idx):
            work.set_rates(self.trainer.optimizers[0], self.trainer.global_step)

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.cross_entropy(self.net(x.contiguous(memory_format=torch.channels_last)).float(), y)
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch, batch_idx):
            x, y = batch
            outputs = self.net(x.contiguous(memory_format=torch.channels_last)).float()
            self.log("valid_loss", F.cross_entropy(outputs, y), batch_size=len(y))
            self.log("accuracy", (outputs.argmax(1) == y).float().mean(), batch_size=len(y))

    class Stop(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            turns.begin()

        def on_validation_start(self, trainer, module):
            turns.trained()

        def on_train_epoch_end(self, trainer, module):
            found = trainer.callback_metrics
            turns.end(found["valid_loss"], found["accuracy"])

    precision = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[work.set.precision]
    trainer = L.Trainer(
        max_epochs=work.epochs, accelerator="gpu" if work.device.type == "cuda" else "cpu", devices=1,
        precision=precision, callbacks=[Stop()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    trainer.fit(Module(), *work.feed(feed))


LOOPS = {"plain": run_plain, "learner": run_learner, "fastai": run_fastai, "lightning": run_lightning}


# --- what bench.py asks for beside turns -------------------------------------------------------------
def prepare(settings, reply):
    """Describe the machine, and save the images that all contenders will use."""
    from nbutils.records import code_state, describe_device, versions

    commit, code_hash = code_state()
    devices = {"cpu": {"name": describe_device("cpu"), "precisions": ["fp32"]}}
    if best_precision("cpu") == "bf16":
        devices["cpu"]["precisions"] = ["bf16", "fp32"]
    if torch.cuda.is_available():
        devices["cuda"] = {"name": describe_device("cuda"), "precisions": [best_precision("cuda")]}
    try:
        train, test = load_cifar10(download=False)
        data = "CIFAR-10"
    except FileNotFoundError:
        draw = torch.Generator().manual_seed(0)
        train, test = (SimpleNamespace(x=torch.randint(256, (n, 3, 32, 32), generator=draw, dtype=torch.uint8),
                                       y=torch.randint(10, (n,), generator=draw)) for n in (50_000, 10_000))
        data = "random images in CIFAR-10's shape"
    torch.save({"train_x": train.x, "train_y": train.y, "test_x": test.x, "test_y": test.y}, settings["file"])
    parameters = {name: sum(p.numel() for p in make().parameters()) for name, make in NETS.items()}
    reply(devices=devices, data=data, commit=commit, code_hash=code_hash, versions=versions(),
          parameters=parameters)


def tune(work, reply):
    """Seconds of one epoch of the plain loop for each number of helper processes to choose from."""
    seconds = {}
    for workers in work.set.candidates:
        feed = work.feed("loader", workers)

        class Alone(Turns):
            def begin(self):
                self.start = self.clock()

            def end(self, *_):
                seconds[workers] = self.middle - self.start        # the last epoch's stays

        work.feed = lambda kind, feed=feed: feed
        run_plain(work, "loader", Alone(work.device, None))
        del work.feed, feed
    reply(seconds=seconds)


def main():
    # Lines to the parent go through a copy of stdout; whatever a library prints goes to the log.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.backends.cudnn.benchmark = True                          # fastai sets it for itself
    job = settings.pop("job")
    turns = Turns(torch.device(settings.get("device", "cpu")), replies)
    if job == "prepare":
        prepare(settings, turns.say)
    elif job == "tune":
        tune(Work(settings), turns.say)
    else:
        loop, feed = job.split("+")
        LOOPS[loop](Work(settings), feed, turns)


if __name__ == "__main__":
    main()
