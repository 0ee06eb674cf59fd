"""A checkpoint of the main job in a fresh process elsewhere, and its decoder taken out of it."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import dglm
from dglm import DGLM, Decoder, GenerativeModel

FRESH = """
import sys
import torch
from dglm import DGLM

trained = DGLM.load_from_checkpoint(sys.argv[1])
decoder = trained.model.decoder
torch.save(decoder.state_dict(), "decoder.pt")
x, z = trained.model.sample(3, torch.Generator().manual_seed(0))
torch.save((x, z), "s.pt")
program = torch.export.export(decoder, (z,))
torch.export.save(program, "decoder.pt2")
"""

ALONE = """
import torch

decoder = torch.export.load("decoder.pt2").module()
_, z = torch.load("s.pt", weights_only=True)
torch.save(decoder(z).detach(), "logits.pt")
"""


def run(code: str, folder: Path, *arguments: str, path: str = "") -> None:
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, check=True, cwd=folder, env=environment)


def test_a_decoder_is_a_plain_module(checkpoint: Path, tmp_path: Path) -> None:
    run(FRESH, tmp_path, str(checkpoint), path=str(Path(dglm.__file__).parents[1]))
    run(ALONE, tmp_path)

    trained = DGLM.load_from_checkpoint(checkpoint)
    x, z = torch.load(tmp_path / "s.pt", weights_only=True)
    expected = trained.model.sample(3, torch.Generator().manual_seed(0))
    assert all(map(torch.equal, (x, z), expected))

    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, trained.model.decoder(z).detach())

    decoder = Decoder(3, 784, [12])
    assert type(trained.model.decoder) is Decoder
    decoder.load_state_dict(torch.load(tmp_path / "decoder.pt", weights_only=True))
    again = GenerativeModel(decoder, latent_dim=3)
    torch.testing.assert_close(again.log_joint(x, z), trained.model.log_joint(x, z))
