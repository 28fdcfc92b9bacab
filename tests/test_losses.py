"""Each loss against explicit loops; what every registered loss must do; a loss of another package."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from onceover.base.registry import RegistryError
from onceover.configs.schema import ModelConfig
from onceover.heads.checkpoint import load_run
from onceover.heads.losses import LOSSES, sigmoid
from onceover.heads.losses.contrastive import contrastive_loss
from onceover.heads.training import fit


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def slow(images, texts, image_of_text, temperature):
    """The formula of the docstring, term by term."""
    total = 0.0
    s = [[float(i @ t) / temperature for t in texts] for i in images]
    for t, i in enumerate(image_of_text.tolist()):
        others = [u for u, owner in enumerate(image_of_text.tolist()) if owner != i]
        to_text = -math.log(math.exp(s[i][t]) / (math.exp(s[i][t]) + sum(math.exp(s[i][u]) for u in others)))
        to_image = -math.log(math.exp(s[i][t]) / sum(math.exp(row[t]) for row in s))
        total += (to_text + to_image) / 2
    return total / len(image_of_text)


@pytest.mark.parametrize("owners", [[0, 1, 2], [0, 0, 1, 2, 2, 2], [2, 0, 1, 0], [0, 0, 0, 1, 2]])
@pytest.mark.parametrize("temperature", [0.05, 0.07, 1.0])
def test_it_equals_the_formula_written_out(owners, temperature):
    images, texts, owners = unit(3, 8), unit(len(owners), 8, seed=1), torch.tensor(owners)
    assert float(contrastive_loss(images, texts, owners, temperature)) == pytest.approx(
        slow(images, texts, owners, temperature)
    )


def test_with_one_caption_a_picture_it_is_clips_loss():
    images, texts = unit(16, 8), unit(16, 8, seed=1)
    logits = images @ texts.T / 0.07
    clip = (F.cross_entropy(logits, torch.arange(16)) + F.cross_entropy(logits.T, torch.arange(16))) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, torch.arange(16), 0.07), clip)


def test_trap_captions_of_the_same_picture_are_no_negatives():
    images, texts = unit(3, 8), unit(4, 8, seed=1)
    owners = torch.tensor([0, 0, 1, 2])
    before = contrastive_loss(images, texts, owners, 0.1)
    # the other caption of image 0 moves onto the picture: the first caption's own terms must not change
    moved = texts.clone()
    moved[1] = images[0]

    def of_first(vectors):
        alone = contrastive_loss(images, vectors[[0, 2, 3]], torch.tensor([0, 1, 2]), 0.1)
        return float(alone)

    assert of_first(texts) == of_first(moved)
    assert float(contrastive_loss(images, moved, owners, 0.1)) < float(before)


def test_trap_perfect_alignment_costs_less_than_collapse():
    eye = torch.eye(8, dtype=torch.float64)
    same = eye[:1].expand(8, 8)
    owners = torch.arange(8)
    assert float(contrastive_loss(eye, eye, owners, 0.07)) < 1e-5
    assert float(contrastive_loss(same, same, owners, 0.07)) == pytest.approx(math.log(8))


@pytest.mark.parametrize("owners", [[0, 0, 0], [0]])
def test_a_batch_of_one_picture_has_no_negatives_and_finite_gradients(owners):
    images, texts = unit(1, 4).requires_grad_(), unit(len(owners), 4, seed=1).requires_grad_()
    loss = contrastive_loss(images, texts, torch.tensor(owners), 0.07)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert torch.isfinite(images.grad).all()
    assert torch.isfinite(texts.grad).all()


def test_the_lengths_of_vectors_play_no_part():
    images, texts, owners = unit(3, 8), unit(4, 8, seed=1), torch.tensor([0, 0, 1, 2])
    scaled = images * torch.tensor([[0.1], [1.0], [30.0]]), texts * torch.tensor([[2.0], [0.5], [9.0], [1.0]])
    torch.testing.assert_close(
        contrastive_loss(*scaled, owners, 0.1), contrastive_loss(images, texts, owners, 0.1), rtol=1e-9, atol=0
    )
    none = torch.zeros(1, 8, dtype=torch.float64).requires_grad_()
    contrastive_loss(none, texts, torch.zeros(4, dtype=int), 0.1).backward()
    assert torch.isfinite(none.grad).all()


def test_gradients_are_right():
    images, texts = (3 * unit(3, 4)).requires_grad_(), (0.2 * unit(5, 4, seed=1)).requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    owners = torch.tensor([0, 1, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda i, t, s: contrastive_loss(i, t, owners, s), (images, texts, temperature))


def test_float32_at_a_small_temperature_stays_finite():
    images = torch.from_numpy(np.eye(64, dtype=np.float32))
    loss = contrastive_loss(images, -images, torch.arange(64), 0.001)
    assert torch.isfinite(loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card")
def test_trap_a_card_gives_the_same_bits_again():
    images, texts = (torch.randn(8, rows, 64, device="cuda") for rows in (256, 1280))
    owners = torch.arange(256, device="cuda").repeat_interleave(5)
    gradients = []
    for _ in range(20):
        leaves = images.clone().requires_grad_(), texts.clone().requires_grad_()
        contrastive_loss(*leaves, owners, 0.07).sum().backward()
        gradients.append(leaves)
    for again in gradients[1:]:
        assert all(torch.equal(one.grad, other.grad) for one, other in zip(gradients[0], again, strict=True))


def test_the_sigmoid_loss_equals_its_formula_written_out():
    images, texts = unit(3, 8), unit(4, 8, seed=1)
    owners = [2, 0, 0, 1]
    total = 0.0
    for caption, owner in enumerate(owners):
        for image in range(3):
            logit = float(images[image] @ texts[caption]) / 0.1 - 3.0
            total += math.log1p(math.exp(-logit if image == owner else logit))
    scalars = {"log_temperature": torch.tensor(0.1).double().log(), "bias": torch.tensor(-3.0).double()}
    loss = sigmoid.loss(images, 7 * texts, torch.tensor(owners), scalars)
    assert float(loss) == pytest.approx(total / 4)


@pytest.fixture(params=LOSSES.names())
def registered(request):
    return LOSSES.load(request.param)


def test_each_loss_gives_a_number_per_stacked_pair_of_heads_and_the_true_gradient(registered):
    owners = torch.tensor([0, 1, 1, 2])
    scalars = registered.scalars(ModelConfig(temperature=0.2))
    names = list(scalars)
    images = torch.stack([unit(3, 4, seed=seed) for seed in (0, 1)]).requires_grad_()
    texts = torch.stack([unit(4, 4, seed=seed) for seed in (2, 3)]).requires_grad_()
    values = [torch.full((2,), scalars[name].start / 3, dtype=torch.float64, requires_grad=True) for name in names]

    def measured(images, texts, *values):
        return registered.loss(images, texts, owners, dict(zip(names, values, strict=True)))

    losses = measured(images, texts, *values)
    assert losses.shape == (2,)
    assert torch.autograd.gradcheck(measured, (images, texts, *values))
    alone = measured(images[1], texts[1], *(value[1] for value in values))
    torch.testing.assert_close(alone, losses[1])
    longer = measured(3 * images, 5 * texts, *values)  # vectors may have any length
    torch.testing.assert_close(longer, losses)


def test_each_loss_says_what_it_learns_and_shows(registered):
    for name, scalar in registered.scalars(ModelConfig(learn_temperature=True)).items():
        assert name.isidentifier()
        assert scalar.low <= scalar.start <= scalar.high
    scalars = {name: torch.tensor([scalar.start]) for name, scalar in registered.scalars(ModelConfig()).items()}
    assert all(values.shape == (1,) for values in registered.shown(scalars).values())


@pytest.mark.parametrize("name", LOSSES.names())
def test_heads_are_fitted_with_each_loss_and_found_again(store, tmp_path, fit_config, changed, name):
    config = changed(fit_config, training={"loss": name, "num_epochs": 12, "members": 2})
    made = fit(store, tmp_path / "run", config)
    assert made["selection"]["rsum"] > 0
    run = load_run(tmp_path / "run")
    assert [member.loss for member in run.heads.members] == [name, name]
    columns = (tmp_path / "run/history.csv").read_text().splitlines()[0].split(",")
    scalars = {key: torch.tensor(0.0) for key in run.heads.members[0].scalars}
    assert {*LOSSES.load(name).shown(scalars)} <= {*columns}


OUTSIDE = """
from onceover.heads.losses import Scalar

