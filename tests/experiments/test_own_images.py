"""The commands on images of the user's own, with other likelihoods and networks."""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from experiments import evaluate, inpaint, posterior, samples
from experiments.mnist import main
from experiments.shared.cli import run_command
from experiments.shared.pictures import given_pixels, image_grid
from samplers import seeded_generator

Arguments = Callable[..., list[str]]


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Bright squares of three channels on a dark ground, at one of four places."""
    generator = seeded_generator("cpu", 0)
    images = 0.2 * torch.rand(120, 3, 8, 12, generator=generator)
    for index, image in enumerate(images):
        image[index % 3, 2 * (index % 4) : 2 * (index % 4) + 2, 4:8] = 0.9
    path = tmp_path / "colours.pt"
    torch.save(images, path)
    return path


GAUSSIAN = {"model.likelihood": "gaussian", "data.binarize": "false"}


@pytest.mark.parametrize(("likelihood", "kernel"), [({}, "l2hmc"), (GAUSSIAN, "hmc")])
def test_convolutional_networks_on_colour_images(
    likelihood: dict[str, str], kernel: str, small: Arguments, colours: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    changes = {"data.name": colours, "data.validation": 10, "model.channels": "[6, 5]"}
    main(small(folder, kernel=kernel, **changes, **likelihood))
    found = json.loads((folder / "summary.json").read_text())
    assert found["dataset"] == str(colours)
    assert found["training_images"] == 108 - 10
    assert found["binarization"] == ("none" if likelihood else "fixed, seed 1")
    assert found["skipped_updates"] == 0
    for name in ("samples", "reconstructions", "inpainting"):
        picture = plt.imread(folder / f"{name}.png")
        assert picture[..., :3].std() > 0.05, f"{name}.png is blank"

    checkpoint = folder / "checkpoints" / "last.ckpt"
    output = tmp_path / "score.json"
    sizes = ["--num_images=4", "--num_chains=3", "--num_temperatures=4", "--quiet=true"]
    evaluate.main([f"--checkpoint={checkpoint}", f"--output={output}", *sizes])
    score = json.loads(output.read_text())
    assert score["dataset"] == str(colours)
    assert score["binarization"] == found["binarization"]
    assert torch.tensor(score["log_likelihood"]).isfinite()
    samples.main([f"--checkpoints={checkpoint}", "--num_images=4", f"--output={tmp_path}/s.png"])
    steps = ["--num_chains=10", "--num_steps=8", "--num_warmup=20", "--quiet=true"]
    posterior.main([f"--checkpoint={checkpoint}", f"--output={tmp_path}/p.png", *steps])


def test_a_model_is_scored_on_its_own_images_or_fewer_but_not_on_changed_ones(
    small: Arguments, colours: Path, tmp_path: Path
) -> None:
    main(small(tmp_path / "run", kernel="hmc", **{"data.name": colours, "data.validation": 40}))
    few, shared = tmp_path / "few.pt", [f"--checkpoint={tmp_path}/run/checkpoints/last.ckpt"]
    torch.save(torch.load(colours)[:30], few)
    sizes = ["--num_chains=3", "--num_temperatures=3", "--quiet=true"]
    # The model's own images, by their name and by another path to them.
    copied = tmp_path / "copied.pt"
    torch.save(torch.load(colours), copied)
    others = tmp_path / "run" / ".." / "colours.pt", copied
    for name, count in ((few, 3), *((path, 12) for path in (colours, *others))):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        evaluate.main([*shared, *sizes, f"--data.name={name}", f"--output={output}"])
        assert json.loads(output.read_text())["num_images"] == count
    validation = [*shared, *sizes, "--split=validation", f"--output={tmp_path}/v.json"]
    evaluate.main([*validation, f"--data.name={copied}"])
    assert json.loads((tmp_path / "v.json").read_text())["num_images"] == 40
    with pytest.raises(
        SystemExit, match=r"are of shape \(1, 28, 28\), those that the model .*3, 8"
    ):
        run_command(lambda: evaluate.main([*shared, "--data.name=mnist-5k"]))
    with pytest.raises(SystemExit, match="has no classes"):
        run_command(lambda: inpaint.main([*shared, "--quiet=true"]))
    assert not list(tmp_path.rglob("inpainting-*"))
    torch.save(torch.load(colours).flip(0), colours)
    with pytest.raises(SystemExit, match="are others than those that the model was trained on"):
        run_command(lambda: evaluate.main([*shared, "--quiet=true"]))


def test_masks_hide_halves_of_every_channel() -> None:
    for name, rows, columns in (
        ("top", slice(0, 4), slice(None)),
        ("bottom", slice(4, None), slice(None)),
        ("left", slice(None), slice(0, 6)),
        ("right", slice(None), slice(6, None)),
    ):
        expected = torch.ones(3, 8, 12, dtype=torch.bool)
        expected[:, rows, columns] = False
        assert torch.equal(given_pixels(name, (3, 8, 12)).view(3, 8, 12), expected)  # type: ignore[arg-type]
    random = given_pixels("random", (3, 8, 12), seeded_generator("cpu", 0)).view(3, 8, 12)
    assert torch.equal(random[0], random[1])
    assert 0 < random.sum() < random.numel()


def test_grids_show_ink_dark_and_colours_as_they_are() -> None:
    grid = image_grid(torch.tensor([[0.0, 1.0, 0.25, -3.0]]), (1, 2, 2), 1)
    assert grid.shape == (3, 2, 2)
    assert grid[0].tolist() == [[1.0, 0.0], [0.75, 1.0]]
    colour = torch.rand(2, 3 * 4 * 5)
    grid = image_grid(colour, (3, 4, 5), 2)
    assert torch.equal(grid[:, 1:5, 1:6], colour[0].view(3, 4, 5))
    assert torch.equal(grid[:, 1:5, 7:12], colour[1].view(3, 4, 5))
