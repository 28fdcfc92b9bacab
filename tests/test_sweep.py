"""Sweeps: what becomes of a trial does not depend on its company, halving keeps who could win, kills cost little."""

import csv
import functools
import json

import numpy as np
import pytest
import torch
import yaml

from onceover.base.files import read_record, write_record
from onceover.base.worker import Worker, WorkerError
from onceover.configs.schema import Config, ConfigError, ModelConfig, TrainingConfig, load_config
from onceover.heads import stacking
from onceover.heads import sweep as module
from onceover.heads.batches import Batch
from onceover.heads.checkpoint import load_run
from onceover.heads.embed import embed
from onceover.heads.grid import Setting, expand, trial_name
from onceover.heads.losses import contrastive
from onceover.heads.noise import another, another_view, augment, draw_noise
from onceover.heads.schedule import learning_rate
from onceover.heads.seeds import seed_for
from onceover.heads.stacking import train_epochs
from onceover.heads.sweep import SweepError, sweep, sweep_share
from onceover.heads.training import fit
from onceover.heads.training_data import TrainingData
from onceover.heads.trial_files import TrialFileError
from onceover.heads.trials import same_batches, trial_memory
from onceover.retrieval.leaderboard import Judge, LeaderboardError, leaderboard, leaderboard_table
from onceover.retrieval.metrics import quality, report
from onceover.workflows import sweep as sweep_and_rank

SHORT = ["training.num_epochs=4", "training.batch_size=12", "training.check_every=2", "model.embedding_dim=8"]


def config(**changes) -> Config:
    """Settings for the drawn store; ``model_dropout=0.3`` and the like change one."""
    groups: dict = {
        "model": {"embedding_dim": 8, "dropout": 0.4, "learn_temperature": False},
        "training": {"num_epochs": 4, "batch_size": 12, "check_every": 2, "refit": False, "cca": False},
    }
    for name, value in changes.items():
        section, _, key = name.partition("_")
        groups[section][key] = value
    return Config(model=ModelConfig(**groups["model"]), training=TrainingConfig(**groups["training"]))


@pytest.fixture
def data(store):
    return TrainingData(store, store.roles(), torch.device("cpu"), 2**34)


def settings(*overrides, grid, seeds=1, sample=None):
    return expand(None, [*SHORT, *overrides], grid, seeds, sample)


COMPANY = [
    config(),
    config(model_temperature=0.2),
    config(model_dropout=0.1),
    config(model_dropout=0.0),
    config(model_block_dropout=0.4),
    config(model_variation=0.5),
    config(model_embedding_dim=24),
    config(model_head="mlp"),
    config(model_learn_temperature=True),
    config(training_learning_rate=0.01, training_weight_decay=0.0),
    config(training_num_epochs=9, training_warmup=0.5),
]