def scalars(config):
    return {"scale": Scalar(10.0, True, 1.0, 100.0)}

def shown(scalars):
    return {"scale": scalars["scale"]}

def loss(images, texts, image_of_text, scalars):
    cosines = texts @ images.transpose(-1, -2) / texts.norm(dim=-1, keepdim=True)
    cosines = cosines / images.norm(dim=-1).unsqueeze(-2)
    own = cosines[..., range(len(image_of_text)), image_of_text]
    return (scales(scalars) * (1 - own)).mean(-1) + 0 * cosines.sum((-2, -1))

def scales(scalars):
    return scalars["scale"].unsqueeze(-1)
"""


def test_another_package_adds_a_loss(store, tmp_path, fit_config, changed, outside):
    outside("onceover.losses", "cosine", OUTSIDE)
    assert "cosine" in LOSSES.names()
    config = changed(fit_config, training={"loss": "cosine", "num_epochs": 1})
    fit(store, tmp_path / "run", config)
    assert "scale" in load_run(tmp_path / "run").heads.scalars


def test_an_unknown_loss_is_refused_before_anything_is_written(store, tmp_path, fit_config, changed):
    with pytest.raises(RegistryError, match="there is no loss 'contrastve'; did you mean 'contrastive'"):
        fit(store, tmp_path / "run", changed(fit_config, training={"loss": "contrastve"}))
    assert not (tmp_path / "run").exists()
