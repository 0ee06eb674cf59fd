import pytest
import torch

from data.splits import binarize, binarize_fixed, split_validation, stratified_order

LABELS = torch.arange(1000) % 10


def test_order_is_a_permutation_in_which_classes_take_turns() -> None:
    order = stratified_order(LABELS)
    assert order.sort().values.tolist() == list(range(1000))
    for ten in LABELS[order].split(10):
        assert sorted(ten.tolist()) == list(range(10))


def test_order_keeps_unequal_proportions() -> None:
    labels = torch.cat([torch.zeros(750), torch.ones(250)]).long()
    ones = labels[stratified_order(labels)].view(-1, 100).sum(dim=1)
    assert ((ones - 25).abs() <= 1).all()


def test_order_is_fixed() -> None:
    assert stratified_order(LABELS)[:5].tolist() == [28, 181, 260, 422, 543]
    torch.manual_seed(5)
    assert torch.equal(stratified_order(LABELS), stratified_order(LABELS))


@pytest.mark.parametrize("validation", [0, 1, 200, 999])
def test_validation_split_is_disjoint_and_complete(validation: int) -> None:
    training, held_out = split_validation(LABELS, validation)
    assert (len(training), len(held_out)) == (1000 - validation, validation)
    assert torch.cat([training, held_out]).sort().values.tolist() == list(range(1000))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("fixed", [True, False])
def test_pixels_are_one_with_probability_of_their_level(dtype: torch.dtype, fixed: bool) -> None:
    for level in (0, 1, 100, 254, 255):
        images = torch.full((100, 784), level, dtype=torch.uint8)
        if dtype != torch.uint8:
            images = images.to(dtype) / 255
        generator = torch.Generator().manual_seed(level)
        binary = binarize_fixed(images, stream=0) if fixed else binarize(images, generator)
        assert set(binary.unique().tolist()) <= {0, 1}
        probability = level / 255
        error = (probability * (1 - probability) / binary.numel()) ** 0.5
        assert abs(binary.double().mean().item() - probability) <= 5 * error


def test_fixed_binarization_is_fixed_and_depends_on_the_place_of_an_image_alone() -> None:
    images = torch.full((100, 784), 128, dtype=torch.uint8)
    binary = binarize_fixed(images, stream=0)
    assert binary[0, :12].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0]
    torch.manual_seed(5)
    assert torch.equal(binarize_fixed(images[:7], stream=0), binary[:7])
    assert not torch.equal(binarize_fixed(images, stream=1), binary)
    assert not torch.equal(binary[0], binary[1])


def test_dynamic_binarization_follows_its_generator() -> None:
    images = torch.full((2, 784), 128, dtype=torch.uint8)
    draws = [binarize(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0].dtype == torch.float32
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
