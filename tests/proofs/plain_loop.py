"""Training as most would write it with torch and torchvision, fairly tuned: what the program's own
rate is held against.
"""

import h5py
import torch
from torch import nn
from torchvision.models import resnet18

from lib.augment import PCAM_MEAN, PCAM_STD
from proofs.trainer import rate


class PlainPatches(torch.utils.data.Dataset):
    """A PCam split as most would read it: by h5py, a patch at a time, the file opened by each
    worker.
    """

    def __init__(self, path, labels):
        self.path, self.labels, self.file = path, torch.from_numpy(labels).float(), None

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        if self.file is None:
            self.file = h5py.File(self.path, "r")
        return torch.from_numpy(self.file["x"][row]), self.labels[row]


def plain_images_per_s(
    split, device: torch.device, num_workers: int, size: int, seconds: float
) -> float:
    """The rate of the usual training of torchvision's ResNet-18: DataLoader, pinned memory,
    autocast, channels last, fused SGD.

    Patches are normalised and flipped on the device.
    """
    model = resnet18(num_classes=1).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True
    )
    dataset = PlainPatches(split.images.path, split.labels)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**6)
    pin = device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        dataset, size, sampler=sampler, num_workers=num_workers, pin_memory=pin
    )
    loaded = iter(loader)
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (PCAM_MEAN, PCAM_STD)
    )

    def step():
        patches, labels = (tensor.to(device, non_blocking=True) for tensor in next(loaded))
        images = (patches.permute(0, 3, 1, 2).float() / 255 - mean) / std
        for axis in (2, 3):
            chosen = torch.rand(len(images), 1, 1, 1, device=device) < 0.5
            images = torch.where(chosen, images.flip(axis), images)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float().flatten(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return rate(step, seconds, device) * size
