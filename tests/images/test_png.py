"""Arrays to Pillow images, without torch where an array is all there is."""

import subprocess
import sys

import numpy as np
import pytest

from pipeline.images.png import to_pillow

from ..support import ROOT


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_an_array_as_a_pillow_image(channels: int, mode: str) -> None:
    """Pixel by pixel, also of an array that is no contiguous block."""
    array = np.random.default_rng(0).integers(0, 256, (channels, 5, 14)).astype(np.uint8)
    for pixels in (array, array[:, ::-1, ::2]):
        picture = to_pillow(pixels)
        assert (picture.mode, picture.size) == (mode, (pixels.shape[2], pixels.shape[1]))
        for y, x in np.ndindex(pixels.shape[1:]):
            value = picture.getpixel((x, y))
            assert (value if isinstance(value, tuple) else (value,)) == tuple(pixels[:, y, x].tolist())


def test_the_built_in_images_need_no_torch() -> None:
    code = "import sys, pipeline.images.glyphs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