def test_a_trial_comes_out_as_if_it_were_fitted_alone_dropout_included(data, store, tmp_path):
    together = [data.new_trial(each) for each in COMPANY]
    train_epochs(together, *data.chunks_of(COMPANY[0]), 4)
    for trial in together:
        alone = data.new_trial(trial.config)
        train_epochs([alone], *data.chunks_of(trial.config), 4)
        assert alone.history[-1]["loss"] == pytest.approx(trial.history[-1]["loss"], rel=1e-5)
        for name, tensor in alone.heads.state_dict().items():
            torch.testing.assert_close(trial.heads.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    fit(store, tmp_path / "run", COMPANY[0])
    best = load_run(tmp_path / "run").heads
    judged = quality(*embed(best, store, store.roles().selection))
    trial = data.new_trial(COMPANY[0])
    judge = Judge()
    for _ in range(2):
        train_epochs([trial], *data.chunks_of(COMPANY[0]), 2)
        trial.record(judge.measure("t", *embed(trial.heads, store, store.roles().selection)))
    assert trial.best_rsum == pytest.approx(judged["rsum"])
    other = data.new_trial(config(training_seed=1))
    train_epochs([other], *data.chunks_of(other.config), 4)
    assert not torch.allclose(other.heads.image.weight, together[0].heads.image.weight, atol=0.05)


@pytest.fixture
def stack_sizes(monkeypatch):
    """How many trials each new stack has."""
    sizes, real = [], stacking.Stack.__init__
    monkeypatch.setattr(stacking.Stack, "__init__", lambda self, trials, steps: sizes.append(len(trials))
                        or real(self, trials, steps))  # fmt: skip
    return sizes


@pytest.mark.parametrize("stacks", [[1, 1, 1], [3]])  # as on a processor, as on a card
def test_members_share_their_batches_and_nothing_else(data, monkeypatch, stack_sizes, stacks):
    """Trained together each comes out as alone, from a start and with noise of its own."""
    settings = config(training_members=3)
    if stacks == [3]:
        monkeypatch.setattr(stacking, "_shape", lambda trial: trial.config.model.embedding_dim)
    together = [data.new_trial(settings, member) for member in range(3)]
    train_epochs(together, *data.chunks_of(settings), 3)
    assert stack_sizes == stacks
    for member, trial in enumerate(together):
        alone = data.new_trial(settings, member)
        train_epochs([alone], *data.chunks_of(settings), 3)
        assert alone.history[-1]["loss"] == pytest.approx(trial.history[-1]["loss"], rel=1e-5)
        for name, tensor in alone.heads.state_dict().items():
            torch.testing.assert_close(trial.heads.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    same_start = data.new_trial(settings, 1)
    same_start.heads.load_state_dict(data.new_trial(settings).heads.state_dict())
    train_epochs([same_start], *data.chunks_of(settings), 3)
    for one in (together[1], same_start):  # for either reason, by more than rounding
        assert not torch.allclose(one.heads.image.weight, together[0].heads.image.weight, atol=0.01)


def test_a_stack_is_split_where_it_would_leave_the_processors_caches(data, monkeypatch, stack_sizes):
    monkeypatch.setattr(stacking, "CPU_WIDTH", 20)
    trials = [data.new_trial(config(model_temperature=value)) for value in (0.03, 0.05, 0.07)]
    trials.append(data.new_trial(config(model_embedding_dim=24)))
    train_epochs(trials, *data.chunks_of(config()), 1)
    assert stack_sizes == [2, 1, 1]


def test_a_step_is_that_of_torchs_adamw_on_the_plain_loss(data):
    """Against a loop with nothing stacked, no fused step and autograd's own gradient."""
    settings = config(model_dropout=0.0, model_variation=0.0, model_learn_temperature=True, training_num_epochs=3)
    trial, reference = data.new_trial(settings), data.new_trial(settings).heads
    chunks, image_index = data.chunks_of(settings)
    train_epochs([trial], chunks, image_index, 3)
    matrices = [parameter for parameter in reference.parameters() if parameter.requires_grad and parameter.ndim > 1]
    vectors = [parameter for parameter in reference.parameters() if parameter.requires_grad and parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=False, foreach=False)
    step, total = 0, 3 * stacking.steps_per_epoch(chunks, image_index, settings.training)
    key = stacking._noise_key(trial)
    for epoch in range(3):
        order, noise = (np.random.default_rng(seed_for(0, name, epoch)) for name in ("order", "noise"))
        for images, texts, owners in stacking._batches(chunks, image_index, settings.training, order, {key: noise}):
            augmented = (side.features([key], settings.model) for side in (images, texts))
            left, right, scalars = reference(*augmented)
            left, right = (torch.nn.functional.normalize(side, dim=-1) for side in (left, right))
            logits = right @ left.T / scalars["log_temperature"].exp()
            own = torch.nn.functional.one_hot(owners, len(left)).bool()
            others = logits.masked_fill(own, -torch.inf).logsumexp(0)[owners]
            loss = (torch.logaddexp(logits[own], others) - logits[own]).mean()
            loss = (loss + torch.nn.functional.cross_entropy(logits, owners)) / 2
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, settings.training)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(dict(trial.heads.named_parameters())[name], parameter, rtol=1e-3, atol=1e-4)


def product_precision():
    """How float32 matrices are multiplied: by CPUs and GPUs, or in torch before 2.9 by all."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return torch.get_float32_matmul_precision()
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def test_products_are_of_float32_unless_asked_for_and_only_while_a_step_is_taken(data, monkeypatch):
    seen, real = [], stacking.Stack.step

    def step(*arguments):
        seen.append(product_precision())
        real(*arguments)

    monkeypatch.setattr(stacking.Stack, "step", step)
    before = product_precision()
    for dtype, expected in (("float32", (("ieee", "ieee"), "highest")), ("auto", (("bf16", "tf32"), "medium"))):
        trial = data.new_trial(config(training_dtype=dtype))
        train_epochs([trial], *data.chunks_of(trial.config), 1)
        assert set(seen) <= set(expected)
        assert len(set(seen)) == 1
        assert product_precision() == before
        seen.clear()
    assert same_batches(config()) != same_batches(config(training_dtype="auto"))


def test_dropout_leaves_out_the_share_it_is_told_and_keeps_the_mean():
    """Where images have blocks, they lose these as well as single numbers; captions have none."""
    rows = np.arange(400)
    batch = Batch(rows, rows * 0, rows, rows)
    for has_blocks in (False, True):
        noises = draw_noise(np.random.default_rng(0), batch, 1, (500, 500), has_blocks=has_blocks)
        for noise, lost in zip(noises, (0.3 * has_blocks, 0.0), strict=True):
            side = functools.partial(augment, torch.ones(400, 500), rows, noise, 0.0, block_dropout=0.3)
            for rate in (0.0, 0.25, 0.5, 0.75):
                kept = side(rate)
                left = (1 - rate) * (1 - lost)
                assert float((kept != 0).float().mean()) == pytest.approx(left, rel=0.03)
                assert float(kept.mean()) == pytest.approx(1, rel=0.03)
            assert ((side(0.5) != 0) <= (side(0.25) != 0)).all()  # one draw for all rates


def test_the_block_that_is_left_out_goes_on_at_the_beginning():
    rows = np.arange(50)
    noise, _ = draw_noise(np.random.default_rng(0), Batch(rows, rows * 0, rows, rows), 1, (8, 1), has_blocks=True)
    lost = augment(torch.ones(50, 8), rows, noise, 0.0, 0.0, 0.5) == 0
    for row, start in zip(lost, noise.block_start, strict=True):
        assert sorted(np.flatnonzero(row.numpy())) == sorted((start + np.arange(4)) % 8)
    assert set(noise.block_start) == set(range(8))
    half = noise.part(np.array([3, 1]))
    np.testing.assert_array_equal(half.block_start, noise.block_start[[3, 1]])


def test_augmented_features_are_shared_by_trials_that_want_the_same():
    rows = np.arange(4)
    noise, _ = draw_noise(np.random.default_rng(0), Batch(rows, rows * 0, rows, rows), 1, (6, 1), has_blocks=False)
    table = stacking.AugmentedRows(torch.ones(4, 6), rows, {(0, False): noise, (1, False): noise})
    model = ModelConfig()
    assert table.features([(0, False)], model) is table.features([(0, False), (0, False)], model)
    assert table.features([(0, False), (1, False)], model).shape == (2, 4, 6)


def test_variation_adds_a_share_of_what_tells_records_of_another_picture_apart():
    generator = np.random.default_rng(0)
    pictures = np.array([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])
    others = another(pictures, generator)
    assert (pictures[others] == pictures).all()
    assert ((others == np.arange(10)) == (pictures == 1)).all()  # alone
    table = torch.from_numpy(generator.standard_normal((10, 4), np.float32))
    four, ten = np.arange(4), np.arange(10)
    _, noise = draw_noise(generator, Batch(four, four * 0, ten, pictures), 1, (1, 4), has_blocks=False)
    side = functools.partial(augment, table, ten, noise)
    shift = side(1.5, 0.0) - table
    assert torch.equal(side(0.0, 0.0), table)
    torch.testing.assert_close(side(0.5, 0.0) - table, shift / 3)
    both = side(1.5, 0.5)  # dropped out after it was moved, by the same draw as without
    assert torch.equal(both == 0, side(0.0, 0.5) == 0)
    torch.testing.assert_close(both[both != 0], 2 * (table + shift)[both != 0])
    assert sorted(noise.first) == list(range(10))  # each is used once
    assert (pictures[noise.first] == pictures[noise.second]).all()
    for row, first, second in zip(shift, noise.first, noise.second, strict=True):
        difference = table[first] - table[second]
        share = float(row @ difference / (difference @ difference)) if first != second else 0.0
        assert 0 <= share < 1.5
        torch.testing.assert_close(share * difference, row)


def test_another_view_is_another_one_and_each_comes_up():
    views = np.repeat(np.arange(4), 200)
    others = another_view(views, 4, np.random.default_rng(0))
    assert (others != views).all()
    assert set(zip(views, others, strict=True)) == {(a, b) for a in range(4) for b in range(4) if a != b}
    assert (another_view(np.zeros(9, int), 1, np.random.default_rng(0)) == 0).all()


def test_a_diverged_trial_is_written_down_and_harms_no_other(store, tmp_path, monkeypatch):
    real = contrastive.loss

    def poisoned(images, texts, owners, scalars):
        hot = scalars["log_temperature"] > 0
        return real(images, texts, owners, scalars) * torch.where(hot, float("nan"), 1.0)

    monkeypatch.setattr(contrastive, "loss", poisoned)
    points = settings("model.learn_temperature=false", grid=["model.temperature=0.05,2,0.1"])
    judge = Judge()
    results = sweep(store, tmp_path / "s", points, judge)
    named = [(point.values, [trial_name(point.configs[0])]) for point in points]
    assert [results[names[0]]["outcome"] for _, names in named] == ["finished", "diverged", "finished"]
    rows = leaderboard(judge, named, results, "dev")
    assert [row["model.temperature"] for row in rows][-1] == 2
    assert "rsum" not in rows[-1]
    assert leaderboard_table(rows, ["model.temperature"])[-1][-1] == "diverged"
    hot = settings("model.learn_temperature=false", grid=["model.temperature=2,3"])
    results, lost = sweep(store, tmp_path / "hot", hot, Judge(), halving=True), [trial_name(p.configs[0]) for p in hot]
    assert [results[name]["outcome"] for name in lost] == ["diverged", "diverged"]
    with pytest.raises(LeaderboardError, match="no setting came to its end: all diverged"):
        leaderboard(Judge(), [({}, [name]) for name in lost], results, "dev")
    monkeypatch.undo()
    clean = Judge()
    sweep(store, tmp_path / "clean", [points[0], points[2]], clean)
    for names in (named[0][1], named[2][1]):
        for one, other in zip(judge.of(names)[0], clean.of(names)[0], strict=True):
            np.testing.assert_array_equal(one.above, other.above)


def test_what_a_grid_may_hold():
    points = settings(grid=["model.temperature=0.03, 0.07", "model.head=linear,mlp"], seeds=2)
    assert [point.values for point in points] == [
        {"model.temperature": 0.03, "model.head": "linear"},
        {"model.temperature": 0.03, "model.head": "mlp"},
        {"model.temperature": 0.07, "model.head": "linear"},
        {"model.temperature": 0.07, "model.head": "mlp"},
    ]
    assert [one.training.seed for one in points[1].configs] == [0, 1]
    assert len({trial_name(one) for point in points for one in point.configs}) == 8
    some = settings(grid=["model.temperature=0.03,0.05,0.07", "model.embedding_dim=4,8,16"], sample=4)
    assert len(some) == 4
    assert some == settings(grid=["model.temperature=0.03,0.05,0.07", "model.embedding_dim=4,8,16"], sample=4)
    assert len(settings(grid=["model.temperature=0.1,0.10,1e-1"])) == 1


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["model.temprature=0.1"], "unknown key model.temprature; did you mean model.temperature"),
        (["model.temperature=0.1,cold"], "model.temperature is 'cold'; it must be a number"),
        (["model.temperature=0.1,99"], "model.temperature is 99.0; use 0.001 to 10"),
        (["model.temperature"], "is no axis of a grid; write key=v1,v2"),
        (
            [
                f"{key}={','.join(map(str, range(1, 101)))}"
                for key in ("model.embedding_dim", "training.patience", "training.batch_size")
            ],
            "the grid has 1,000,000 settings; at most 100,000 are swept: name fewer values",
        ),
        (["model.temperature=0.1,,0.2"], "is no axis of a grid"),
        (["model.head=mlp", "model.head=linear"], "stands in the grid twice"),
        (["training.seed=1,2"], "say how many seeds with --seeds"),
        (["training.members=1,3"], "a sweep ranks single pairs of heads"),
        (["model.rerank=none,qbnorm"], "it changes nothing in the heads"),
        (["training.refit=true,false"], "the validation images rank the settings"),
        (["finetune.num_epochs=1,2"], "finetune.num_epochs changes nothing in heads that a sweep fits"),
        (["num_epochs=1,2"], "names no section; write section.key=value"),
        (["other.views=1,2"], "unknown key other"),
        (["extract.views=1,2"], "changes the features; make a store for each value"),
        ([], "the grid is empty"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_is_fitted(grid, message):
    with pytest.raises(ConfigError, match=message):
        settings(grid=grid)


class Strict(Judge):
    """Lets the better half go on, so that a few images suffice for something to be dropped; interrupted at a look."""

    def __init__(self, looks=10**9):
        super().__init__()
        self.left = looks

    def measure(self, *arguments):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().measure(*arguments)

    def contenders(self, trials, share):
        found = super().contenders(trials, 1.0)  # all, best first
        return found[: max(1, len(found) // 2)]


@pytest.mark.parametrize(("halving", "looks"), [(False, 11), (True, 1), (True, 5), (True, 7), (True, 9), (True, 10)])
def test_trap_a_killed_sweep_goes_on_with_what_was_finished(store, tmp_path, monkeypatch, halving, looks):
    monkeypatch.setattr(module, "AT_ONCE", {"cpu": 2})
    grid = ["model.temperature=0.05,0.1,0.3", "training.learning_rate=0.001,0.1"]
    points = settings("model.learn_temperature=false", "training.num_epochs=8", grid=grid)
    whole = Strict()
    expected = sweep(store, tmp_path / "whole", points, whole, halving=halving)
    assert halving == ("dropped" in {each["outcome"] for each in expected.values()})
    with pytest.raises(KeyboardInterrupt):
        sweep(store, tmp_path / "killed", points, Strict(looks), halving=halving)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("trials/*")}
    if looks > 4:
        assert any(name.endswith(".json" if not halving else ".pt") for name in kept)
    trained = []
    real = module.train_epochs
    monkeypatch.setattr(
        module, "train_epochs", lambda trials, *rest: trained.extend(map(id, trials)) or real(trials, *rest)
    )
    again = Strict()
    results = sweep(store, tmp_path / "killed", points, again, halving=halving)
    for name, time in kept.items():
        if name.endswith(".json"):
            assert (tmp_path / "killed/trials" / name).stat().st_mtime_ns == time
    plain = [{name: {k: each[k] for k in ("outcome", "epochs", "best_epoch")} for name, each in found.items()}
             for found in (expected, results)]  # fmt: skip
    assert plain[0] == plain[1]
    for name in results:
        for one, other in zip(whole.of([name])[0], again.of([name])[0], strict=True):
            np.testing.assert_array_equal(one.above, other.above)
    assert not list((tmp_path / "killed/trials").glob("*.pt"))
    trained.clear()
    assert sweep(store, tmp_path / "killed", points, Strict(), halving=halving) == results
    assert not trained  # nothing is fitted twice


def test_halving_drops_the_hopeless_and_gives_the_rest_their_other_seeds(store, tmp_path, messages):
    grid = ["training.learning_rate=0.003,1e-9", "model.temperature=0.05,0.1"]
    points = settings("model.learn_temperature=false", "training.num_epochs=16", "training.check_every=1",
                      "training.patience=0", grid=grid, seeds=2)  # fmt: skip

    judge = Strict()
    results = sweep(store, tmp_path / "s", points, judge, halving=True)
    assert "after 2 epochs 2 of 4 settings are still in the race" in messages
    outcomes = [results[trial_name(point.configs[0])]["outcome"] for point in points]
    assert outcomes.count("finished") == 1
    dropped = [results[trial_name(p.configs[0])] for p, o in zip(points, outcomes, strict=True) if o == "dropped"]
    assert sorted(each["epochs"] for each in dropped) == [2, 2, 4]
    winner = points[outcomes.index("finished")]
    assert results[trial_name(winner.configs[1])]["epochs"] == 16
    assert len(results) == 5  # no other seed of a dropped one
    rows = leaderboard(judge, [(p.values, [trial_name(c) for c in p.configs]) for p in points], results, "dev")
    assert (rows[0]["verdict"], rows[0]["seeds"], rows[1]["verdict"]) == ("best", 2, "dropped")


def test_of_many_ties_at_the_end_only_the_best_get_their_other_seeds(store, tmp_path):
    points = settings("model.learn_temperature=false", "training.num_epochs=4", "training.check_every=4",
                      grid=["model.temperature=0.05,0.051,0.052,0.053"], seeds=2)  # fmt: skip
    judge = Judge()
    results = sweep(store, tmp_path / "s", points, judge, halving=True)
    assert len(results) == 4 + 2
    rows = leaderboard(judge, [(p.values, [trial_name(c) for c in p.configs]) for p in points], results, "dev")
    assert [row["seeds"] for row in rows] == [2, 2, 1, 1]
    assert {row["verdict"] for row in rows[1:]} == {"tie"}


def test_rungs_are_epochs_that_are_looked_at_each_once():
    found = [module._rungs(load_config(None, [f"training.num_epochs={epochs}", f"training.check_every={every}"]))
             for epochs, every in ((8, 1), (20, 3), (8, 3), (4, 4), (2, 5))]  # fmt: skip
    assert found == [[1, 2, 4, 8], [3, 6, 12, 20], [3, 6, 8], [4], [2]]


def test_contenders_are_the_best_share_and_all_ties():
    judge = Judge()
    generator = np.random.default_rng(0)
    index = np.repeat(np.arange(300), 2)
    images = generator.standard_normal((300, 32))
    noise = generator.standard_normal((600, 32))
    for name, much, other in (("a", 2.0, 0.0), ("b", 2.0, 0.02), ("c", 4.0, 0.0), ("d", 9.0, 0.0)):
        texts = images[index] + much * noise + other * generator.standard_normal((600, 32))
        judge.measure(name, images / np.linalg.norm(images, axis=1, keepdims=True), texts / 99, index)
    assert sorted(judge.contenders(["a", "b", "c", "d"], 0.25)) == ["a", "b"]  # a tie, though more than a quarter
    assert judge.contenders(["d", "c", "a"], 0.5) == ["a", "c"]
    assert judge.contenders([], 0.5) == []
    # a worse look at the same trial does not replace the best one
    before = judge.of(["a"])[0][0]
    judge.measure("a", images, -images[index], index)
    assert judge.of(["a"])[0][0] is before


def test_ranks_survive_the_disk_and_a_damaged_file_is_named(tmp_path):
    judge = Judge()
    images = np.eye(4)
    measured = judge.measure("t", images, images[[0, 0, 1, 2]], np.array([0, 0, 1, 2]))
    judge.save("t", tmp_path / "t.npz", "origin")
    other = Judge()
    other.load("t", tmp_path / "t.npz", "origin")
    assert report(other.of(["t"]), draws=0)["rsum"] == measured["rsum"]
    whole = (tmp_path / "t.npz").read_bytes()
    for damaged in (b"no", b"", whole[:200]):
        (tmp_path / "t.npz").write_bytes(damaged)
        with pytest.raises(LeaderboardError, match=r"t.npz is missing, damaged or of another trial; remove all files"):
            other.load("t", tmp_path / "t.npz", "origin")


def test_trap_trials_that_were_exchanged_are_refused(store, tmp_path):
    """Their digests are right, and each is a file that a sweep wrote, but of another trial."""
    points = settings("training.num_epochs=2", grid=["model.temperature=0.03,0.05"], seeds=1)
    sweep(store, tmp_path / "s", points, Judge())
    first, second = (tmp_path / "s/trials" / trial_name(point.configs[0]) for point in points)
    for suffix in (".json", ".npz"):
        data = [name.with_suffix(suffix).read_bytes() for name in (first, second)]
        first.with_suffix(suffix).write_bytes(data[1])
        second.with_suffix(suffix).write_bytes(data[0])
    with pytest.raises(TrialFileError, match=r"\.json is of another trial, or of other features; remove all files"):
        sweep(store, tmp_path / "s", points, Judge())
    ranks = first.with_suffix(".npz")
    with pytest.raises(LeaderboardError, match="is missing, damaged or of another trial"):
        Judge().load(first.name, ranks, "of another trial")


def test_groups_are_split_where_memory_or_the_machine_says_so(store, data, tmp_path, monkeypatch):
    sizes = []
    real = module.train_epochs
    monkeypatch.setattr(module, "train_epochs", lambda trials, *rest: sizes.append(len(trials)) or real(trials, *rest))
    points = settings("training.num_epochs=2", grid=["model.embedding_dim=8,16,600"], seeds=1)
    points += settings("training.num_epochs=2", grid=["model.temperature=0.02,0.03,0.05"])
    sweep(store, tmp_path / "a", points, Judge())
    assert sizes == [6]
    sizes.clear()
    monkeypatch.setattr(module, "AT_ONCE", {"cpu": 4})
    sweep(store, tmp_path / "b", points, Judge())
    assert sizes == [4, 2]
    sizes.clear()
    small, _, large = (trial_memory(point.configs[0], data.dims) for point in points[:3])
    assert large > 20 * small
    sweep(store, tmp_path / "c", points, Judge(), memory=module.MIN_MEMORY + int(2.5 * small))
    assert sizes == [2, 2, 1, 1]  # the largest is alone, though nothing that small was asked for
    parameters = sum(tensor.numel() for tensor in data.new_trial(points[0].configs[0]).heads.parameters())
    assert small > 4 * 9 * parameters


def test_halving_never_mixes_with_another_grid_or_way(store, tmp_path):
    points = settings(grid=["model.temperature=0.05,0.1,0.2"])
    sweep(store, tmp_path / "s", points, Judge(), halving=True)
    for other, halving in ((points, False), (points[:2], True)):
        with pytest.raises(SweepError, match="settings that were dropped cannot be taken up again: name a new folder"):
            sweep(store, tmp_path / "s", other, Judge(), halving=halving)
    for uneven in (settings(grid=["training.num_epochs=2,8"]), settings(grid=["training.warmup=0.05,0.5"])):
        with pytest.raises(SweepError, match="check_every and warmup: set training.num_epochs"):
            sweep(store, tmp_path / "t", uneven, Judge(), halving=True)
    sweep(store, tmp_path / "u", points[:2], Judge())
    results = sweep(store, tmp_path / "u", points, Judge())  # without halving a grid may grow
    assert len(results) == 3


def test_a_setting_with_fewer_seeds_does_not_win(data):
    judge, index = Judge(), np.repeat(np.arange(40), 2)
    generator = np.random.default_rng(0)
    images = generator.standard_normal((40, 8))
    for name, noise in (("a0", 0.5), ("a1", 1.5), ("b0", 0.6)):
        judge.measure(name, images, images[index] + noise * generator.standard_normal((80, 8)), index)
    one = {"outcome": "finished", "epochs": 1, "seconds": 1.0}
    rows = leaderboard(
        judge, [({"k": 1}, ["a0", "a1"]), ({"k": 2}, ["b0", "b1"])], dict.fromkeys(("a0", "a1", "b0"), one), "dev"
    )
    assert [(row["k"], row["seeds"]) for row in rows] == [(1, 2), (2, 1)]
    assert rows[0]["rsum"] < rows[1]["rsum"]
    shared = report(judge.of(["b0"]), draws=0)["rsum"] - report(judge.of(["a0"]), draws=0)["rsum"]
    assert rows[1]["difference"] == pytest.approx(shared)


def test_one_of_many_that_are_as_good_as_the_best_is_seldom_lost():
    """At 95 % each, one in four of 32 equal settings would be dropped."""
    lost = 0
    index = np.arange(60)
    for draw in range(12):
        generator, judge = np.random.default_rng(draw), Judge()
        images = generator.standard_normal((60, 12))
        names = [str(number) for number in range(16)]
        for name in names:
            judge.measure(name, images, images + 1.6 * generator.standard_normal((60, 12)), index)
        lost += len(names) - len(judge.contenders(names, 0.01))
    assert lost <= 0.05 * 12 * 16


def test_a_folder_of_something_else_is_left_alone(store, store_file, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    points = settings(grid=["model.temperature=0.05,0.1"])
    with pytest.raises(SweepError, match="is not empty and no sweep; name a new folder"):
        sweep(store, tmp_path / "mine", points, Judge())
    sweep(store, tmp_path / "s", points, Judge())
    request = read_record(tmp_path / "s/sweep.json", "")
    for changed in (request | {"fingerprints": {}}, request | {"format_version": 0}):
        write_record(tmp_path / "s/sweep.json", changed)
        with pytest.raises(SweepError, match="holds a sweep of other features or of another version"):
            sweep(store, tmp_path / "s", points, Judge())


def test_results_that_are_removed_while_a_sweep_runs_are_missed(store, tmp_path):
    class Removing(Judge):
        def save(self, trial, path, origin):
            super().save(trial, path, origin)
            for file in (tmp_path / "s/trials").glob("*.json"):
                file.unlink()

    points = settings(grid=["model.embedding_dim=8,16"])
    with pytest.raises(SweepError, match="lost the results of 1 trials while others were fitted"):
        sweep(store, tmp_path / "s", points, Removing())


def test_the_command_writes_a_table_figures_and_a_config_that_fit_takes(run, fails, store_file, tmp_path, without_pdf):
    out = tmp_path / "sweep"
    axes = ["--grid", "model.temperature=0.05,0.2", "--grid", "model.embedding_dim=8,16", "--seeds", "2"]
    short = [part for override in SHORT[:3] for part in ("--set", override)]
    done = run("sweep", "--store", store_file, "--out", out, *axes, *short, "--test-best")
    assert "measured on dev, 12 images, 60 captions, which chose the best one" in done.stderr
    assert "model.temperature is where a learned temperature starts" in done.stderr
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert len(rows) == 4
    assert rows[0]["verdict"] == "best"
    assert all(float(row["rsum_low"]) <= float(row["rsum"]) <= float(row["rsum_high"]) for row in rows)
    assert float(rows[0]["rsum"]) == max(float(row["rsum"]) for row in rows)
    assert {row["seeds"] for row in rows} == {"2"}
    assert all(float(row["rsum_sd"]) > 0 for row in rows)
    assert {(row["split"], row["pictures"], row["captions"]) for row in rows} == {("dev", "12", "60")}
    for figure in ("heatmap-temperature-embedding_dim", "curves", "parallel"):
        drawn = (out / "figures" / f"{figure}.svg").read_text()
        assert "dev: galleries of 12 images, 60 captions" in drawn
    best = load_config(out / "best.yaml")
    assert best.model.temperature == float(rows[0]["model.temperature"])
    assert best.model.embedding_dim == int(rows[0]["model.embedding_dim"])
    assert yaml.safe_load((out / "best.yaml").read_text())["training"]["num_epochs"] == 4
    assert "which chose the best one: its own numbers here flatter it" in (out / "leaderboard.md").read_text()
    names = {path.name for path in (out / "figures").iterdir()}
    assert {"heatmap-temperature-embedding_dim.png", "curves.svg", "parallel.png"} <= names
    assert json.loads((out / "best/evaluation-test.json").read_text())["split"] == "test"
    assert "multimodal" in done.stdout
    run("plot", "--sweep", out, "--out", tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    (out / "results.csv").write_text("nothing")
    assert "results.csv is missing or damaged" in fails("plot", "--sweep", out, "--out", tmp_path / "again")


def test_a_sweep_that_names_no_epochs_chooses_them_and_its_best_settings_name_them(store_file, tmp_path, one_format):
    sweep_and_rank(store_file, tmp_path / "s", [Setting({}, [config(training_num_epochs=None)])], device="cpu")
    assert load_config(tmp_path / "s/best.yaml") == config(training_num_epochs=30)


def test_a_batch_size_that_is_chosen_and_the_same_one_that_is_named_are_one_setting(store_file, tmp_path, one_format):
    settings = expand(None, [*SHORT, "training.refit=false"], ["training.batch_size=null,64,12"], 1)
    rows = sweep_and_rank(store_file, tmp_path / "s", settings, device="cpu")
    assert sorted(row["training.batch_size"] for row in rows) == [12, 64]
    assert [row["verdict"] for row in rows].count("best") == 1


def test_a_restored_trial_is_the_trial(data):
    trial = data.new_trial(config())
    train_epochs([trial], *data.chunks_of(trial.config), 2)
    state = trial.state()
    other = data.new_trial(config())
    other.restore(state)
    for each in (trial, other):
        train_epochs([each], *data.chunks_of(each.config), 2)
    assert torch.equal(trial.heads.text.weight, other.heads.text.weight)
    assert trial.steps == other.steps == 4 * stacking.steps_per_epoch(*data.chunks_of(config()), config().training)


def test_what_evaluates_the_best_one_keeps_to_the_options_of_the_sweep(
    run, store_file, tmp_path, monkeypatch, one_format
):
    from onceover import workflows

    given = {}
    evaluate = workflows.evaluate

    def spied(*arguments, **options):
        given.update(options)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(workflows, "evaluate", spied)
    short = [part for override in SHORT for part in ("--set", override)]
    limits = ["--memory", "3GiB", "--device", "cpu"]
    run("sweep", "--store", store_file, "--out", tmp_path / "s", "--grid", "model.dropout=0.1,0.2", *short, *limits,
        "--test-best")  # fmt: skip
    assert given == {"store": store_file, "memory": 3 * 2**30, "device": "cpu"}


@pytest.fixture
def judged(tmp_path):
    """A trial's file of ranks."""
    index = np.repeat(np.arange(40), 2)
    images = np.random.default_rng(0).standard_normal((40, 8))
    judge = Judge()
    judge.measure("a", images, images[index], index)
    judge.save("a", tmp_path / "a.npz", "origin")
    Judge().load("a", tmp_path / "a.npz", "origin")
    return tmp_path / "a.npz"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("i2t_query", lambda rows: rows.astype(np.int32)), ("i2t_query", lambda rows: rows[:-1]),
        ("i2t_query", lambda rows: rows * 2), ("t2i_above", lambda rows: rows + 10**6),
        ("t2i_above", lambda rows: rows - 10**6), ("t2i_level", lambda rows: rows * 0),
        ("t2i_gallery", lambda rows: rows[None]), ("t2i_gallery", lambda rows: -rows),
        ("i2t_group", lambda rows: rows - 1), ("i2t_group", lambda rows: rows + 10**12),
        ("i2t_group", lambda rows: rows.astype(float)), ("t2i_query", lambda rows: rows[:0]),
    ],
)  # fmt: skip
def test_trap_ranks_that_point_elsewhere_are_refused(judged, name, change):
    with np.load(judged) as arrays:
        values = dict(arrays)
    np.savez(judged, **values | {name: change(values[name])})
    with pytest.raises(LeaderboardError, match=r"a.npz is missing, damaged or of another trial; remove all files"):
        Judge().load("a", judged, "origin")


