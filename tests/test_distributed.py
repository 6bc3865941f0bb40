"""Several processes train as one does: equal weights and rows, each sample counted once, deaths that are told and survived."""
import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from children import Child
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbutils.amsgrad import AdamW
from nbutils.command import main
from nbutils.core import seed_everything
from nbutils.data import Batches, load_digits, pad_crop_flip
from nbutils.distributed import Distributed, ProcessLost, _listen, _Share, process_group
from nbutils.experiment import Checkpoint
from nbutils.learner import Callback, Learner
from nbutils.momentum import SGD
from nbutils.schedule import one_cycle

COLUMNS = ("loss", "valid_loss", "lr", "momentum")
ACCURACY = 1e-7                                  # a mean in float32 of each batch, or of each share
MARK = {"test": 1}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def group(function, *args, n=2, **env):
    """n processes that torchrun might have started."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "GLOO_SOCKET_IFNAME": "lo", **env}
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Child(function, *args, env=place | {"RANK": r, "LOCAL_RANK": r})) for r in range(n)]


def together(function, *args, n=2, **env):
    """Run them to their end, which must be good."""
    with group(function, *args, n=n, **env) as children:
        codes = [child.wait() for child in children]
        assert codes == [0] * n, "\n".join(child.out + child.err for child in children)


def pairs(sizes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=random), torch.randint(3, (n,), generator=random)) for n in sizes]


class Thaw(Callback):
    def before_epoch(self, learner):
        learner.model[0].requires_grad_(learner.epoch > 0)


class Do(Callback):
    """Call a function in epoch 3, at step 9, in one process."""

    def __init__(self, rank, function):
        self.rank, self.function = rank, function

    def before_batch(self, learner):
        if learner.step == 9 and os.environ.get("RANK") == str(self.rank):
            self.function()


def learn(callbacks=(), optimizer="adamw", clip=None, sizes=(12, 12, 12, 5), valid=(7, 7, 2), norm=False, dropout=0.0,
          loader=False, precision="fp32", thaw=False, epochs=4, digits=False, seed=0):
    torch.set_default_dtype(torch.float64 if precision == "fp32" else torch.float32)   # autocast leaves float64 alone
    torch.set_num_threads(1)
    seed_everything(seed)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))
    train, valid = pairs(sizes), pairs(valid, seed=1)
    schedules = {}
    if loader:
        x, y = (torch.cat(part) for part in zip(*train))
        train = DataLoader(TensorDataset(x, y), 12, shuffle=True)
    if digits:
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        images, stats = load_digits(), {"mean": [0.3], "std": [0.4], "dtype": torch.float64}
        augment = lambda x, generator: pad_crop_flip(x, generator, pad=1, offsets=3)  # noqa: E731
        train = Batches(images[0].take(300), 128, shuffle=True, augment=augment, **stats)
        valid = Batches(images[1], 77, **stats)
        schedules = one_cycle(0.05, steps=epochs * 3)
    make = {"adamw": lambda p: AdamW(p, lr=0.02, weight_decay=0.1), "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, l2=1e-3),
            "torch": lambda p: torch.optim.AdamW(p, lr=0.02)}[optimizer]
    callbacks = [*callbacks, Thaw()] if thaw else callbacks
    learner = Learner(net, train, valid, make(net.parameters()), device="cpu", clip_norm=clip, precision=precision,
                      callbacks=callbacks, schedules=schedules, progress="silent")
    learner.fit(epochs)
    return learner


def share(folder, options, then=None, timeout=250, checkpoint=None):
    """What each process of a group does."""
    kept = Checkpoint(checkpoint, MARK) if checkpoint else None
    with process_group(timeout, "cpu") as rank:
        callbacks = [Distributed(kept), *([Do(*then)] if then else [])]
        learner = learn(callbacks, seed=rank, **options)            # process 0's weights are sent to all
        torch.save(learner.state_dict(), Path(folder, f"{rank}.pt"))


def ends(folder, n=2):
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(n)]


def flat(state):
    return torch.cat([v.double().flatten() for v in state["model"].values()])


def rows(state, columns=COLUMNS):
    return torch.tensor([[row[c] for c in columns] for row in state["history"]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


CASES = {
    "AdamW": (2, {}),
    "AdamW, clipped": (2, {"clip": 0.2}),
    "momentum, clipped, three processes": (3, {"optimizer": "momentum", "clip": 0.3}),
    "torch's AdamW": (2, {"optimizer": "torch"}),
    "fewer samples than processes at last": (3, {"sizes": (12, 12, 12, 2), "clip": 0.2, "valid": (1,)}),
    "thawed in the second epoch": (2, {"thaw": True}),
    "digits, augmented, 1cycle": (3, {"digits": True, "clip": 1.0}),
}


@pytest.mark.parametrize("n, options", CASES.values(), ids=CASES)
def test_several_processes_are_as_one(n, options, tmp_path):
    together(share, tmp_path, options, n=n)
    one, many = learn(**options).state_dict(), ends(tmp_path, n)
    for state in many:
        assert torch.equal(flat(state), flat(many[0])) and state["history"] == many[0]["history"]
        assert state["trace"] == many[0]["trace"]
    torch.testing.assert_close(flat(many[0]), flat(one), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows(many[0]), rows(one), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows(many[0], ["accuracy"]), rows(one, ["accuracy"]), rtol=0, atol=ACCURACY)
    torch.testing.assert_close(torch.tensor(many[0]["trace"]["loss"]), torch.tensor(one["trace"]["loss"]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"norm": True}, {"dropout": 0.5}, {"precision": "bf16"}, {"precision": "fp16", "clip": 0.5}],
                         ids=["norm", "dropout", "bf16", "fp16"])
def test_what_differs_from_one_process_is_still_the_same_on_all(options, tmp_path):
    together(share, tmp_path, options)
    first, second = ends(tmp_path)
    assert torch.equal(flat(first), flat(second)) and first["history"] == second["history"]
    assert first["scaler"] == second["scaler"]
    one = learn(**options).state_dict()
    difference = (flat(first) - flat(one)).abs().max()
    assert 1e-12 < difference < (0.02 if "precision" in options else 1.0), difference


def test_a_shuffling_loader_draws_the_same_order_everywhere(tmp_path):
    together(share, tmp_path, {"loader": True})
    with process_group(device="cpu"):
        one = learn([Distributed()], loader=True).state_dict()
    torch.testing.assert_close(flat(ends(tmp_path)[0]), flat(one), rtol=0, atol=1e-12)


def evaluates(folder):
    with process_group(250, "cpu") as rank:
        learner = learn([Distributed()], epochs=1, seed=rank)
        counted = []
        learner.metrics = {"samples": lambda outputs, y: counted.append(len(y)) or torch.ones(())}
        found = [learner.evaluate(pairs(sizes)) for sizes in ((5, 3, 1), (1,), (2, 2))]
        with pytest.raises(ValueError, match="nothing to evaluate"):
            learner.evaluate(())
        outputs, targets = learner.predict(pairs((5, 3, 1)))
        assert len(outputs) == len(targets) == 9
        torch.save([counted, found, learner.state_dict()], Path(folder, f"{rank}.pt"))


def test_each_sample_is_counted_once(tmp_path):
    together(evaluates, tmp_path, n=3)
    ended = ends(tmp_path, 3)
    assert [counted for counted, _, _ in ended] == [[2, 1, 1, 1, 1, 1], [2, 1, 1, 1], [1, 1]]
    assert sum(sum(counted) for counted, _, _ in ended) == 9 + 1 + 4
    assert ended[0][1] == ended[1][1] == ended[2][1]
    one = learn(epochs=1)
    one.load_state_dict(ended[0][2])
    for sizes, got in zip(((5, 3, 1), (1,), (2, 2)), ended[0][1]):
        assert got["loss"] == pytest.approx(one.evaluate(pairs(sizes))["loss"], abs=1e-14) and got["samples"] == 1


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


def stop_me():
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_ends_the_others_and_the_same_command_goes_on(victim, tmp_path):
    options, kept = {"dropout": 0.3, "clip": 0.5}, tmp_path / "run.pt"
    together(share, tmp_path, options)
    whole = ends(tmp_path)
    with group(share, tmp_path, options, (victim, kill_me), 250, str(kept)) as children:
        assert children[victim].wait() == -signal.SIGKILL
        start = time.monotonic()
        assert children[1 - victim].wait() == 1
        assert time.monotonic() - start < 120, "the others end soon, and not by the group's timeout"
        said = children[1 - victim].err
    assert f"ProcessLost: process {1 - victim} of 2 lost another one in epoch 3, at step 9" in said
    assert f"Start the same command again: the run goes on from the checkpoint {kept}" in said
    with group(share, tmp_path, options, None, 250, str(kept)) as children:
        assert [child.wait() for child in children] == [0, 0], children[0].err + children[1].err
        assert "going on after epoch 2" in children[0].out and children[1].out == ""
    for again, before in zip(ends(tmp_path), whole):
        assert torch.equal(flat(again), flat(before)) and torch.equal(rows(again), rows(before))
        assert again["trace"] == before["trace"]


def test_a_process_that_hangs_is_given_up_after_the_timeout(tmp_path):
    with group(share, tmp_path, {}, (1, stop_me), 20) as children:
        assert children[0].wait(120) == 1
        said = children[0].err
        children[1].kill()
    assert "ProcessLost: process 0 of 2 lost another one in epoch 3, at step 9" in said
    assert "the run begins anew: no checkpoint was given" in said


def blocked():
    _listen(lambda: "it goes on from here")
    print("ready", flush=True)
    while True:
        time.sleep(100)


def test_a_process_that_torchrun_stops_says_how_to_go_on():
    with Child(blocked, env={"TORCHELASTIC_RUN_ID": "x"}) as child:
        child.until(lambda: "ready" in child.out)
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(60) == 143
        assert child.err == "ProcessLost: it goes on from here\n"


def meets(late):
    if os.environ["RANK"] == "1":
        time.sleep(late)
    with process_group(60, "cpu"):
        torch.distributed.barrier()
        time.sleep(1)                            # until the other one's barrier has ended, too
        os._exit(0)                              # as the killed do, without taking leave


def test_a_second_life_does_not_read_the_addresses_of_the_first():
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)     # torchrun's, which outlives the processes
    kept = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": store.port}
    for life, late in enumerate((0, 5)):
        together(meets, late, **kept, TORCHELASTIC_RESTART_COUNT=life)


def test_checkpoints_fit_any_number_of_processes(tmp_path):
    kept = tmp_path / "run.pt"
    together(share, tmp_path, {"epochs": 2}, None, 250, str(kept))
    whole, half = learn().state_dict(), learn(epochs=1)
    assert Checkpoint(kept, MARK).load(half) and half.epoch == 2
    half.fit(4)                                                     # two processes, then one
    torch.testing.assert_close(flat(half.state_dict()), flat(whole), rtol=0, atol=1e-12)
    learn([Checkpoint(kept, MARK)], epochs=2)                       # one, then two
    together(share, tmp_path, {}, None, 250, str(kept))
    torch.testing.assert_close(flat(ends(tmp_path)[1]), flat(whole), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows(ends(tmp_path)[1]), rows(whole), rtol=0, atol=1e-12)


def wrong(kind):
    with process_group(250, "cpu") as rank:
        options = {"few": {"sizes": (1, 1)}, "others": {"sizes": (12, 12 + rank)}, "epochs": {"epochs": 2 + rank}}.get(kind, {})
        callbacks = [Distributed()]
        if kind == "weights":
            callbacks.append(Do(1, lambda: callbacks[0]._learner.model[0].weight.data.mul_(2)))
        if kind == "others":
            callbacks[0].before_fit, attach = lambda learner: (attach(learner), setattr(
                learner.train, "batches", pairs((12, 12), seed=rank))), callbacks[0].before_fit
        learn(callbacks, **options)


@pytest.mark.parametrize("kind, error, text", [
    ("few", "ValueError", "a batch of 1 cannot be shared by 2 processes: give a batch size of 2 or more, or start fewer"),
    ("others", "ValueError", "the processes have other batches"),
    ("epochs", "RuntimeError", "the processes were given unequal work"),
    ("weights", "RuntimeError", "after epoch 3 the processes' weights differ"),
])
def test_wrong_use_is_refused_on_all_processes(kind, error, text):
    with group(wrong, kind) as children:
        assert [child.wait(120) for child in children] == [1, 1]
        for child in children:
            assert f"{error}: {text}" in child.err, child.err


def test_without_a_group_the_remedy_is_named():
    with pytest.raises(RuntimeError, match="with process_group.*torchrun --nproc-per-node 2"):
        learn([Distributed()])


def test_token_streams_are_refused():
    tokens = torch.zeros(5, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="streams of tokens are for one process"):
        next(iter(_Share([(tokens, tokens)], 0, 1, "cpu", True)))


def test_a_group_of_one_changes_nothing(tmp_path):
    plain = learn(clip=0.2).state_dict()
    with process_group(device="cpu") as rank:
        assert rank == 0
        learner = learn([Distributed(Checkpoint(tmp_path / "run.pt", MARK))], clip=0.2)
    assert torch.equal(flat(learner.state_dict()), flat(plain)) and torch.equal(rows(learner.state_dict()), rows(plain))
    assert not torch.distributed.is_initialized()


def test_a_second_fit_goes_on():
    with process_group(device="cpu"):
        learner = learn([Distributed()], epochs=2)
        assert isinstance(learner.train, _Share) and isinstance(learner.train.batches, list)
        learner.fit(4)
        assert isinstance(learner.train.batches, list), "shared once, not twice"
    assert torch.equal(flat(learner.state_dict()), flat(learn().state_dict()))


@pytest.mark.parametrize("damage", ["bytes", "mark"])
def test_a_checkpoint_that_cannot_be_used_is_named(damage, tmp_path, capsys):
    kept = tmp_path / "run.pt"
    learn([Checkpoint(kept, MARK if damage == "bytes" else {})], epochs=1)
    if damage == "bytes":
        kept.write_bytes(kept.read_bytes()[:-5])
    with process_group(device="cpu"), pytest.raises(RuntimeError, match="run.pt is damaged, or has another mark"):
        learn([Distributed(Checkpoint(kept, MARK))])


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="process 2 of this machine, which has 1 GPUs.*--nproc-per-node 1"):
        with process_group(device="cuda"):
            pass


def test_other_errors_keep_their_names():
    watched = Distributed()
    with pytest.raises(RuntimeError, match="^shapes"):
        with watched._watch(None):
            raise RuntimeError("shapes do not fit")
    assert issubclass(ProcessLost, RuntimeError)


def test_nbutils_run_refuses_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", "cifar10", "adamw-30", "--size", "smoke"]) == 1
    assert "call nbutils run without torchrun, once for each cell" in capsys.readouterr().err


# --- wrong calls, by one process ---------------------------------------------------------------------
@pytest.mark.parametrize("wrong, said", [({"checkpoint": "run.pt"}, r"checkpoint is 'run.pt': give a Checkpoint\(path, mark\)"),
                                         ({"seed": "a"}, "seed is 'a': give a whole number")])
def test_wrong_arguments_are_refused_when_it_is_made(wrong, said):
    with pytest.raises(TypeError, match=said):
        Distributed(**wrong)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_timeout_is_above_zero(timeout):
    with pytest.raises(ValueError, match="timeout is .*: give seconds above 0"), process_group(timeout, "cpu"):
        pass


def test_one_group_and_one_callback():
    with process_group(device="cpu"):
        with pytest.raises(ValueError, match="there is a process group already"), process_group(device="cpu"):
            pass
        with pytest.raises(RuntimeError, match="two callbacks of the kind Distributed: give one"):
            learn([Distributed(), Distributed()])
        learn([Distributed()], epochs=1)                                # and the group is as it was
