"""The augmentation of Section 6 for many images at once: random resized crop, flip, RandAugment(n = 2, m = 14).

As torchvision.transforms.v2 defines them. All draws are made on the CPU, from (seed, epoch) alone.
"""

import math
from functools import partial
from itertools import product

import torch


def draw_augmentation(images, size, seed):
    """What is done to each of n `images` of `size` x `size` pixels, on the CPU:

    box (n, 4): top, left, height and width of the crop. flip (n,): whether to mirror. operations (n, 2): RandAugment's, one
    after the other. signs (n, 2): 1 or -1, the direction of those that have one.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = partial(torch.rand, generator=generator)
    # Ten tries at an area of 8 % to 100 % and a ratio from 3/4 to 4/3: the first that fits counts, or else the whole image.
    area = size**2 * (0.08 + 0.92 * uniform(images, 10))
    ratio = (math.log(4 / 3) * (2 * uniform(images, 10) - 1)).exp()
    sides = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()], 2)  # (n, 10, 2): height, width
    fits = ((0 < sides) & (sides <= size)).all(2)
    sides = torch.cat([sides, torch.full((images, 1, 2), size)], 1)
    sides = sides[torch.arange(images), torch.where(fits.any(1), fits.int().argmax(1), 10)]  # (n, 2)
    corner = (uniform(images, 2) * (size - sides + 1)).floor()
    operations = torch.randint(len(_operations(size)), (images, 2), generator=generator)
    signs = 1 - 2 * torch.randint(2, (images, 2), generator=generator)
    return torch.cat([corner, sides], 1), uniform(images) < 0.5, operations, signs


def crop_and_flip(images, box, flip, size):
    """Bytes (n, C, H, W) -> bytes (n, C, size, size): each image's box, resized, and mirrored where flip says so.

    Two products with one matrix an image do what torchvision's resized_crop(antialias=True) does image by image.
    """
    # Not in float32 on a GPU, where products may be in TF32: too coarse for 256 values.
    exact = images.to(torch.float64 if images.is_cuda else torch.float32)
    box, flip = box.to(exact, non_blocking=True), flip.to(exact.device, non_blocking=True)
    rows, columns = (_interpolation(box[:, i], box[:, i + 2], images.shape[i + 2], size) for i in (0, 1))
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    exact = torch.einsum("nxw,nchw->nchx", columns, exact)
    return torch.einsum("nyh,nchx->ncyx", rows, exact).round().byte()


def _interpolation(start, length, pixels, size):
    """(n, size, pixels): each row makes one of `size` pixels out of the `length` (n,) ones that begin at `start` (n,).

    Weights fall linearly with the distance of the centres, to 0 at the width of an old or a new pixel, whichever is larger.
    """
    start, length = start[:, None, None], length[:, None, None]
    old = torch.arange(pixels, device=start.device) + 0.5
    new = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * length / size
    weights = (1 - (old - new).abs() / (length / size).clamp(min=1)).clamp(min=0)
    weights = weights * ((start < old) & (old < start + length))
    return weights / weights.sum(2, keepdim=True)


def rand_augment(images, operations, signs):
    """RandAugment of bytes (n, C, H, W): `operations` (n, 2) and `signs` (n, 2) of draw_augmentation."""
    images, functions = images.clone(), _operations(images.shape[-1])
    for operation, sign in zip(operations.unbind(1), signs.unbind(1)):
        for number, direction in product(range(len(functions)), (1, -1)):
            chosen = ((operation == number) & (sign == direction)).nonzero()[:, 0].to(images.device, non_blocking=True)
            if len(chosen):
                images[chosen] = functions[number](images[chosen], direction)
    return images


def _operations(size):
    """RandAugment's operations on bytes, functions of (images, sign), at torchvision's magnitude 14 of 0 to 30."""
    from torchvision.transforms.v2 import functional as V

    def strength(weakest, strongest):
        return torch.linspace(weakest, strongest, 31)[14].item()

    shear, shift = math.degrees(math.atan(strength(0.0, 0.3))), int(strength(0.0, 150 / 331 * size))
    angle, change = strength(0.0, 30.0), strength(0.0, 0.9)
    return [
        lambda images, sign: images,
        lambda images, sign: V.affine(images, 0.0, [0, 0], 1.0, [sign * shear, 0.0], center=[0, 0]),
        lambda images, sign: V.affine(images, 0.0, [0, 0], 1.0, [0.0, sign * shear], center=[0, 0]),
        lambda images, sign: V.affine(images, 0.0, [sign * shift, 0], 1.0, [0.0, 0.0]),
        lambda images, sign: V.affine(images, 0.0, [0, sign * shift], 1.0, [0.0, 0.0]),
        lambda images, sign: V.rotate(images, sign * angle),
        lambda images, sign: V.adjust_brightness(images, 1 + sign * change),
        lambda images, sign: V.adjust_saturation(images, 1 + sign * change),
        lambda images, sign: V.adjust_contrast(images, 1 + sign * change),
        lambda images, sign: V.adjust_sharpness(images, 1 + sign * change),
        lambda images, sign: V.posterize(images, 6),  # the bits that are kept
        lambda images, sign: V.solarize(images, 255 * strength(1.0, 0.0)),  # inverts what is as bright or brighter
        lambda images, sign: V.autocontrast(images),
        lambda images, sign: V.equalize(images),
    ]