def test_whatever_is_flipped_in_a_file_of_ranks_is_refused_or_as_it_was(judged):
    whole = judged.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(80):
        data = bytearray(whole)
        data[int(generator.integers(len(data)))] ^= 1 << int(generator.integers(8))
        judged.write_bytes(data)
        try:
            Judge().load("a", judged, "origin")
        except LeaderboardError as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("record", [{}, {"outcome": "x"}, {"outcome": "finished", "epochs": "3", "seconds": 1.0}, []])
def test_a_damaged_record_of_a_trial_is_one_line(record):
    with pytest.raises(LeaderboardError, match="the record of trial a is damaged; remove all files of that name"):
        leaderboard(Judge(), [({}, ["a"])], {"a": record}, "dev")


def test_workers_of_a_sweep_share_its_stacks_and_the_last_call_ranks_what_all_fitted(store, tmp_path, monkeypatch):
    grid = ["model.temperature=0.05,0.1,0.3", "training.learning_rate=0.001,0.01"]
    points = settings("model.learn_temperature=false", grid=grid)
    whole = Strict()
    sweep(store, tmp_path / "whole", points, whole)
    out = tmp_path / "shared"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_epochs", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep_share(store, out, points, Worker(1, 4))
    shares = [sweep_share(store, out, points, Worker(number, 4)) for number in (1, 2, 3)]
    assert [share.trained for share in shares] == [2, 2, 2]
    assert shares[0].left == {2: 2, 3: 2}
    assert shares[2].left == {}
    assert sweep_share(store, out, points, Worker(4, 4)).trained == 0, "six trials are three stacks of two"
    monkeypatch.setattr(module, "train_epochs", None)  # nothing is left to train
    last = Strict()
    results = sweep(store, out, points, last)
    assert not (out / "workers.json").exists()
    for name in results:
        for one, other in zip(whole.of([name])[0], last.of([name])[0], strict=True):
            np.testing.assert_array_equal(one.above, other.above)


