"""The contrastive loss against explicit loops, and what it must not do."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from onceover.heads.losses import contrastive_loss


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
    # the other caption of picture 0 moves onto the picture: the first caption's own terms must not change
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
