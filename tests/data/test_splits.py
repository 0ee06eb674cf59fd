import pytest
import torch

from data.splits import binarize_fixed, split_validation, stratified_order

LABELS = torch.arange(1000) % 10


def test_the_order_is_a_fixed_permutation_in_which_classes_take_turns() -> None:
    torch.manual_seed(5)
    order = stratified_order(LABELS)
    assert order[:5].tolist() == [28, 181, 260, 422, 543]
    for ten in LABELS[order].split(10):
        assert sorted(ten.tolist()) == list(range(10))
    labels = torch.cat([torch.zeros(750), torch.ones(250)]).long()
    ones = labels[stratified_order(labels)].view(-1, 100).sum(dim=1)
    assert ((ones - 25).abs() <= 1).all()  # unequal proportions stay


@pytest.mark.parametrize("validation", [0, 1, 200, 999])
def test_validation_split_is_disjoint_and_complete(validation: int) -> None:
    training, held_out = split_validation(LABELS, validation)
    assert (len(training), len(held_out)) == (1000 - validation, validation)
    assert torch.cat([training, held_out]).sort().values.tolist() == list(range(1000))


def test_fixed_binarization_is_fixed_and_depends_on_the_place_of_an_image_alone() -> None:
    images = torch.full((100, 784), 128, dtype=torch.uint8)
    binary = binarize_fixed(images, stream=0)
    assert binary[0, :12].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0]
    torch.manual_seed(5)
    assert torch.equal(binarize_fixed(images[:7], stream=0), binary[:7])
    assert not torch.equal(binarize_fixed(images, stream=1), binary)
    assert not torch.equal(binary[0], binary[1])