def test_a_worker_of_a_sweep_that_does_not_fit_the_others_is_refused(store, tmp_path):
    points = settings(grid=["model.temperature=0.05,0.1"])
    sweep_share(store, tmp_path / "s", points, Worker(1, 2))
    with pytest.raises(WorkerError, match="is shared by 2 workers, and this is worker 1/3; start workers 1/2 to 2/2"):
        sweep_share(store, tmp_path / "s", points, Worker(1, 3))
    with pytest.raises(WorkerError, match="is shared by workers of another grid; give this one the command of"):
        sweep_share(store, tmp_path / "s", settings(grid=["model.temperature=0.05,0.2"]), Worker(2, 2))
    assert len(list((tmp_path / "s/trials").glob("*.json"))) == 1


def test_workers_of_a_sweep_say_what_comes_next(run, store_file, tmp_path, monkeypatch, one_format):
    monkeypatch.setattr("sys.argv", ["onceover", "sweep", "--worker=1/2", "--out", "sweeps/a"])
    options = ["sweep", "--store", store_file, "--out", tmp_path / "s", "--grid", "model.temperature=0.05,0.2"]
    options += [part for override in SHORT for part in ("--set", override)]
    lines = run(*options, "--worker", "1/2").stderr.splitlines()
    assert lines[-4:] == [
        "trials fitted by worker 1/2: 1",
        "workers that have trials left: 2/2 (1)",
        "worker 1/2 is done; when all are, run sweep without --worker",
        "next: onceover sweep --out sweeps/a",
    ]
    assert "and so are all others; run sweep without --worker" in run(*options, "--worker", "2/2").stderr
    assert "cannot be combined with --worker" in run(*options, "--worker", "1/2", "--halving", code=2).stderr
    assert "give it to the last call" in run(*options, "--worker", "1/2", "--test-best", code=2).stderr
    assert "wrote results.csv" in run(*options).stderr


