"""A decoder, taken out of a checkpoint of the main job, serves where there is torch alone."""

import subprocess
import sys
from pathlib import Path

import torch

from dglm import DGLM, Decoder, GenerativeModel

ALONE = """
import torch

decoder = torch.export.load("decoder.pt2").module()
z = torch.load("z.pt", weights_only=True)
torch.save(decoder(z).detach(), "logits.pt")
"""


def test_a_decoder_is_a_plain_module(checkpoint: Path, tmp_path: Path) -> None:
    model = DGLM.load_from_checkpoint(checkpoint, map_location="cpu").model
    x, z = model.sample(3)
    torch.export.save(torch.export.export(model.decoder, (z,)), tmp_path / "decoder.pt2")
    torch.save(z, tmp_path / "z.pt")
    subprocess.run([sys.executable, "-c", ALONE], check=True, cwd=tmp_path, env={})
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, model.decoder(z).detach())

    decoder = Decoder(3, 784, [12])
    assert type(model.decoder) is Decoder
    decoder.load_state_dict(model.decoder.state_dict())
    again = GenerativeModel(decoder, latent_dim=3)
    torch.testing.assert_close(again.log_joint(x, z), model.log_joint(x, z))