def test_trap_no_file_but_the_workers_own_leaves_a_sweeps_folder(store, tmp_path, caplog):
    points = settings(grid=["model.temperature=0.05,0.1"])
    sweep(store, tmp_path / "s", points, Judge())
    notes = tmp_path / "s/workers.json"
    for text in ("notes", '{"workers": 2}'):
        notes.write_text(text)
        caplog.clear()
        sweep(store, tmp_path / "s", points, Judge())
        assert notes.read_text() == text
        assert f"{notes} is damaged, or not this program's, and is left as it is; remove it before" in caplog.text


def test_a_sweep_takes_an_empty_folder_as_it_is(store, tmp_path):
    """A mounted disk cannot be replaced by a folder, and a folder of several users keeps its permissions."""
    folder = tmp_path / "s"
    folder.mkdir()
    folder.chmod(0o2770)
    before = folder.stat()
    sweep_share(store, folder, settings(grid=["model.temperature=0.05,0.1"]), Worker(1, 2))
    assert (folder.stat().st_ino, folder.stat().st_mode) == (before.st_ino, before.st_mode)
    assert (folder / "sweep.json").is_file()


def test_trap_a_trial_that_another_process_ended_is_not_written_again(store, tmp_path, monkeypatch):
    points = settings(grid=["model.temperature=0.05,0.1"])
    out = tmp_path / "s"
    real = module.train_epochs
    written = {}

    def overtaken(*arguments, **options):
        result = real(*arguments, **options)
        if not written:
            monkeypatch.setattr(module, "train_epochs", real)
            sweep(store, out, points, Judge())
            written.update({path: path.stat().st_ino for path in (out / "trials").iterdir() if path.suffix != ".lock"})
        return result

    monkeypatch.setattr(module, "train_epochs", overtaken)
    sweep_share(store, out, points, Worker(1, 1))
    assert len(written) == 4
    assert {path: path.stat().st_ino for path in written} == written
